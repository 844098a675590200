"""vitkit.models: every name builds, runs and learns on kernels as on the reference; configurations
are the published ones; bad input."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from model_hosts import seeded

import vitkit
from vitkit.models import __main__, create, entry, list_models
from vitkit.models.beit import relative_index
from vitkit.models.dalle import layer_kind, sparse_mask
from vitkit.models.layers import resample_positions, sincos_1d

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
NAMES = list_models()
# The names people look for; issue by family.
PROMISED = """
    vit_s16 vit_b16 vit_l16 vit_h14 vit_g14 dino_s16 dino_s8 dino_b16 dino_b8 dinov2_s14 dinov2_b14
    dinov2_l14 dinov2_g14 dinov3_s16 dinov3_b16 dinov3_l16 dinov3_7b16 ibot_s16 ibot_b16 ibot_l16
    beit_b16 beit_l16 swin_t swin_s swin_b swinv2_t swinv2_s swinv2_b ctranspath uni uni2_h conch
    conch_v1_5 virchow virchow2 rudolfv sp22m sp85m gigapath_tile gigapath_slide prism titan hipt
    istar medgemma_siglip perceiver flamingo_resampler dalle ddpm_cifar10 ddpm_256 sd15_unet
    sd21_unet sdxl_unet kl_vae dit_s2 dit_b4 dit_l8 dit_xl2 sit_s2 sit_xl2 fit_b2 fit_xl2
"""
# Millions of parameters as published, to the digits given.
PUBLISHED = {
    "dino_s16": 21.7,
    "dino_b16": 85.8,
    "dinov2_g14": 1136.5,
    "uni": 303.4,
    "uni2_h": 681.4,
    "virchow": 631.2,
    "virchow2": 631.2,
    "gigapath_tile": 1135.0,
    "h_optimus": 1134.8,
    "sp85m": 85.8,
    "swin_t": 28.3,
    "swin_s": 49.6,
    "swin_b": 87.8,
    "swinv2_t": 28.3,
    "ctranspath": 27.5,
    "gigapath_slide": 86.33088,
    "prism": 99.0,
    "titan": 49.0,
    "dit_s2": 33.0,
    "dit_b2": 130.0,
    "dit_l2": 458.0,
    "dit_xl2": 675.0,
    "fit_b2": 159.0,
    "fit_xl2": 824.0,
    "perceiver": 48.4,
    "sd15_unet": 859.5,
    "sdxl_unet": 2567.5,
    "kl_vae": 83.65,
    "ddpm_cifar10": 35.7,
    "ddpm_256": 113.7,
    "dalle": 12000.0,
}
# Parameters that the forward pass has no use for: they serve a text decoder or a loss.
UNUSED = {
    "conch": ("attn_pool_caption", "ln_caption", "proj_contrast"),
    "titan": ("attn_pool.",),
    "prism": ("img_norm",),
}


def distinct():
    """One name per reduced configuration: many full ones differ in size only."""
    seen = {}
    for name in NAMES:
        config = entry(name).config.reduced()
        seen.setdefault((type(config), str(config)), name)
    return list(seen.values())


def outputs_of(model, inputs):
    out = model(*inputs)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", distinct())
def test_runs_on_kernels_as_on_the_reference(name):
    """Finite, nearer to float64 than twice the reference's distance, and every parameter learns.
    Names left out have the reduced configuration of one that is here."""
    model = seeded(create(name, reduced=True)).eval()
    torch.manual_seed(1)
    inputs = model.example_inputs(batch=1 if name == "titan" else 2)
    result = vitkit.verify(model, *inputs, seconds=0)
    assert result.ok and result.own and result.backend == "cpu", result
    actual = outputs_of(model, inputs)
    assert len(actual) == len(result.outputs)
    assert all(out.isfinite().all() and out.std() > 0 for out in actual)
    sum(out.square().sum() for out in actual).backward()
    for key, p in model.named_parameters():
        if not key.startswith(UNUSED.get(name, "nothing")):
            assert p.grad is not None and p.grad.isfinite().all(), key
            assert p.grad.abs().max() > 0 or key.endswith(("k_proj.bias", "to_k.bias")), key


FAMILIES = """
    vit_b16 dinov3_b16 beit_b16 medsiglip conch swin_t swinv2_t ctranspath gigapath_slide titan
    prism hipt perceiver flamingo_resampler dit_b2 fit_b2 ddpm_cifar10 sdxl_unet kl_vae dalle
