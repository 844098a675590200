"""The CUDA kernels of window_attention, run on the CPU by the emulator.

Emulated, not yet confirmed on hardware: see test_emulated_attention.py.
"""

from __future__ import annotations

import ctypes
import math

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
    Rows,
    check_parity,
    element,
    launch,
    load,
    params,
    poisoned,
)
from emulation import assert_order_changes_nothing, emulated, one_kernel
from numerics import eager_window_attention

from vitkit.ops.window_attention import reference


class WindowMap(ctypes.Structure):
    _fields_ = [
        *((n, INT) for n in ("batch", "heads", "height", "width", "rows", "columns")),
        ("window_height", INT),
        ("window_width", Divisor),
        ("shift_y", INT),
        ("shift_x", INT),
        ("ragged", BOOL),
        ("roll_first", BOOL),
        ("pads", P),
        ("pad_part", I64),
        ("pad_head", I64),
        ("dpads", P),
    ]


class WindowTerm(ctypes.Structure):
    _fields_ = [
        ("table", P),
        ("window_height", INT),
        ("window_width", Divisor),
        ("limit_y", INT),
        ("limit_x", INT),
        ("logit_scale", P),
        ("dlogit_scale", P),
        ("heads", INT),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("params", params(WindowMap, WindowTerm)),
        ("element", INT),
        ("window_width", INT),
        *((n, P) for n in ("dtable", "dlogit_scale", "dpads")),
        ("chunks", INT),
        ("seed", U64),
    ]


@pytest.fixture(scope="module")
def library():
    return load(emulated("window_attention", flags=("-shared",)), Call)


def part(qkv, i):
    """q, k or v of [B, H, W, 3, heads, D]"""
    return Rows(qkv[..., i, :, :].data_ptr(), qkv.stride(0), qkv.stride(2), qkv.stride(4))


def by_head(t, head_dim):
    """Of [B, H, W, heads * D]"""
    return Rows(t.data_ptr(), t.stride(0), t.stride(2), head_dim)


def prepare(tensors, window, shift, scale, roll_first):
    """A call without outputs; and the transposed table, which it points to."""
    qkv, table, logit_scale, pad = tensors
    batch, height, width, _, heads, head_dim = qkv.shape
    (wh, ww), (sh, sw) = window, shift
    grid = -(-height // wh), -(-width // ww)
    call = Call(element=element(qkv.dtype), window_width=ww, seed=1)
    p = call.params
    p.q, p.k, p.v = (part(qkv, i) for i in range(3))
    p.head_dim, p.scale = head_dim, scale * math.log2(math.e)
    p.lse_batch, p.lse_head = height * width * heads, 1
    ragged = height % wh != 0 or width % ww != 0
    p.map = WindowMap(batch, heads, height, width, *grid, wh, Divisor(), sh, sw, ragged, roll_first)
    if pad is not None:
        p.map.pads, p.map.pad_part, p.map.pad_head = pad.data_ptr(), heads * head_dim, head_dim
    turned = None if table is None else table.t().contiguous()
    p.term = WindowTerm(
        None if table is None else turned.data_ptr(), wh, Divisor(), grid[0] * wh - sh,
        grid[1] * ww - sw, None if logit_scale is None else logit_scale.data_ptr(), None, heads,
    )  # fmt: skip
    return call, turned


def run(library, tensors, window, shift, scale, roll_first, grad, chunks=0, seed=1):
    """out, lse, dqkv and the gradients of what is given of the table, logit_scale and pads"""
    qkv, table, logit_scale, pad = tensors
    *size, heads, head_dim = (*qkv.shape[:3], *qkv.shape[4:])
    call, _turned = prepare(tensors, window, shift, scale, roll_first)
    p = call.params
    call.chunks, call.seed = chunks, seed
    out, lse, dqkv = poisoned(grad), torch.full((*size, heads), torch.nan), poisoned(qkv)
    delta = poisoned(lse)
    p.out, p.grad = by_head(out, head_dim), by_head(grad, head_dim)
    p.dq, p.dk, p.dv = (part(dqkv, i) for i in range(3))
    p.lse, p.delta = lse.data_ptr(), delta.data_ptr()
    dtable, dlogit_scale = (None if t is None else poisoned(t) for t in (table, logit_scale))
    dpads = None if pad is None or not p.map.ragged else torch.full((heads, 2, head_dim), torch.nan)
    for name, t in (("dtable", dtable), ("dlogit_scale", dlogit_scale), ("dpads", dpads)):
        setattr(call, name, None if t is None else t.data_ptr())
    launch(library.emulated_forward, call)
    launch(library.emulated_backward, call)
    small = [t for t in (dtable, dlogit_scale) if t is not None]
    if pad is not None:
        dpad = torch.zeros(pad.shape)
        if dpads is not None:
            dpad[1:] = dpads.transpose(0, 1)
        small.append(dpad)
    return out, lse, dqkv, *small


def make(dtype, size, window, heads=1, head_dim=32, table=True, cosine=False, pad=True):
    """qkv, bias_table, logit_scale, pad_value"""
    torch.manual_seed(sum(size))
    return [
        torch.randn(*size, 3, heads, head_dim).to(dtype),
        torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads) if table else None,
        # One gain is above its bound, where it has no gradient.
        torch.linspace(1.5, 4.7, heads) if cosine else None,
        torch.randn(3, heads, head_dim).to(dtype) if pad else None,
    ]


