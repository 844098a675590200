"""Patch embeddings of timm, transformers and diffusers, patched: numbers, gradients, kernels
called; and vitkit.nn.PatchEmbed, which loads their parameters."""

from __future__ import annotations

import pytest
import torch
from patching import assert_same_numbers

import vitkit
import vitkit.nn

ONE = {"patch_embed_fwd": {"cpu": 1}, "patch_embed_bwd": {"cpu": 1}}


def seeded(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return module


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


TIMM = {
    "vit": ({}, (2, 3, 32, 48)),
    "swin": ({"norm_layer": torch.nn.LayerNorm, "output_fmt": "NHWC"}, (2, 3, 32, 48)),
    "no_bias": ({"bias": False, "output_fmt": "NLC"}, (2, 3, 32, 48)),
    "other_norm": ({"norm_layer": lambda d, **_: torch.nn.RMSNorm(d)}, (2, 3, 32, 48)),
    "dynamic_pad": ({"strict_img_size": False, "dynamic_img_pad": True}, (1, 3, 30, 41)),
}


@pytest.mark.parametrize(("options", "shape"), TIMM.values(), ids=TIMM)
def test_timm(options, shape):
    layers = pytest.importorskip("timm").layers
    module = seeded(layers.PatchEmbed((32, 48), 16, 3, 24, **options))
    calls = assert_same_numbers(module, [image(*shape)])
    assert calls.counts == ONE


def test_timm_asks_its_host_for_what_is_its_own():
    layers = pytest.importorskip("timm").layers
    module = seeded(layers.PatchEmbed(32, 16, 3, 24))
    with vitkit.patched(module), pytest.raises(AssertionError, match="doesn't match model"):
        module(image(1, 3, 48, 32))
    module = seeded(layers.PatchEmbed(None, 16, 3, 24))
    calls = assert_same_numbers(module, [image(1, 3, 40, 32)])  # a convolution drops the rest
    assert calls.counts == {}
    seen = []
    module.proj.register_forward_hook(lambda *_: seen.append(1))
    with vitkit.patched(module):
        module(image(1, 3, 32, 32))
    assert seen == [1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "proj", torch.nn.Sequential(m.proj)), "its projection is a Seq"),
        (lambda m: setattr(m, "proj", torch.nn.Conv2d(3, 24, 16, 8)), "its patches overlap"),
        (lambda m: setattr(m, "proj", torch.nn.Conv2d(3, 24, 16, 16, 2)), "padded"),
        (lambda m: setattr(m, "flatten", False), "its output is NCHW, not tokens"),
    ],
    ids=["wrapped", "overlapping", "padded", "map"],
)
def test_timm_left_with_a_reason(change, reason):
    layers = pytest.importorskip("timm").layers
    module = layers.PatchEmbed(32, 16, 3, 24)
    change(module)
    report = vitkit.patch(module)
    assert any(reason in s.reason for s in report.skipped), report


def transformers_embeddings():
    transformers = pytest.importorskip("transformers")
    from transformers.models.deit.modeling_deit import DeiTPatchEmbeddings
    from transformers.models.dinov2.modeling_dinov2 import Dinov2PatchEmbeddings
    from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as reg
    from transformers.models.swin.modeling_swin import SwinPatchEmbeddings
    from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

    small = {"image_size": 32, "patch_size": 8}
    return {
        "vit": ViTPatchEmbeddings(transformers.ViTConfig(hidden_size=24, **small)),
        "deit": DeiTPatchEmbeddings(transformers.DeiTConfig(hidden_size=24, **small)),
        "dinov2": Dinov2PatchEmbeddings(transformers.Dinov2Config(hidden_size=24, **small)),
        "registers": reg.Dinov2WithRegistersPatchEmbeddings(
            transformers.Dinov2WithRegistersConfig(hidden_size=24, **small)
        ),
        "swin": SwinPatchEmbeddings(transformers.SwinConfig(embed_dim=24, **small)),
    }


def test_transformers():
    for name, module in transformers_embeddings().items():
        size = (30, 27) if name == "swin" else (32, 24)
        calls = assert_same_numbers(seeded(module), [image(2, 3, *size)])
        assert calls.counts == ONE, name
        if name != "swin":
            with vitkit.patched(module), pytest.raises(ValueError, match="channel dimension"):
                module(image(2, 4, 32, 32))


def test_transformers_dinov2_casts_its_images():
    module = seeded(transformers_embeddings()["dinov2"]).bfloat16()
    before = module(image(2, 3, 32, 32))
    with vitkit.patched(module):
        after = module(image(2, 3, 32, 32))
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)
    assert after.dtype == torch.bfloat16


DIFFUSERS = {
    "dit": ({}, (2, 4, 16, 16)),
    "norm": ({"layer_norm": True, "pos_embed_type": None}, (2, 4, 16, 16)),
    "sd3_crop": ({"pos_embed_max_size": 12}, (2, 4, 16, 12)),
}


@pytest.mark.parametrize(("options", "shape"), DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers(options, shape):
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import PatchEmbed

    module = seeded(PatchEmbed(16, 16, 2, 4, 24, **options))
    calls = assert_same_numbers(module, [image(*shape)])
    assert calls.counts == ONE


def test_diffusers_interpolates_itself():
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import PatchEmbed

    module = seeded(PatchEmbed(16, 16, 2, 4, 24))
    before = module(image(1, 4, 8, 8))
    with vitkit.patched(module):
        assert torch.equal(module(image(1, 4, 8, 8)), before)


def test_nn_twin_loads_timm():
    layers = pytest.importorskip("timm").layers
    host = seeded(layers.PatchEmbed(32, 8, 3, 24, norm_layer=torch.nn.LayerNorm))
    twin = vitkit.nn.PatchEmbed(8, 3, 24, norm=True, norm_eps=1e-5)
    twin.load_state_dict(host.state_dict())
    x, pos, cls = image(2, 3, 32, 32), image(17, 24), image(1, 24)
    want = torch.cat([cls.expand(2, -1, -1), host(x)], 1) + pos
    torch.testing.assert_close(twin(x, pos, cls), want, rtol=1e-4, atol=1e-5)
    double = twin.double()(x.double())
    torch.testing.assert_close(double.float(), host(x), rtol=1e-4, atol=1e-5)


def test_nn_twin_of_bytes_and_videos():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    embed = vitkit.nn.PatchEmbed((2, 4, 8), 3, 24, mean=mean, std=std, pad=True)
    assert tuple(embed.proj.weight.shape) == (24, 3, 2, 4, 8)
    x = torch.randint(256, (2, 3, 4, 8, 16), dtype=torch.uint8)
    shape = (1, 3, 1, 1, 1)
    floats = (x / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    want = embed.proj(floats).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="patch_size must be"):
        vitkit.nn.PatchEmbed((2, 0))