"""


@pytest.mark.parametrize("name", FAMILIES.split())
def test_runs_in_bfloat16(name):
    """Outputs in the dtype of the model, not far from those in float32."""
    model = seeded(create(name, reduced=True)).eval()
    torch.manual_seed(1)
    inputs = model.example_inputs()
    narrow = [t.bfloat16() if t.is_floating_point() and t.dim() > 1 else t for t in inputs]
    if name in ("gigapath_slide", "sdxl_unet"):
        narrow[-1] = inputs[-1]  # coordinates and sizes are no features
    with torch.no_grad():
        wide = outputs_of(model, inputs)[0]
        out = outputs_of(model.bfloat16(), narrow)[0]
    assert out.dtype == torch.bfloat16
    assert (out - wide).norm() < 0.1 * wide.norm()


def test_the_table_of_the_docs_is_the_configurations():
    """And the rows that make models stored. Every full model is built, without its memory."""
    page = (ROOT / "docs" / "models.md").read_text()
    assert __main__.updated(page) == page, "run python -m vitkit.models docs/models.md"


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_published(name):
    published, millions = PUBLISHED[name], __main__.parameters(name) / 1e6
    if name == "gigapath_slide":
        assert millions == published
    else:
        digits = 0 if published == int(published) else 1
        slack = {"dalle": 500.0}.get(name, 0.55 * 10**-digits)
        assert abs(millions - published) <= slack, millions


def test_promised_names_exist():
    assert set(PROMISED.split()) <= set(NAMES)
    assert list_models("gigapath*") == sorted(n for n in NAMES if n.startswith("gigapath"))
    assert all(entry(n).source for n in NAMES)


def test_configurations_are_data():
    model = create("uni", reduced=True, depth=1, num_classes=7)
    assert len(model.blocks) == 1 and model.head.out_features == 7
    assert dataclasses.replace(entry("uni").config, depth=1).dim == 1024
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry("uni").config.depth = 3


def test_import_is_lazy():
    assert vitkit.models.create is create
    with pytest.raises(AttributeError, match="nonsense"):
        vitkit.nonsense  # noqa: B018


BAD = {
    "unknown_name": (lambda: create("vit_b"), "name must be one of .* got 'vit_b' .*vit_b16"),
    "unknown_field": (lambda: create("uni", layers=3), "must be fields of ViTConfig .* got layers"),
    "pool": (lambda: create("uni", reduced=True, pool="max"), "pool must be one of"),
    "mlp": (lambda: create("uni", reduced=True, mlp="relu"), "mlp must be"),
    "heads": (lambda: create("uni", reduced=True, num_heads=3), "num_heads must divide"),
    "swin_version": (lambda: create("swin_t", reduced=True, version=3), "version must be 1 or 2"),
    "conch_version": (lambda: create("conch", reduced=True, version=2), "version must be 1 or 1.5"),
    "slide_pool": (lambda: create("gigapath_slide", reduced=True, pool="x"), "pool must be"),
    "two_slides": (
        lambda: create("titan", reduced=True)(torch.ones(2, 3, 40), torch.ones(2, 3, 2), 1),
        "must have shape .* of one slide",
    ),
    "region": (lambda: create("hipt", reduced=True)(torch.ones(1, 3, 65, 64)), "multiples of 64"),
    "sdxl_without_sizes": (
        lambda: create("sdxl_unet", reduced=True)(torch.ones(1, 4, 8, 8), torch.ones(1)),
        "pooled_text and sizes must be given",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def cubic(t, a=-0.75):
    """The kernel of torch's bicubic interpolation."""
    t = abs(t)
    if t <= 1:
        return ((a + 2) * t - (a + 3)) * t * t + 1
    return ((t - 5) * t + 8) * t * a - 4 * a if t < 2 else 0.0


def test_resampled_positions_lie_where_dino_puts_them():
    """Rows are taken from places a tenth of a cell denser than the grid asks for."""
    side, grid = 14, (16, 16)
    values = torch.randn(side)
    table = values[:, None, None].expand(side, side, 4).flatten(0, 1)
    table = torch.cat([torch.full((1, 4), 7.0), table])
    new = resample_positions(table, 1, grid, "dino")
    rows = new[1:].view(*grid, 4)[:, 0, 0]
    for j in range(3, 13):
        place = (j + 0.5) * side / 16.1 - 0.5
        expected = sum(cubic(place - k) * v for k, v in enumerate(values.tolist()))
        assert rows[j].item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(new[:1], table[:1])
    assert resample_positions(table, 1, (14, 14), "dino") is table


def test_relative_index_of_beit():
    """Two patches the same way apart share a row; the class token has three of its own."""
    index = relative_index(3)
    assert index.shape == (10, 10) and index.unique().numel() == 25 + 3
    assert index[1, 2] == index[4, 5] == index[8, 9] != index[2, 1]
    assert index[0, 1:].unique().tolist() == [25] and index[1:, 0].unique().tolist() == [26]
    assert index[0, 0] == 27


