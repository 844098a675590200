"""torch's MultiheadAttention, patched, and vitkit's own modules, changing backend."""

from __future__ import annotations

import pytest
import torch
from patching import assert_same_numbers, snapshot

import vitkit
from vitkit.verify import KernelCalls


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Attends(torch.nn.Module):
    """How models call it: outputs only."""

    def __init__(self, call, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(32, 2, **options)
        self.call = call

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.attention(x, context, context, need_weights=False, **self.call)[0]


X = randn(2, 7, 32)
LATER = torch.ones(7, 7, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CALLS = {
    "self": ({}, {"batch_first": True}, [X]),
    "tokens_first": ({}, {}, [X]),
    "no_bias": ({}, {"batch_first": True, "bias": False}, [X]),
    "context_of_other_width": (
        {}, {"batch_first": True, "kdim": 24, "vdim": 24}, [X, randn(2, 5, 24, seed=2)],
    ),
    "causal": ({"attn_mask": LATER, "is_causal": True}, {"batch_first": True}, [X]),
    "causal_and_padding": (
        {"attn_mask": LATER, "key_padding_mask": PADDING}, {"batch_first": True}, [X],
    ),
    "padding_as_numbers": (
        {"key_padding_mask": torch.where(PADDING, -5.0, 0.5)}, {"batch_first": True}, [X],
    ),
    "mask_for_heads": ({"attn_mask": randn(2 * 7, 2, 2)}, {}, [X]),
}  # fmt: skip


@pytest.mark.parametrize("call, options, inputs", CALLS.values(), ids=CALLS)
def test_multihead_attention(call, options, inputs):
    calls = assert_same_numbers(Attends(call, **options), inputs)
    assert calls.counts == {"flash_attention_fwd": {"cpu": 1}, "flash_attention_bwd": {"cpu": 1}}


def test_eval_without_gradients_is_the_same_as_torchs_fast_path():
    model = Attends({"key_padding_mask": PADDING}, batch_first=True).eval()
    with torch.no_grad():
        expected = model(X)
        with vitkit.patched(model), KernelCalls() as calls:
            torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    assert calls.total("flash_attention_fwd") == 1


def test_weights_dropout_and_single_samples_are_torchs():
    module = torch.nn.MultiheadAttention(32, 2, dropout=0.5, batch_first=True)
    with vitkit.patched(module) as report, KernelCalls() as calls:
        assert "where weights are asked for or dropout is active" in str(report)
        assert module.eval()(X, X, X)[1].shape == (2, 7, 7)
        assert module(X[0], X[0], X[0], need_weights=False)[0].shape == (7, 32)
        module.train()(X, X, X, need_weights=False)
    assert calls.counts == {}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"add_bias_kv": True}, "adds a key and value of its own"),
        ({"add_zero_attn": True}, "adds a key and value of its own"),
        ({"num_heads": 16}, "multiple of 8 up to 256, not 2"),
    ],
    ids=["bias_kv", "zero_attn", "odd_head_dim"],
)
def test_refused(options, reason):
    module = torch.nn.MultiheadAttention(**{"embed_dim": 32, "num_heads": 2, **options})
    assert reason in vitkit.patch(module).skipped[0].reason


def test_a_fast_path_past_the_attention_is_named():
    layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True).eval()
    report = vitkit.patch(layer, dry_run=True)
    assert [s.name for s in report.skipped] == [""] and "fast path" in report.skipped[0].reason
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), vitkit.patched(layer, strict=True), KernelCalls() as calls:
            layer(X)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert calls.total("flash_attention_fwd") == 1


def test_wrappers_of_known_attention_are_not_listed():
    class SomeAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.MultiheadAttention(32, 2)

    report = vitkit.patch(SomeAttention())
    assert report.skipped == [] and [r.name for r in report.replaced] == ["inner"]


def test_own_models_change_backend_and_back():
    model = vitkit.models.create("vit_s16", reduced=True, backend="reference").eval()
    before, x = snapshot(model), randn(1, 3, 48, 48)
    with torch.no_grad(), KernelCalls() as calls:
        expected = model(x)
        assert calls.counts == {}
        report = vitkit.patch(model)
        assert "(was on 'reference')" in str(report) and report.skipped == []
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert calls.total("flash_attention_fwd") == 2
    assert vitkit.patch(model).replaced == []
    assert vitkit.unpatch(model) == len(report.replaced) and snapshot(model) == before


def test_own_models_on_the_backend_asked_for_have_nothing_to_replace():
    model = vitkit.models.create("vit_s16", reduced=True)
    report = vitkit.patch(model)
    assert report.replaced == [] and report.skipped == []
    with pytest.raises(ValueError, match="strict"):
        vitkit.patch(model, strict=True)
