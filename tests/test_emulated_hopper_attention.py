"""The forward pass of flash_attention on Hopper, run on the CPU by the emulator in tests/emulator.

Emulated, not yet confirmed on hardware: copies of boxes, barriers that count bytes, descriptors and
fragments of warpgroup products, by our reading of the PTX manual.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated_attention import (
    BF16,
    F16,
    INT,
    U64,
    SequenceMap,
    element,
    launch,
    load,
    params,
    poisoned,
    rows,
)
from emulation import assert_order_changes_nothing, emulated, one_kernel
from numerics import assert_parity, double, eager_attention

from vitkit.ops.flash_attention import reference


class NoTerm(ctypes.Structure):
    """An empty class, which takes a byte in C++."""

    _fields_ = [("nothing", ctypes.c_char)]


class Call(ctypes.Structure):
    _fields_ = [("params", params(SequenceMap, NoTerm)), ("element", INT), ("seed", U64)]


@pytest.fixture(scope="module")
def library():
    return load(emulated("hopper_attention", flags=("-shared",)), Call)


def run(library, q, k, v, causal=False, scale=None, seed=1):
    out = poisoned(q)
    batch, n_q, heads, head_dim = q.shape
    lse = torch.full((batch, heads, n_q), torch.nan)
    call = Call(seed=seed, element=element(q.dtype))
    p = call.params
    p.tensors.set_inputs(q, k, v, causal, head_dim**-0.5 if scale is None else scale)
    p.out = rows(out)
    p.lse, p.lse_batch, p.lse_head = lse.data_ptr(), heads * n_q, n_q
    p.map = SequenceMap(batch, heads, n_q, k.shape[1], 1)
    launch(library.emulated_forward, call)
    return out, lse


def make(dtype, batch, n_q, n_k, heads, head_dim, layout="dense"):
    torch.manual_seed(n_q * 1000 + n_k)
    if layout == "fused":  # views of one qkv tensor, as a Linear leaves them
        return list(torch.randn(batch, n_q, 3, heads, head_dim).to(dtype).unbind(2))
    shapes = [(batch, n, heads, head_dim) for n in (n_q, n_k, n_k)]
    if layout == "heads_first":
        return [torch.randn(b, h, n, d).to(dtype).transpose(1, 2) for b, n, h, d in shapes]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def check(library, tensors, causal=False, scale=None, seed=1):
    q, k, v = tensors
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    found = run(library, q, k, v, causal, scale, seed)
    want = reference(*double(q, k, v), None, None, None, causal, factor)
    _, near_lse = reference(q, k, v, None, None, None, causal, factor)
    near = eager_attention(q, k, v, None, causal, factor), near_lse
    for name, a, e, w in zip(("out", "lse"), found, near, want, strict=True):
        assert_parity(name, a, e, w, dtype=q.dtype, terms=k.shape[1] + q.shape[-1])


# (dtype, batch, n_q, n_k, heads, head_dim, layout), options of check
CASES = {
    "bf16_ragged_eight_steps": ((BF16, 1, 150, 900, 1, 64), {}),
    "one_query_one_key": ((F16, 1, 1, 1, 1, 64), {}),
    "f16_head_dim_72_of_qkv": ((F16, 1, 140, 140, 2, 72, "fused"), {}),
    "bf16_head_dim_80_heads_first": ((BF16, 2, 33, 130, 2, 80, "heads_first"), {}),
    "f16_head_dim_96": ((F16, 1, 65, 129, 2, 96), {}),
    "bf16_head_dim_88": ((BF16, 1, 20, 128, 2, 88), {}),
    "bf16_head_dim_128_of_qkv": ((BF16, 1, 129, 129, 2, 128, "fused"), {}),
    "causal": ((BF16, 1, 300, 300, 1, 64), {"causal": True}),
    "causal_fewer_keys": ((F16, 1, 200, 40, 1, 64), {"causal": True}),
    "negative_scale": ((F16, 1, 20, 133, 1, 64), {"scale": -0.2}),
    "zero_scale": ((BF16, 1, 20, 133, 1, 64), {"scale": 0.0}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_hopper_attention(library, case):
    arguments, options = case
    check(library, make(*arguments), **options)


def test_emulated_hopper_without_keys(library):
    q, k, v = make(BF16, 1, 3, 0, 1, 64)
    with pytest.raises(AssertionError, match="size that no map has"):
        run(library, q, k, v)


def test_emulated_hopper_refuses_what_no_copy_can_read(library):
    wide = torch.randn(1, 40, 1, 68).to(BF16)
    for q in (wide[..., :64], wide.flatten()[4 : 4 + 40 * 64].view(1, 40, 1, 64)):
        with pytest.raises(AssertionError, match="a tensor map of a"):
            run(library, q, q, q)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_emulated_hopper_thread_order_changes_nothing(library, head_dim):
    """Nor do the moments at which copies arrive."""
    tensors = make(BF16, 1, 70, 600, 1, head_dim)
    assert_order_changes_nothing(lambda seed: run(library, *tensors, seed=seed))


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    _try(csrc, 64, ("bf16_ragged_eight_steps", "causal"))


def catch_panels(csrc):
    """The same for rows that are longer than a swizzled line."""
    _try(csrc, 80, ("bf16_head_dim_80_heads_first",))


def _try(csrc, head_dim, cases):
    flags = ("-shared", *one_kernel(head_dim))
    broken = load(emulated("hopper_attention", csrc=csrc, flags=flags), Call)
    for name in cases:
        arguments, options = CASES[name]
        for seed in (1, 2):
            check(broken, make(BF16, *arguments[1:]), **options, seed=seed)