def test_gigapath_positions_are_the_published_table():
    """Two tables of a side hold what the published code keeps for every cell, with its wrap to the
    next column where y leaves the grid."""
    model = create("gigapath_slide", reduced=True, grid=6)
    quarter = model.config.dim // 4
    cells = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
    omega = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = cells.double()[:, [1, 0], None] * omega
    table = torch.cat([angles.sin(), angles.cos()], -1).flatten(1).float()
    coords = torch.tensor([[0.0, 0.0], [300, 1535], [1400, 256], [255, 1536]])[None]
    flat = torch.tensor([0, 1 * 6 + 5, 5 * 6 + 1, 6])
    assert torch.equal(model.position_embedding(coords)[0], table[flat])


def test_gigapath_segments():
    lengths = entry("gigapath_slide").config.segment_lengths
    assert lengths == [1024, 5792, 32768, 185363, 1048576]
    panda = dataclasses.replace(entry("gigapath_slide").config, max_slide_size=250000)
    assert panda.segment_lengths == [1024, 4870, 23170, 110217, 524288]


def test_sincos_is_computed_in_float64():
    exact = math.sin(997 * 10000 ** (-3 / 16))
    assert sincos_1d(torch.tensor([997]), 32)[0, 3].item() == pytest.approx(exact, abs=6e-8)


def test_masks_of_dalle():
    """A text of 2 tokens and an image of 3 x 3: what the image's last token but one attends to."""
    row, column, near = (sparse_mask(k, 2, 3, 3) for k in ("row", "column", "neighbourhood"))
    for mask in (row, column, near):
        assert not mask.triu(1).any() and mask.diagonal().all() and mask[2:, :2].all()
    assert row[9, 2:].nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert column[9, 2:].nonzero().flatten().tolist() == [1, 4, 7]
    assert near[9, 2:].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert near[8, 2:].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]  # on around the edge
    kinds = [layer_kind(i, 64) for i in range(1, 65)]
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"]
    assert kinds[-1] == "neighbourhood" and kinds.count("neighbourhood") == 1


def test_dalle_predicts_from_earlier_tokens_only():
    model = seeded(create("dalle", reduced=True)).eval()
    text, image = model.example_inputs()
    before = model(text, image)
    image[0, 9] = (image[0, 9] + 1) % 16
    after = model(text, image)
    changed = (before != after).any(-1)[0]
    place = 6 + 9
    assert not changed[: place + 1].any() and changed[place + 1]


def test_padding_of_fit_changes_nothing():
    model = seeded(create("fit_xl2", reduced=True)).eval()
    x, t, y, grid, mask = model.example_inputs()
    out = model(x, t, y, grid, mask)
    real = mask[0] != 0
    assert real.any() and not real.all() and (out[..., ~real] == 0).all()
    other = x.clone()
    other[..., ~real] = 5.0
    torch.testing.assert_close(model(other, t, y, grid, mask), out)
    short = [v[..., real] for v in (x, grid, mask)]
    torch.testing.assert_close(
        model(short[0], t, y, short[1], short[2]), out[..., real], atol=1e-5, rtol=1e-5
    )


def test_padding_of_prism_changes_nothing():
    model = seeded(create("prism", reduced=True)).eval()
    tiles = torch.randn(2, 30, 40)
    mask = torch.arange(30) < torch.tensor([[30], [21]])
    out = model(tiles, mask)
    torch.testing.assert_close(model(tiles[1:, :21]), out[1:], atol=1e-5, rtol=1e-5)


def test_titan_knows_tiles_by_their_place():
    """In any order; features in one cell are added; cells without features are no tokens."""
    model = seeded(create("titan", reduced=True)).eval()
    features, coords, size = model.example_inputs()
    out = model(features, coords, size)
    order = torch.randperm(len(features))
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(model(features[order], coords[order], size), out, **close)
    half = torch.cat([features, features[:1]])
    half[[0, -1]] *= 0.5
    again = torch.cat([coords, coords[:1] + 3])
    torch.testing.assert_close(model(half, again, size), out, **close)
    empty = torch.cat([features, torch.zeros(1, 40)])
    far = torch.cat([coords, coords[-1:] + 1024])
    torch.testing.assert_close(model(empty, far, size), out, **close)
    moved = coords.clone()
    moved[0] += 40 * 1024
    assert (model(features, moved + 0, size) - out).abs().max() > 1e-3


def test_maps_of_istar_are_the_tokens_of_hipt():
    """Cutting a region into tiles and its maps together again keeps everything in place."""
    model = seeded(create("istar", reduced=True)).eval()
    images = model.example_inputs()[0]
    region, coarse, fine = model(images)
    size, patch = model.config.tile_size, model.config.tile.patch_size
    n = size // patch
    tile = images[:, :, size : 2 * size, :size]  # the second row, first column
    tokens = model.model256.forward_features(tile)[0, 1:]
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(fine[0, :, n : 2 * n, :n].flatten(1).T, tokens, **close)
    hipt = seeded(create("hipt", reduced=True)).eval()
    torch.testing.assert_close(hipt(images), region, **close)
    assert coarse.shape[-2:] == (3, 3)