def check(library, dtype, size, window, shift=(0, 0), roll_first=False, chunks=0, **options):
    """Forward and backward against float64."""
    tensors = make(dtype, size, window, **options)
    qkv, table, logit_scale, pad = tensors
    scale = 1.0 if logit_scale is not None else qkv.shape[-1] ** -0.5
    grad = torch.randn(*size, qkv.shape[4] * qkv.shape[5]).to(dtype)
    arguments = (window, shift, scale)

    def exact(*tensors):
        return reference(*tensors, *arguments, roll_first)

    def eager(*tensors):
        padding = "roll_then_pad" if roll_first else "pad_then_roll"
        return eager_window_attention(*tensors, *arguments, padding), exact(*tensors)[1]

    found = run(library, tensors, *arguments, roll_first, grad, chunks)
    names = ["out", "lse", "dqkv"]
    names += [n for n, t in zip(("table", "logit_scale", "pad"), tensors[1:], strict=True)
              if t is not None]  # fmt: skip
    terms = window[0] * window[1] * math.prod(size) + qkv.shape[-1]
    check_parity(
        names, found, exact, eager, tensors, [grad, None], dtype=dtype, terms=terms
    )  # fmt: skip


# (dtype, [B, H, W], window), options of check
CASES = {
    "swin": ((BF16, (1, 7, 14), (7, 7)), {"shift": (3, 3), "heads": 2, "chunks": 2, "pad": False}),
    "pad_then_roll": ((F16, (2, 5, 7), (4, 3)), {"shift": (2, 1), "heads": 2}),
    "roll_then_pad": ((FLOAT, (1, 6, 7), (4, 5)), {"shift": (1, 3), "roll_first": True}),
    "window_larger_than_map": ((BF16, (1, 2, 3), (5, 4)), {"shift": (4, 2), "roll_first": True}),
    "pads_of_zeros": ((BF16, (1, 3, 5), (3, 4)), {"pad": False, "table": False}),
    "several_tiles": ((BF16, (1, 12, 12), (12, 12)), {"shift": (6, 0), "pad": False}),
    "head_dim_88_in_slices": ((FLOAT, (1, 4, 5), (3, 3)), {"head_dim": 88}),
    "swin_v2": (
        (BF16, (1, 7, 12), (6, 6)), {"shift": (3, 0), "heads": 2, "cosine": True, "chunks": 2}
    ),
    "swin_v2_f32": ((FLOAT, (1, 5, 5), (4, 4)), {"cosine": True, "heads": 2, "head_dim": 16}),
    "swin_v2_f16_several_tiles": ((F16, (1, 9, 9), (9, 9)), {"cosine": True}),
    "one_place": ((BF16, (1, 2, 3), (1, 1)), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_window_attention(library, case):
    arguments, options = case
    check(library, *arguments, **options)


def test_emulated_rows_of_zeros_have_no_direction(library):
    """Norms are clamped. float16 cannot hold all of what the shortest rows are weighted by, nor
    their gradients; but there is no infinity times zero."""
    tensors = make(F16, (1, 4, 4), (4, 4), cosine=True, pad=False)
    tensors[0][:, 0, 0] = 0
    tensors[0][:, 1, 1] = 6e-8
    found = run(library, tensors, (4, 4), (0, 0), 1.0, False, torch.randn(1, 4, 4, 32).half())
    assert not any(t.isnan().any() for t in found)
    out, lse, dqkv, *_ = found
    dqkv[:, 0, 0] = dqkv[:, 1, 1] = 0
    assert all(t.isfinite().all() for t in (out, lse, dqkv))


def test_emulated_thread_order_changes_nothing(library):
    tensors = make(BF16, (1, 7, 9), (6, 6), cosine=True)
    grad = torch.randn(1, 7, 9, 32).bfloat16()
    assert_order_changes_nothing(
        lambda seed: run(library, tensors, (6, 6), (3, 2), 1.0, False, grad, 2, seed), (2, 3)
    )


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    broken = load(emulated("window_attention", csrc=csrc, flags=("-shared", *one_kernel(32))), Call)
    for name in ("swin", "pads_of_zeros", "window_larger_than_map", "swin_v2"):
        arguments, options = CASES[name]
        check(broken, *arguments, **options)
