"""LayerNorms of torch, timm and diffusers, patched: numbers, kernels called, what is refused."""

from __future__ import annotations

import pytest
import torch
from patching import assert_same_numbers, snapshot

import vitkit
from vitkit.nn import functional
from vitkit.verify import KernelCalls

FORWARD, BACKWARD = "layer_norm_modulate_fwd", "layer_norm_modulate_bwd"


@pytest.fixture
def no_small_norms(monkeypatch):
    """Small inputs stay on torch's LayerNorm; here they must show the kernels."""
    monkeypatch.setattr(functional, "SMALL_LAYER_NORM", ((0, 0), (0, 0)))


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


# ---- plain ----


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_torch_layer_norm(options, no_small_norms):
    module = seeded(torch.nn.LayerNorm(24, **options))
    for shape in ((2, 5, 24), (7, 24), (24,)):
        calls = assert_same_numbers(module, [randn(*shape)])
        assert calls.counts == {FORWARD: {"cpu": 1}, BACKWARD: {"cpu": 1}}


def timm_norms():
    timm = pytest.importorskip("timm")
    layers = timm.layers
    return [
        (layers.LayerNorm(24), randn(2, 5, 24)),
        (layers.LayerNorm(24, affine=False), randn(2, 3, 4, 24)),
        (layers.LayerNormFp32(24), randn(2, 5, 24)),
        (layers.LayerNorm2d(24), randn(2, 24, 3, 4)),
        (layers.LayerNorm2d(24), randn(2, 24, 3, 4).to(memory_format=torch.channels_last)),
    ]


def test_timm_layer_norms(no_small_norms):
    for module, x in timm_norms():
        calls = assert_same_numbers(seeded(module), [x])
        assert calls.counts == {FORWARD: {"cpu": 1}, BACKWARD: {"cpu": 1}}
        expected = module(x)
        with vitkit.patched(module):
            assert module(x).stride() == expected.stride()


def test_low_precision_keeps_its_dtype(no_small_norms):
    timm = pytest.importorskip("timm")
    x = randn(2, 5, 24).bfloat16()
    for norm in (torch.nn.LayerNorm, timm.layers.LayerNorm, timm.layers.LayerNormFp32):
        for dtype in (torch.bfloat16, torch.float32):
            module = seeded(norm(24)).to(dtype)
            expected = module(x)
            with vitkit.patched(module) as report:
                assert len(report.replaced) == 1
                actual = module(x)
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=1.6e-2, atol=1e-2)


def test_small_inputs_stay_on_torch():
    module = torch.nn.LayerNorm(64)
    small, large = torch.randn(1, 4, 64), torch.randn(4, 1024, 64)
    expected = module(small)
    with vitkit.patched(module), KernelCalls() as calls:
        assert torch.equal(module(small), expected)
        module(large)  # with gradients, torch keeps larger ones
        assert calls.counts == {}
        with torch.no_grad():
            module(large)
    assert calls.counts == {FORWARD: {"cpu": 1}}
    # A backend that was asked for is taken at its word.
    with vitkit.patched(module, backend="cpu"), KernelCalls() as calls:
        module(small)
    assert calls.counts == {FORWARD: {"cpu": 1}}


def test_refused():
    timm = pytest.importorskip("timm")

    class Twice(torch.nn.LayerNorm):
        def forward(self, input):
            return 2 * super().forward(input)

    fast = timm.layers.LayerNorm(8)
    fast._fast_norm = True
    model = torch.nn.ModuleList([torch.nn.LayerNorm((3, 8)), Twice(8), fast])
    report = vitkit.patch(model)
    assert report.replaced == []
    reasons = [s.reason for s in report.skipped]
    assert "over 2 dimensions" in reasons[0]
    assert "a subclass of torch's LayerNorm" in reasons[1]
    assert "fast norm" in reasons[2]


def test_a_width_that_does_not_fit_raises_what_torch_raises():
    module = torch.nn.LayerNorm(8)
    vitkit.patch(module)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        module(torch.zeros(2, 9))


def test_whole_swin(no_small_norms):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=16, depths=(1, 1), num_heads=(2, 4),
        window_size=4, num_classes=3,
    ).eval()  # fmt: skip
    norms = sum(isinstance(m, torch.nn.LayerNorm) for m in model.modules())
    before = snapshot(model)
    calls = assert_same_numbers(model, [randn(1, 3, 32, 32)])
    assert norms == 7
    assert (
        calls.total(FORWARD) == norms - 1 and calls.total("patch_embed_fwd") == 1
    )  # with its norm
    assert snapshot(model) == before


# ---- adaptive norms of diffusers ----


