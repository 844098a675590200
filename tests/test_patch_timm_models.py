"""The attention modules that timm's models bring themselves, patched: their options, and the calls
that stay timm's."""

from __future__ import annotations

import pytest
import torch
from patching import assert_same_numbers

import vitkit
from vitkit.verify import KernelCalls

timm = pytest.importorskip("timm")
from timm.layers import (  # noqa: E402
    AttentionPool2d,
    AttentionPoolPrr,
    RelPosMlp,
    RotAttentionPool2d,
)
from timm.models.beit import Attention as Beit  # noqa: E402
from timm.models.eva import EvaAttention  # noqa: E402
from timm.models.vision_transformer_relpos import RelPosAttention  # noqa: E402
from timm.models.vision_transformer_sam import Attention as Sam  # noqa: E402

LayerNorm = torch.nn.LayerNorm


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def rel_pos_mlp(num_heads, **kwargs):
    return RelPosMlp(window_size=(4, 4), num_heads=num_heads, prefix_tokens=1, hidden_dim=16)


def rope_of_sam():
    return timm.layers.RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[4, 6])


TOKENS, MAP, BIAS, ROPE = randn(2, 17, 32), randn(2, 4, 6, 32), randn(1, 2, 17, 17), randn(16, 32)
VARIANTS = {
    "beit_own_and_shared_positions": (
        lambda **o: Beit(32, 2, qkv_bias=True, window_size=(4, 4), **o), [TOKENS, BIAS],
    ),
    "beit_separate_bias": (
        lambda **o: Beit(32, 2, qkv_bias=True, qkv_bias_separate=True, **o), [TOKENS, BIAS],
    ),
    "beit_plain": (lambda **o: Beit(32, 2, **o), [TOKENS]),
    "eva_norms_and_gate": (
        lambda **o: EvaAttention(32, 2, norm_layer=LayerNorm, qk_norm=True, gated=True, **o),
        [TOKENS, ROPE],
    ),
    "eva_separate_projections_rotate_half": (
        lambda **o: EvaAttention(
            32, 2, qkv_fused=False, rotate_half=True, scale_norm=False, **o
        ),
        [TOKENS, ROPE],
    ),
    "sam_positions": (lambda **o: Sam(32, 2, use_rel_pos=True, input_size=(4, 6), **o), [MAP]),
    "sam_other_size": (lambda **o: Sam(32, 2, use_rel_pos=True, input_size=(7, 7), **o), [MAP]),
    "sam_rotary": (lambda **o: Sam(32, 2, qk_norm=True, rope=rope_of_sam(), **o), [MAP]),
    "relpos_own": (lambda **o: RelPosAttention(32, 2, rel_pos_cls=rel_pos_mlp, **o), [TOKENS]),
    "relpos_shared": (lambda **o: RelPosAttention(32, 2, qk_norm=True, **o), [TOKENS, BIAS]),
}  # fmt: skip


@pytest.mark.parametrize("make, inputs", VARIANTS.values(), ids=VARIANTS)
def test_variants(make, inputs):
    calls = assert_same_numbers(seeded(make()), inputs)
    assert sum(calls.total(f"flash_attention{s}_fwd") for s in ("", "_decomposed")) == 1


@pytest.mark.parametrize(
    "make, inputs", [v for n, v in VARIANTS.items() if "plain" in n or "own" in n or "norms" in n]
)
def test_active_dropout_and_hooks_on_weights_run_the_host(make, inputs):
    module = seeded(make(attn_drop=0.5)).train()
    torch.manual_seed(5)
    expected = module(*inputs)
    with vitkit.patched(module) as report, KernelCalls() as calls:
        assert "timm's own forward while attention dropout is active" in str(report)
        torch.manual_seed(5)
        torch.testing.assert_close(module(*inputs), expected)
        module.eval().attn_drop.register_forward_hook(lambda *_: None)
        module(*inputs)
    assert calls.counts.keys() <= {"gelu_fwd"}


def test_both_kinds_of_positions_are_timms_affair():
    module = seeded(RelPosAttention(32, 2, rel_pos_cls=rel_pos_mlp))
    vitkit.patch(module)
    with KernelCalls() as calls:
        module(TOKENS, BIAS)
    assert calls.total("flash_attention_fwd") == 0


POOLS = {
    "class_token": lambda: AttentionPool2d(32, feat_size=4, head_dim=16, class_token=True),
    "all_rows": lambda: AttentionPool2d(32, feat_size=4, head_dim=16, pool_type=""),
    "resampled": lambda: AttentionPool2d(32, feat_size=7, head_dim=16, qkv_separate=True),
    "rotary": lambda: RotAttentionPool2d(32, ref_feat_size=4, head_dim=16),
    "rotary_mrope": lambda: RotAttentionPool2d(32, head_dim=16, rope_type="mrope", pool_type=""),
}


@pytest.mark.parametrize("pre_logits", [False, True], ids=["", "pre_logits"])
@pytest.mark.parametrize("make", POOLS.values(), ids=POOLS)
def test_pooling_of_maps(make, pre_logits):
    calls = assert_same_numbers(seeded(make()), [randn(2, 32, 4, 4)], {"pre_logits": pre_logits})
    assert calls.total("flash_attention_fwd") == 1


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_pooling_without_projections(pool):
    assert_same_numbers(AttentionPoolPrr(32, 2, pool_type=pool, post_norm=True), [TOKENS])


def test_pooling_shows_every_row_to_who_watches_or_drops():
    module = seeded(AttentionPool2d(32, feat_size=4, head_dim=16, drop_rate=0.5))
    x = randn(2, 32, 4, 4)
    torch.manual_seed(5)
    expected = module.train()(x)
    seen = []
    with vitkit.patched(module):
        torch.manual_seed(5)
        torch.testing.assert_close(module(x), expected)
        module.eval()
        module.proj.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        module(x)
    assert seen == [(2, 17, 32)]


def test_a_projection_of_which_only_the_weight_is_used_is_left():
    class Wrapped(torch.nn.Linear):
        pass

    for module in (Beit(32, 2, qkv_bias=True), EvaAttention(32, 2, scale_norm=False)):
        module.qkv.__class__ = Wrapped
        report = vitkit.patch(module)
        assert "its qkv is a Wrapped, of which timm uses the weight only" in str(report)


def test_low_precision_keeps_the_tolerance():
    for make, inputs in (VARIANTS["sam_positions"], VARIANTS["eva_norms_and_gate"]):
        module = seeded(make()).to(torch.bfloat16)
        assert vitkit.verify(module, *(t.to(torch.bfloat16) for t in inputs), seconds=0).ok
        with vitkit.patched(module.float()), torch.autocast("cpu"), KernelCalls() as calls:
            module(*inputs)
        assert sum(calls.total(op) for op in calls.counts if op.startswith("flash")) == 1
