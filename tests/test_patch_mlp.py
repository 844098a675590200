"""Gated MLPs and GELU of every host, patched: numbers, gradients, kernels called, and what is
refused."""

from __future__ import annotations

import functools

import pytest
import torch
from patching import assert_same_numbers, replaced, snapshot

import vitkit
import vitkit.nn
from vitkit.patch.hosts.activations import kind_of
from vitkit.verify import KernelCalls

timm = pytest.importorskip("timm")
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked  # noqa: E402

LayerNorm = torch.nn.LayerNorm
X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


def seeded(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


TIMM = {
    "swiglu": (lambda: SwiGLU(24, 20), "swiglu"),
    "swiglu_normed": (lambda: SwiGLU(24, 20, norm_layer=LayerNorm, drop=0.0), "swiglu"),
    "swiglu_packed": (lambda: SwiGLUPacked(24, 40), "swiglu"),
    "swiglu_gate_last": (lambda: GluMlp(24, 40, act_layer=torch.nn.SiLU), "swiglu"),
    "geglu": (lambda: GluMlp(24, 40, act_layer=torch.nn.GELU), "geglu"),
    "geglu_tanh_gate_first": (
        lambda: GluMlp(
            24, 40, act_layer=functools.partial(torch.nn.GELU, approximate="tanh"), gate_last=False
        ),
        "geglu",
    ),
    "mlp": (lambda: timm.layers.Mlp(24, 40), "gelu"),
    "mlp_tanh": (lambda: timm.layers.Mlp(24, 40, act_layer=timm.layers.GELUTanh), "gelu"),
    "mlp_of_timms_gelu": (lambda: timm.layers.Mlp(24, 40, act_layer=timm.layers.GELU), "gelu"),
}


@pytest.mark.parametrize(("make", "op"), TIMM.values(), ids=TIMM)
def test_timm(make, op):
    module = seeded(make())
    before = snapshot(module)
    calls = assert_same_numbers(module, [X])
    assert calls.counts == {f"{op}_fwd": {"cpu": 1}, f"{op}_bwd": {"cpu": 1}}
    assert snapshot(module) == before


DIFFUSERS = {
    "geglu": ({"activation_fn": "geglu"}, "geglu"),
    "swiglu": ({"activation_fn": "swiglu"}, "swiglu"),
    "gelu": ({"activation_fn": "gelu"}, "gelu"),
    "gelu_of_dit": ({"activation_fn": "gelu-approximate"}, "gelu"),
}


@pytest.mark.parametrize(("options", "op"), DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers(options, op):
    attention = pytest.importorskip("diffusers.models.attention")
    calls = assert_same_numbers(seeded(attention.FeedForward(24, **options)), [X])
    assert calls.counts == {f"{op}_fwd": {"cpu": 1}, f"{op}_bwd": {"cpu": 1}}


def test_transformers_dinov2():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    for gated, op in ((True, "swiglu"), (False, "gelu")):
        config = transformers.Dinov2Config(
            **small, image_size=28, patch_size=14, use_swiglu_ffn=gated
        )
        model = seeded(transformers.Dinov2Model(config)).eval()
        calls = assert_same_numbers(model, [image])
        assert calls.total(f"{op}_fwd") == calls.total(f"{op}_bwd") == 2


def test_transformers_dinov3_gated_mlp():
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = dinov3.DINOv3ViTConfig(hidden_size=24, intermediate_size=40, hidden_act="silu")
    calls = assert_same_numbers(seeded(dinov3.DINOv3ViTGatedMLP(config)), [X])
    assert calls.counts == {"swiglu_fwd": {"cpu": 1}, "swiglu_bwd": {"cpu": 1}}


def test_torchvision_mlp():
    misc = pytest.importorskip("torchvision.ops.misc")
    module = seeded(misc.MLP(24, [40, 24], activation_layer=torch.nn.GELU, inplace=None))
    calls = assert_same_numbers(module.eval(), [X])
    assert calls.total("gelu_fwd") == 1


class SiLU(torch.nn.Module):
    """Not what its name says."""

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: GluMlp(24, 40), "its act is Sigmoid, neither SiLU nor GELU"),
        (lambda: GluMlp(24, 40, act_layer=SiLU), "its act is SiLU, neither"),
        (lambda: GluMlp(24, 40, act_layer=torch.nn.SiLU, use_conv=True), "it is convolutional"),
        (lambda: SwiGLU(24, 40, act_layer=torch.nn.Mish), "its act is Mish, neither"),
    ],
    ids=["sigmoid", "impostor", "convolutional", "mish"],
)
def test_refused(make, reason):
    report = vitkit.patch(make())
    assert not replaced(report) and reason in report.skipped[0].reason


def test_refused_spelled_out_gelu():
    activations = pytest.importorskip("transformers.activations")
    report = vitkit.patch(activations.GELUActivation(use_gelu_python=True))
    assert not report.replaced and "spells GELU out" in report.skipped[0].reason
    assert kind_of(activations.GELUActivation(use_gelu_python=True)) is None
    assert kind_of(activations.GELUTanh()) == "gelu_tanh"


def test_a_hook_on_the_activation_is_run():
    for module in (SwiGLU(24, 20), SwiGLUPacked(24, 40)):
        vitkit.patch(module)
        seen = []
        handle = module.act.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.shape))
        with KernelCalls() as calls:
            module(X)
        assert seen == [(2, 5, 20)] and calls.counts == {}
        handle.remove()
        with KernelCalls() as calls:
            module(X)
        assert calls.total("swiglu_fwd") == 1


def test_dropout_draws_the_same_numbers():
    assert_same_numbers(seeded(SwiGLUPacked(24, 40, drop=0.25)).train(), [X])


TWINS = {
    "swiglu": (lambda: SwiGLU(24, 20), lambda: vitkit.nn.SwiGLU(24, 20)),
    "swiglu_packed": (lambda: SwiGLUPacked(24, 40), lambda: vitkit.nn.SwiGLUPacked(24, 40)),
}


@pytest.mark.parametrize(("host", "twin"), TWINS.values(), ids=TWINS)
def test_modules_load_their_hosts_weights(host, twin):
    host, twin = seeded(host()), twin()
    twin.load_state_dict(host.state_dict())
    torch.testing.assert_close(twin(X), host(X))
    torch.testing.assert_close(twin.double()(X.double()), host.double()(X.double()))


def test_geglu_module_loads_diffusers_weights():
    activations = pytest.importorskip("diffusers.models.activations")
    host, twin = seeded(activations.GEGLU(24, 20)), vitkit.nn.GEGLU(24, 20)
    twin.load_state_dict(host.state_dict())
    torch.testing.assert_close(twin(X), host(X))


def test_rotary_embedding_is_dinov3s():
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = dinov3.DINOv3ViTConfig(hidden_size=64, num_attention_heads=2, patch_size=4)
    host = dinov3.DINOv3ViTRopePositionEmbedding(config).eval()
    ours = vitkit.nn.RotaryEmbedding2d(32)
    cos, sin = host(torch.zeros(1, 3, 12, 20))
    q, k = torch.randn(2, 2, 1 + 15, 2, 32)
    want = dinov3.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for got, expected in zip(ours(q, k, 3, 5), want, strict=True):
        torch.testing.assert_close(got, expected.transpose(1, 2))
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4, got 6"):
        vitkit.nn.RotaryEmbedding2d(6)