class OfDiT(torch.nn.Module):
    """AdaLayerNormZero with an embedding of its own, called as DiT's blocks call it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, timestep, labels):
        return self.norm(x, timestep, labels, hidden_dtype=x.dtype)


def adaptive():
    normalization = pytest.importorskip("diffusers.models.normalization")
    x, emb = randn(2, 5, 32), randn(2, 32, seed=2)
    zero, continuous = normalization.AdaLayerNormZero, normalization.AdaLayerNormContinuous
    adaptive = normalization.AdaLayerNorm(32, output_dim=64, chunk_dim=1)
    labels = [torch.tensor([3, 9]), torch.tensor([1, 0])]
    return {
        "dit": (OfDiT(zero(32, num_embeddings=4)).eval(), [x, *labels], {}, 1),
        "sd3": (zero(32), [x], {"emb": emb}, 1),
        "fp32_norm": (zero(32, norm_type="fp32_layer_norm", bias=True), [x], {"emb": emb}, 1),
        "flux_single": (normalization.AdaLayerNormZeroSingle(32), [x, emb], {}, 1),
        "continuous": (continuous(32, 32), [x, emb], {}, 1),
        "continuous_plain": (continuous(32, 32, elementwise_affine=False), [x, emb], {}, 1),
        "sd35": (normalization.SD35AdaLayerNormZeroX(32), [x, emb], {}, 2),
        "cogvideo_norm": (adaptive, [x], {"temb": emb}, 1),
        "cogvideo_block": (
            normalization.CogVideoXLayerNormZero(32, 32),
            [x, randn(2, 3, 32, seed=3), emb],
            {},
            2,
        ),
    }


ADAPTIVE = (
    "dit", "sd3", "fp32_norm", "flux_single", "continuous", "continuous_plain", "sd35",
    "cogvideo_norm", "cogvideo_block",
)  # fmt: skip


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_norm(name):
    module, inputs, options, kernels = adaptive()[name]
    before = snapshot(seeded(module))
    calls = assert_same_numbers(module, inputs, options)
    assert calls.counts == {FORWARD: {"cpu": kernels}, BACKWARD: {"cpu": kernels}}
    assert snapshot(module) == before


def test_adaptive_norm_in_low_precision():
    module, (x,), options, _ = adaptive()["sd3"]
    module = seeded(module).bfloat16()
    emb = options["emb"].bfloat16()
    double = seeded(adaptive()["sd3"][0]).bfloat16().double()
    exact = double(x.bfloat16().double(), emb=emb.double())
    eager = module(x.bfloat16(), emb=emb)
    with vitkit.patched(module), KernelCalls() as calls:
        actual = module(x.bfloat16(), emb=emb)
    assert calls.total(FORWARD) == 1
    for a, e, t in zip(actual, eager, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - t).abs().max() <= 2 * (e - t).abs().max() + 2**-7 * t.abs().max()


def test_what_is_not_the_hosts_computation_is_left_to_the_host():
    module, (x,), options, _ = adaptive()["sd3"]
    module.norm.register_forward_hook(lambda m, i, o: 2 * o)
    assert "its norm has hooks" in str(vitkit.patch(module))
    module, (x,), options, _ = adaptive()["sd3"]
    expected = module(x, **options)
    vitkit.patch(module)
    seen = []
    handle = module.norm.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with KernelCalls() as calls:
        for a, b in zip(module(x, **options), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert len(seen) == 1 and calls.counts == {}
    handle.remove()
    # One embedding for a batch of two, and one that widens the result: the host's way, its dtype.
    with KernelCalls() as calls:
        assert module(x, emb=options["emb"][:1])[0].shape == x.shape
        assert module(x.bfloat16(), **options)[0].dtype == torch.float32
    assert calls.counts == {}


def test_adaptive_norms_refused():
    normalization = pytest.importorskip("diffusers.models.normalization")
    model = torch.nn.ModuleList(
        [
            normalization.AdaLayerNormContinuous(32, 32, norm_type="rms_norm", bias=False),
            normalization.AdaLayerNorm(32),
        ]
    )
    reasons = {s.name: s.reason for s in vitkit.patch(model).skipped}
    assert "its norm is a RMSNorm, not a LayerNorm" in reasons["0"]
    assert "chunk_dim is 0" in reasons["1"]


def test_whole_dit(no_small_norms):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, patch_size=2,
    ).eval()  # fmt: skip
    inputs = [randn(2, 4, 8, 8)]
    options = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    before = snapshot(model)
    calls = assert_same_numbers(seeded(model), inputs, options)
    # A block has an adaptive norm and a plain one, the end a plain one.
    assert calls.counts[FORWARD] == {"cpu": 5} and calls.counts["flash_attention_fwd"] == {"cpu": 2}
    assert snapshot(model) == before
