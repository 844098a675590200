"""Swin blocks of timm and torchvision, patched, and those of transformers, compared: numbers,
gradients, kernels called, nothing rolled, padded or partitioned."""

from __future__ import annotations

import pytest
import torch
from patching import assert_same_numbers, replaced
from torch.utils._python_dispatch import TorchDispatchMode

import vitkit
from vitkit import nn

timm = pytest.importorskip("timm")
from timm.models.swin_transformer import SwinTransformerBlock  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2Block  # noqa: E402


def seeded(module, seed=0):
    """Every parameter drawn anew: tables and biases that start at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * 0.2
            p.copy_(2.0 + noise if "logit_scale" in name else noise)
    return module


def feature_map(height, width, dim=32, batch=2):
    return torch.randn(batch, height, width, dim, generator=torch.Generator().manual_seed(1))


def timm_block(cls, resolution, window=7, shift=3, **options):
    return seeded(cls(32, resolution, num_heads=2, window_size=window, shift_size=shift, **options))


# Beside them a block's MLP runs vitkit's gelu.
ATTENDED = {"window_attention_fwd": {"cpu": 1}, "window_attention_bwd": {"cpu": 1}}
MAPS = {
    "divisible": (14, 21),
    "ragged": (20, 20),
    "ragged_rectangle": (13, 17),
    "one_axis_is_a_window": (7, 14),
    "window": (7, 7),
    "smaller_than_the_window": (5, 6),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shift", [0, 3], ids=["", "shifted"])
@pytest.mark.parametrize("size", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("cls", [SwinTransformerBlock, SwinTransformerV2Block], ids=["v1", "v2"])
def test_timm_blocks(cls, size, shift, training):
    block = timm_block(cls, size, shift=shift).train(training)
    calls = assert_same_numbers(block, [feature_map(*size)])
    assert calls.counts.items() >= ATTENDED.items()


@pytest.mark.parametrize(
    "options",
    [{"always_partition": True}, {"dynamic_mask": True}, {"qkv_bias": False}],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("cls", [SwinTransformerBlock, SwinTransformerV2Block], ids=["v1", "v2"])
def test_timm_options(cls, options):
    size = (10, 12)
    calls = assert_same_numbers(timm_block(cls, size, **options), [feature_map(*size)])
    assert calls.total("window_attention_fwd") == 1


def test_timm_v2_pretrained_window():
    block = timm_block(SwinTransformerV2Block, (16, 16), 8, 4, pretrained_window_size=6)
    assert_same_numbers(block, [feature_map(16, 16)])


def torchvision_attention(version, shift, window=(7, 7), **options):
    swin = pytest.importorskip("torchvision").models.swin_transformer
    cls = swin.ShiftedWindowAttention if version == 1 else swin.ShiftedWindowAttentionV2
    return seeded(cls(32, list(window), list(shift), 2, **options))


@pytest.mark.parametrize("shift", [(0, 0), (3, 3)], ids=["", "shifted"])
@pytest.mark.parametrize("size", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("version", [1, 2])
def test_torchvision_attention(version, size, shift):
    calls = assert_same_numbers(torchvision_attention(version, shift), [feature_map(*size)])
    assert calls.counts.items() >= ATTENDED.items()


@pytest.mark.parametrize("version", [1, 2])
def test_torchvision_without_bias(version):
    module = torchvision_attention(version, (3, 3), qkv_bias=False, proj_bias=False)
    assert_same_numbers(module, [feature_map(13, 17)])


def test_the_hosts_differ_where_the_window_does_not_divide_the_map():
    """And each gets its own answer: timm rolls before it pads, torchvision after."""
    block = timm_block(SwinTransformerBlock, (20, 20))
    other = torchvision_attention(1, (3, 3))
    state = block.attn.state_dict()
    other.load_state_dict(state | {"relative_position_index": other.relative_position_index})
    x = feature_map(20, 20)
    with torch.no_grad():
        assert (block._attn(x) - other(x)).abs().max() > 1e-2
        for module, call in ((block, block._attn), (other, other)):
            before = call(x)
            with vitkit.patched(module):
                after = module._attn(x) if module is block else module(x)
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def host_attention(cls, window, shift, height, width):
    """(transformers' layer, qkv weight and bias, its options of window_attention)"""
    transformers = pytest.importorskip("transformers")
    if cls == "SwinLayer":
        from transformers.models.swin.modeling_swin import SwinLayer as Layer

        config = transformers.SwinConfig(window_size=window, num_heads=[2], embed_dim=32)
    else:
        from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer as Layer

        config = transformers.Swinv2Config(window_size=window, num_heads=[2], embed_dim=32)
    config._attn_implementation = "eager"
    kwargs = {"drop_path_rate": 0.0, "shift_size": shift}
    return seeded(Layer(config, 32, (height, width), 2, **kwargs)).eval()


@pytest.mark.parametrize("size", [(14, 14), (20, 20), (13, 17)], ids=str)
@pytest.mark.parametrize("version", ["SwinLayer", "Swinv2Layer"])
def test_transformers_layers(version, size):
    """The op with the layer's weights, in place of its attention: the whole layer's output."""
    window, shift = 7, 3
    layer = host_attention(version, window, shift, *size)
    x = torch.randn(2, size[0] * size[1], 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer(x, size)
        expected = expected[0] if isinstance(expected, tuple) else expected
        actual = _layer_on_op(layer, x, size, window, shift, version == "Swinv2Layer")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def _projection(attention, *names):
    """The first of the names that exists: transformers renamed them in version 5."""
    parts = [attention, getattr(attention, "self", attention)]
    return next(getattr(p, n) for n in names for p in parts if hasattr(p, n))


def _layer_on_op(layer, x, size, window, shift, cosine):
    m = layer.attention
    q, k, v = (_projection(m, f"{n[0]}_proj", n) for n in ("query", "key", "value"))
    normed = x if cosine else layer.layernorm_before(x)
    qkv = torch.stack([p(normed) for p in (q, k, v)], 2).view(2, *size, 3, 2, 16)
    pad = torch.stack([p(torch.zeros(32)) for p in (q, k, v)]).view(3, 2, 16)
    options = {}
    if cosine:
        inner = getattr(m, "self", m)
        mlp = inner.continuous_position_bias_mlp(inner.relative_coords_table)
        options["bias_table"] = 16 * torch.sigmoid(mlp.view(-1, 2))
        options["logit_scale"] = inner.logit_scale.flatten()
    else:
        bias = _projection(m, "relative_position_bias", "relative_position_bias_table")
        options["bias_table"] = getattr(bias, "relative_position_bias_table", bias)
    out = vitkit.window_attention(
        qkv, window_size=window, shift_size=shift, pad_value=pad, **options
    ).view(2, -1, 32)
    dense = getattr(getattr(m, "output", None), "dense", None)
    out = (dense if dense is not None else m.o_proj)(out)
    if cosine:
        x = x + layer.layernorm_before(out)
        return x + layer.layernorm_after(layer.output(layer.intermediate(x)))
    x = x + out
    return x + _mlp(layer, layer.layernorm_after(x))


def _mlp(layer, x):
    return layer.mlp(x) if hasattr(layer, "mlp") else layer.output(layer.intermediate(x))


class Ops(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


FORBIDDEN = ("roll", "pad", "clone", "copy_", "index", "softmax", "contiguous", "cat")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_nothing_is_rolled_padded_or_partitioned(name):
    """Of a whole patched Swin, the attention of every block; the unpatched one does all of it."""
    size = 224 if "224" in name else 256
    model = timm.create_model(name, depths=(2, 2), embed_dim=32, num_heads=(2, 4), num_classes=3)
    blocks = [m for m in model.eval().modules() if hasattr(m, "_attn")]
    resolution = size // 4
    x = torch.randn(1, resolution, resolution, 32)
    with torch.no_grad(), Ops() as before:
        blocks[1]._attn(x)
    assert any("roll" in n for n in before.names) and any("clone" in n for n in before.names)
    with vitkit.patched(model) as report:
        attentions = [r for r in report.replaced if r.by == "window_attention"]
        assert len(attentions) == len(blocks) == 4 and not report.skipped, report
        with torch.no_grad(), Ops() as after:
            blocks[1]._attn(x)
            model(torch.randn(1, 3, size, size))
        allowed = ("cat",) if name.startswith("swinv2") else ()  # of the three biases
        attention = Ops()
        with torch.no_grad(), attention:
            blocks[1]._attn(x)
    bad = [n for n in attention.names if any(f in n for f in FORBIDDEN if f not in allowed)]
    assert not bad, bad
    assert sum("window_attention_fwd" in n for n in after.names) == len(blocks) + 1


def test_torchvision_model():
    models = pytest.importorskip("torchvision").models
    for factory, kinds in ((models.swin_t, 12), (models.swin_v2_t, 12)):
        model = factory(weights=None).eval()
        report = vitkit.patch(model, dry_run=True)
        assert sum(r.by == "window_attention" for r in report.replaced) == kinds, report


def test_hooks_and_dropout_get_the_host():
    """Whoever watches the windows, or drops of them, still does."""
    block = timm_block(SwinTransformerBlock, (14, 14), attn_drop=0.5)
    seen = []
    vitkit.patch(block)
    x = feature_map(14, 14)
    torch.manual_seed(0)
    actual = block.train()(x)
    torch.manual_seed(0)
    vitkit.unpatch(block)
    torch.testing.assert_close(actual, block(x))  # the same draws; gelu is vitkit's in one of them
    block.eval()
    vitkit.patch(block)
    handle = block.attn.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    block(x)
    handle.remove()
    assert seen == [(8, 49, 32)]


def test_subclassed_attention_is_left():
    class Other(type(timm_block(SwinTransformerBlock, (14, 14)).attn)):
        pass

    block = timm_block(SwinTransformerBlock, (14, 14))
    block.attn.__class__ = Other
    report = vitkit.patch(block)
    assert [r.name for r in replaced(report)] == ["norm1", "norm2", "mlp.act"]
    assert "may compute something else" in str(report)


@pytest.mark.parametrize("shift", [0, 2])
def test_modules_load_the_hosts_parameters(shift):
    block = timm_block(SwinTransformerBlock, (8, 12), 4, shift)
    mine = nn.WindowAttention(32, 2, 4, shift, padding="roll_then_pad")
    mine.load_state_dict(block.attn.state_dict())
    x = feature_map(8, 12)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), block._attn(x), rtol=1e-4, atol=1e-5)
    block = timm_block(SwinTransformerV2Block, (8, 12), 4, shift, pretrained_window_size=6)
    mine = nn.WindowAttentionV2(32, 2, 4, shift, padding="roll_then_pad", pretrained_window_size=6)
    mine.load_state_dict(block.attn.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(mine(x), block._attn(x), rtol=1e-4, atol=1e-5)
