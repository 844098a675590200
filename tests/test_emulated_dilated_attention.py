"""The CUDA kernels of dilated_attention, run on the CPU by the emulator.

Emulated, not yet confirmed on hardware: see test_emulated_attention.py.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated_attention import (
    BF16,
    BOOL,
    F16,
    FLOAT,
    I64,
    INT,
    U64,
    P,
    Rows,
    Tensors,
    element,
    launch,
    load,
    poisoned,
    rows,
)
from emulation import assert_order_changes_nothing, emulated, one_kernel
from numerics import assert_parity, double, eager_dilated_attention, gradients

from vitkit.ops.dilated_attention import branch_rows, reference


class Call(ctypes.Structure):
    _fields_ = [
        ("tensors", Tensors),
        ("parts", Rows),
        ("part_lse", P),
        ("delta", P),
        ("row_count", I64),
        *((n, INT) for n in ("batch", "heads", "tokens", "count")),
        ("lengths", I64 * 32),
        ("ratios", I64 * 32),
        ("torchscale", BOOL),
        ("element", INT),
        ("seed", U64),
    ]


@pytest.fixture(scope="module")
def library():
    return load(emulated("dilated_attention", flags=("-shared",)), Call)


def run(library, q, k, v, lengths, ratios, causal, scale, torchscale, grad, grad_lse, seed=1):
    """out, lse, dq, dk, dv"""
    batch, tokens, heads, _ = q.shape
    count = branch_rows(tokens, lengths, ratios, torchscale)
    out, parts = poisoned(q), torch.full((batch, count, heads, q.shape[-1]), torch.nan).to(q.dtype)
    lse = torch.full((batch, heads, tokens), torch.nan)
    part_lse, delta = (torch.full((batch, heads, count), torch.nan) for _ in range(2))
    # Without a branch that has every row, sums begin at zero.
    dq, dk, dv = (torch.full(q.shape, torch.nan if 1 in ratios else 0.0) for _ in range(3))
    call = Call(
        parts=rows(parts), part_lse=part_lse.data_ptr(), delta=delta.data_ptr(), row_count=count,
        batch=batch, heads=heads, tokens=tokens, count=len(lengths),
        lengths=(I64 * 32)(*lengths), ratios=(I64 * 32)(*ratios), torchscale=torchscale,
        element=element(q.dtype), seed=seed,
    )  # fmt: skip
    p = call.tensors
    p.set_inputs(q, k, v, causal, scale)
    p.set_grad_lse(grad_lse)
    p.out, p.grad, p.dq, p.dk, p.dv = map(rows, (out, grad, dq, dk, dv))
    p.lse = lse.data_ptr()
    launch(library.emulated_forward, call)
    part_lse.fill_(torch.nan)  # the gradient has its own
    launch(library.emulated_backward, call)
    return out, lse, *(t.to(q.dtype) for t in (dq, dk, dv))


def make(dtype, tokens, heads, head_dim, batch=1):
    """q, k, v, views of one tensor; grad, grad_lse"""
    torch.manual_seed(tokens)
    q, k, v = torch.randn(batch, tokens, 3, heads, head_dim).to(dtype).unbind(2)
    return q, k, v, torch.randn(q.shape).to(dtype), torch.randn(batch, heads, tokens)


def check(library, dtype, tokens, heads, branches, head_dim=32, causal=False, torchscale=False,
          scale=None, batch=1, together=False):  # fmt: skip
    """Forward and backward against float64. ``together`` measures the gradients as one vector: with
    a few slots all but rounding may cancel in dq and dk."""
    q, k, v, grad, grad_lse = make(dtype, tokens, heads, head_dim, batch)
    scale = head_dim**-0.5 if scale is None else scale
    options = (*branches, causal, scale, torchscale)
    found = run(library, q, k, v, *options, grad, grad_lse)
    tensors, cotangents = [q, k, v], [grad, grad_lse]
    want, want_grads = gradients(
        lambda *t: reference(*t, *options), double(*tensors), double(*cotangents)
    )
    near, near_grads = gradients(
        lambda *t: eager_dilated_attention(*t, *options), tensors, cotangents
    )
    empty = want[1] == -torch.inf
    assert torch.equal(found[1] == -torch.inf, empty)
    assert not found[0].transpose(1, 2)[empty].any()
    terms = sum(min(w, tokens) for w in branches[0]) * head_dim
    names = ["out", "lse", "dq", "dk", "dv"]
    results = [list(found), [*near, *near_grads], [*want, *want_grads]]
    if together:
        names[2:] = ["gradients"]
        for r in results:
            r[2:] = [torch.stack(r[2:])]
    for name, a, e, x in zip(names, *results, strict=True):
        a, e, x = (t.masked_fill(empty, 0) if name == "lse" else t for t in (a, e, x))
        assert_parity(name, a, e, x, dtype=dtype, terms=terms * len(branches[0]))


# (dtype, tokens, heads, (segment lengths, dilation ratios)), options of check
CASES = {
    "gigapath_like": ((BF16, 37, 4, ([8, 24, 64], [1, 2, 4])), {"batch": 2}),
    "drifting": ((BF16, 37, 3, ([5, 9, 13], [1, 2, 4])), {"torchscale": True}),
    "ratio_does_not_divide": ((F16, 29, 3, ([5, 9, 13], [1, 2, 4])), {"causal": True}),
    "drifting_causal": ((FLOAT, 23, 3, ([5, 9], [1, 4])), {"torchscale": True, "causal": True}),
    "rows_no_branch_covers": ((FLOAT, 37, 3, ([12, 20], [2, 3])), {"head_dim": 88}),
    "ratio_above_heads_and_segment": ((BF16, 37, 2, ([3, 16], [5, 8])), {}),
    "segments_longer_than_a_tile": ((F16, 150, 1, ([150, 40], [1, 1])), {"head_dim": 24}),
    "negative_scale": ((BF16, 20, 2, ([6, 12], [1, 2])), {"scale": -0.2}),
    "one_token": ((FLOAT, 1, 2, ([4], [2])), {"together": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_dilated_attention(library, case):
    arguments, options = case
    check(library, *arguments, **options)


def test_emulated_thread_order_changes_nothing(library):
    tensors = make(BF16, 37, 3, 32)
    options = ([5, 16, 37], [1, 2, 4], False, 0.2, True)
    assert_order_changes_nothing(
        lambda seed: run(library, *tensors[:3], *options, *tensors[3:], seed=seed), (2, 3)
    )


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    broken = load(
        emulated("dilated_attention", csrc=csrc, flags=("-shared", *one_kernel(32))), Call
    )
    for name in ("gigapath_like", "drifting", "ratio_above_heads_and_segment"):
        arguments, options = CASES[name]
        check(broken, *arguments, **options)
