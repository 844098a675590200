"""torch's signature on vitkit's kernels, and vitkit's kernels under torch's own function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_parity
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitkit
from vitkit.compat import torch_flash

EXACT = SDPBackend.MATH


def both(q, k, v, **options):
    """(ours, torch's in the dtype, torch's in float64), each an output and all gradients."""
    results = []
    for function, double in (
        (vitkit.scaled_dot_product_attention, False),
        (F.scaled_dot_product_attention, False),
        (F.scaled_dot_product_attention, True),
    ):
        leaves = {"query": q, "key": k, "value": v}
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            leaves["attn_mask"] = mask
        leaves = {
            n: (t.double() if double else t).detach().requires_grad_() for n, t in leaves.items()
        }
        given = options | leaves
        with sdpa_kernel(EXACT):
            out = function(**given)
        torch.manual_seed(1)
        grad = torch.randn(out.shape).to(q.dtype).to(out.dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), grad)
        # As one vector: that of a single key's score is exactly 0.
        results.append([out.detach(), torch.cat([g.flatten() for g in grads])])
    return results


def check(q, k, v, **options):
    for ours, eager, exact in zip(*both(q, k, v, **options), strict=True):
        assert ours.shape == exact.shape and ours.dtype == eager.dtype
        assert_parity(str(options), ours, eager, exact, terms=k.shape[-2] * q.shape[-1])


def qkv(*shape, keys=None, width=None, dtype=torch.float32):
    torch.manual_seed(0)
    keys = (*shape[:-2], keys or shape[-2], shape[-1])
    q, k = torch.randn(shape, dtype=dtype), torch.randn(keys, dtype=dtype)
    return q, k, torch.randn(*keys[:-1], width or shape[-1], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((2, 3, 17, 16), {}, id="self_attention"),
        pytest.param((2, 3, 17, 16), {"keys": 9}, id="cross_attention"),
        pytest.param((2, 3, 17, 16), {"width": 24}, id="wide_values"),
        pytest.param((2, 3, 17, 16), {"width": 8}, id="narrow_values"),
        pytest.param((3, 17, 16), {}, id="no_batch"),
        pytest.param((17, 16), {}, id="one_head"),
        pytest.param((2, 2, 3, 17, 16), {}, id="two_batch_dimensions"),
        pytest.param((2, 3, 5, 20), {}, id="odd_head_dim"),
        pytest.param((2, 3, 1, 16), {}, id="one_token"),
    ],
)
def test_shapes(shape, options, dtype):
    check(*qkv(*shape, **options, dtype=dtype))


@pytest.mark.parametrize(
    "shape", [(2, 3, 17, 17), (17, 17), (2, 1, 1, 17), (1, 3, 17, 17)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shape, kind):
    q, k, v = qkv(2, 3, 17, 16)
    mask = torch.randn(shape)
    check(q, k, v, attn_mask=mask > -0.5 if kind == "bool" else mask)


def test_masks_of_more_dimensions():
    q, k, v = qkv(2, 2, 3, 17, 16)
    check(q, k, v, attn_mask=torch.randn(2, 1, 3, 17, 17))
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to .* got \(5, 17, 17\)"):
        vitkit.scaled_dot_product_attention(q, k, v, attn_mask=torch.randn(5, 17, 17))


def test_causal_scale_and_groups_of_heads():
    q, k, v = qkv(2, 6, 17, 16)
    check(q, k, v, is_causal=True)
    check(q, k[..., :9, :], v[..., :9, :], is_causal=True, scale=0.3)
    check(q, k[:, :2], v[:, :2], enable_gqa=True)


def test_rows_without_keys_are_zero():
    q, k, v = qkv(1, 2, 5, 16)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    out = vitkit.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert out[:, :, 2].eq(0).all() and out.isfinite().all()


def test_compiles_in_one_graph():
    q, k, v = qkv(2, 3, 17, 16)
    compiled = torch.compile(vitkit.scaled_dot_product_attention, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), vitkit.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p must be 0"),
        ({"key": None}, "key must be a tensor, got NoneType"),
        ({"key": torch.randn(3, 17, 16)}, "key must have at least 2 dimensions, as many as query"),
        ({"attn_mask": [1]}, "attn_mask must be a tensor, got list"),
        ({"key": torch.randn(2, 4, 17, 16), "enable_gqa": True}, "key must have a number of heads"),
        ({"backend": "nonsense"}, "backend must be one of"),
    ],
)
def test_bad_input(change, message):
    q, k, v = qkv(2, 3, 17, 16)
    with pytest.raises((TypeError, ValueError), match=message):
        vitkit.scaled_dot_product_attention(**({"query": q, "key": k, "value": v} | change))


# ---- as torch's own flash attention ----


@pytest.fixture
def activated():
    torch_flash.register()
    torch.nn.attention.activate_flash_attention_impl("vitkit")
    assert torch.nn.attention.current_flash_attention_impl() == "vitkit"
    yield
    torch.nn.attention.restore_flash_attention_impl()


def forward_and_backward(q, k, v, **options):
    """Output and gradients, and how often which of our kernels ran."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.profiler.profile() as profile:
        out = F.scaled_dot_product_attention(*leaves, **options)
        grads = torch.autograd.grad(out.sum() + (out * out).sum(), leaves)
    events = profile.key_averages()
    calls = {e.key: e.count for e in events if e.key.startswith("vitkit::")}
    return [out.detach(), *grads], calls


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}], ids=str)
def test_torch_runs_on_our_kernels(activated, options):
    tensors = qkv(2, 3, 40, 16)
    found, calls = forward_and_backward(*tensors, **options)
    assert calls == {"vitkit::flash_attention_fwd": 1, "vitkit::flash_attention_bwd": 1}
    torch.nn.attention.restore_flash_attention_impl()
    eager, none = forward_and_backward(*tensors, **options)
    exact, _ = forward_and_backward(*(t.double() for t in tensors), **options)
    assert none == {}
    for mine, theirs, truth in zip(found, eager, exact, strict=True):
        assert_parity(str(options), mine, theirs, truth, terms=40 * 16)


def test_what_we_have_no_kernel_for_goes_to_torch(activated):
    for tensors in (qkv(2, 3, 40, 20), [t.double() for t in qkv(2, 3, 40, 16)]):
        found, calls = forward_and_backward(*tensors)
        assert calls == {}
        with sdpa_kernel(EXACT):
            exact, _ = forward_and_backward(*tensors)
        for mine, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_torch_without_the_registry_is_told_so(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match="has no register_flash_attention_impl"):
        torch_flash.register()
