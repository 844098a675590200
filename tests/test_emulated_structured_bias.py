"""The CUDA attention kernels with decomposed and distance biases, run on the CPU by the emulator.

Emulated, not yet confirmed on hardware: see test_emulated_attention.py.
"""

from __future__ import annotations

import ctypes
import random

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
    Divisor,
    P,
    SequenceMap,
    check_parity,
    element,
    launch,
    load,
    params,
    poisoned,
    rows,
)
from emulation import emulated, one_kernel
from numerics import eager_attention

from vitkit.ops.flash_attention import reference
from vitkit.score_bias import DecomposedBias, DistanceBias


class DecomposedTerm(ctypes.Structure):
    _fields_ = [
        ("rel_h", P),
        ("rel_w", P),
        ("element", INT),
        *((f"{t}_{n}", I64) for t in "hw" for n in ("batch", "head", "query")),
        ("height", INT),
        ("width", Divisor),
    ]


class DistanceTerm(ctypes.Structure):
    _fields_ = [
        *((n, P) for n in ("slopes", "q", "k")),
        *((n, I64) for n in ("q_batch", "k_batch")),
    ]


class StructuredTerm(ctypes.Structure):
    _fields_ = [
        ("is_distance", BOOL),
        ("decomposed", DecomposedTerm),
        ("distance", DistanceTerm),
        *((n, P) for n in ("drel_h", "drel_w", "sums", "dslopes")),
        ("heads", INT),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("params", params(SequenceMap, StructuredTerm)),
        ("element", INT),
        ("dslopes", P),
        ("apart", BOOL),
        ("seed", U64),
    ]


@pytest.fixture(scope="module")
def library():
    return load(emulated("structured_bias", flags=("-shared",)), Call)


def set_term(term, bias):
    term.heads = (bias.rel_h if isinstance(bias, DecomposedBias) else bias.slopes[None]).shape[1]
    term.decomposed.width = Divisor.of(1)
    if isinstance(bias, DecomposedBias):
        term.decomposed = DecomposedTerm(
            bias.rel_h.data_ptr(), bias.rel_w.data_ptr(), element(bias.rel_h.dtype),
            *bias.rel_h.stride()[:3], *bias.rel_w.stride()[:3], bias.rel_h.shape[3],
            Divisor.of(bias.rel_w.shape[3]),
        )  # fmt: skip
    else:
        term.is_distance = True
        coords = (bias.coords_q, bias.coords_k)
        strides = (t.stride(0) * (len(t) > 1) for t in coords)
        term.distance = DistanceTerm(*(t.data_ptr() for t in (bias.slopes, *coords)), *strides)


def run(library, q, k, v, bias, causal, scale, grad, grad_lse, apart=False, seed=1):
    """out, lse, dq, dk, dv and the gradients of the bias"""
    batch, n_q, heads, _ = q.shape
    out, lse = poisoned(q), torch.full((batch, heads, n_q), torch.nan)
    delta, dq, dk, dv = map(poisoned, (lse, q, k, v))
    call = Call(seed=seed, element=element(q.dtype), apart=apart)
    p = call.params
    p.tensors.set_inputs(q, k, v, causal, scale)
    p.tensors.set_grad_lse(grad_lse)
    p.out, p.grad, p.dq, p.dk, p.dv = map(rows, (out, grad, dq, dk, dv))
    p.lse, p.delta, p.lse_batch, p.lse_head = lse.data_ptr(), delta.data_ptr(), heads * n_q, n_q
    p.map = SequenceMap(batch, heads, n_q, k.shape[1], 1)
    set_term(p.term, bias)
    if isinstance(bias, DecomposedBias):
        terms = [poisoned(bias.rel_h), poisoned(bias.rel_w)]
        p.term.drel_h, p.term.drel_w = (t.data_ptr() for t in terms)
    else:
        terms = [poisoned(bias.slopes)]
        call.dslopes = terms[0].data_ptr()
    launch(library.emulated_forward, call)
    launch(library.emulated_backward, call)
    return out, lse, dq, dk, dv, *terms


def check(library, dtype, n_q, grid, head_dim, heads=1, batch=1, causal=False, rel=None,
          apart=False):  # fmt: skip
    """Forward and backward against float64. ``grid``: (Kh, Kw), or the keys of a DistanceBias."""
    torch.manual_seed(n_q)
    keys = grid if isinstance(grid, int) else grid[0] * grid[1]
    q, grad = (torch.randn(batch, n_q, heads, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, keys, heads, head_dim).to(dtype) for _ in range(2))
    grad_lse = torch.randn(batch, heads, n_q)
    scale = head_dim**-0.5
    if isinstance(grid, int):
        # Of two images; the first token has no place.
        coords = [torch.randint(0, 20, (batch, n, 2)).float() for n in (n_q, keys)]
        for c in coords:
            c[:, 0] = torch.nan
        term = [torch.rand(heads) * 0.3 + 0.1]

        def bias(slopes):
            return DistanceBias(slopes, *(c.to(slopes.dtype) for c in coords))

        names = ("slopes",)
    else:
        # Rows of the two lie in one tensor, as one product leaves them.
        both = torch.randn(batch, n_q, heads, sum(grid)).to(rel or dtype).transpose(1, 2)
        term, bias, names = list(both.split(grid, 3)), DecomposedBias, ("rel_h", "rel_w")

    def exact(q, k, v, *term):
        return reference(q, k, v, bias(*term), None, None, causal, scale)

    def eager(q, k, v, *term):
        dense = bias(*term).dense().to(q.dtype)
        return eager_attention(q, k, v, dense, causal, scale), exact(q, k, v, *term)[1]

    found = run(library, q, k, v, bias(*term), causal, scale, grad, grad_lse, apart)
    check_parity(
        ("out", "lse", "dq", "dk", "dv", *names), found, exact, eager, [q, k, v, *term],
        [grad, grad_lse], dtype=dtype, terms=keys * n_q + head_dim,
    )  # fmt: skip


# (dtype, queries, (Kh, Kw) or keys, head dim), options of check
CASES = {
    "grid": ((BF16, 37, (7, 11), 32), {"batch": 2, "heads": 2}),
    "grid_rows_longer_than_a_tile": ((F16, 21, (2, 40), 24), {"rel": FLOAT, "causal": True}),
    "grid_of_one_column": ((FLOAT, 70, (37, 1), 32), {}),
    "grid_sums_in_global_memory": ((BF16, 70, (5, 13), 32), {"apart": True}),
    "distances": ((BF16, 37, 71, 32), {"batch": 2, "heads": 2}),
    "distances_f32_causal": ((FLOAT, 70, 37, 88), {"causal": True}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_structured_bias(library, case):
    arguments, options = case
    check(library, *arguments, **options)


def test_division_by_a_product(library):
    """Of the smallest and largest dividends of every quotient it could miss."""
    draw = random.Random(0)
    divisors = [*range(1, 70), 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1]
    for d in [*divisors, *(draw.randrange(1, 2 ** draw.randint(1, 31)) for _ in range(300))]:
        most = (2**31 - 1) // d
        for quotient in (0, 1, most, draw.randint(0, most)):
            for n in (quotient * d - 1, quotient * d, quotient * d + d - 1):
                if 0 <= n < 2**31:
                    assert library.emulated_divide(n, d) == n // d


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    broken = load(emulated("structured_bias", csrc=csrc, flags=("-shared", *one_kernel(32))), Call)
    for name in ("grid", "grid_sums_in_global_memory", "distances"):
        arguments, options = CASES[name]
        check(broken, *arguments, **options)
