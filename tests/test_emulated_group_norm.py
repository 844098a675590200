"""The CUDA group_norm_silu kernels, run on the CPU by the emulator in tests/emulator.

Emulated, not GPU-tested: index arithmetic, masks, reductions and barriers of the very file nvcc
compiles. Memory ordering, the compiler and speed need a GPU (``make gpu``).
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulation import assert_order_changes_nothing, emulated
from numerics import DTYPES, assert_parity, double, eager_group_norm, gradients

from vitkit.ops.group_norm_silu import reference

P, I64, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Small(ctypes.Structure):
    _fields_ = [("data", P), ("element", ctypes.c_int), ("stride_n", I64), ("stride_c", I64)]


class Params(ctypes.Structure):
    _fields_ = [
        *((n, P) for n in ("x", "grad", "y")),
        *((n, Small) for n in ("weight", "bias", "add", "scale", "shift")),
        *((n, P) for n in ("mean", "rstd", "partial", "sums", "group_sums")),
        *((n, I64) for n in ("samples", "channels", "positions", "groups", "parts", "part_length")),
        ("eps", F32),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("params", Params),
        *((f"d_{n}", P) for n in ("weight", "bias", "add", "scale", "shift")),
        ("element", ctypes.c_int),
        *((n, ctypes.c_bool) for n in ("silu", "packed", "columns", "by_group", "cached")),
        ("seed", ctypes.c_uint64),
    ]


def load(path):
    library = ctypes.CDLL(str(path))
    library.emulated_error.restype = ctypes.c_char_p
    for name in ("emulated_forward", "emulated_backward"):
        getattr(library, name).restype = ctypes.c_bool
    assert library.emulated_call_size() == ctypes.sizeof(Call)
    return library


@pytest.fixture(scope="module")
def library():
    return load(emulated("group_norm_silu", flags=("-shared",)))


def small(t):
    if t is None:
        return Small(None, 0, 0, 0)
    strides = (0, t.stride(0)) if t.dim() == 1 else t.stride()
    return Small(t.data_ptr(), DTYPES.index(t.dtype), *strides)


def run(library, tensors, groups, silu, parts, cached=False, seed=1, cotangent=None):
    """(y, mean, rstd), or with a cotangent (dx, dweight, dbias, dadd, dscale, dshift)."""
    x, *options = tensors
    n, c = x.shape[:2]
    columns = not x.is_contiguous()
    positions = x[0, 0].numel()
    row = c if columns else positions
    by_group, length = parts == 0, -(-positions // max(parts, 1) // 8) * 8
    parts = -(-positions // length)
    y = torch.full_like(x, torch.nan)
    stats = [torch.full((n, groups), torch.nan) for _ in range(2)]
    width = 2 if cotangent is None else 3
    work = [
        torch.full((n * parts * c * width,), torch.nan),
        torch.full((n, c, 3), torch.nan),
        torch.full((n, groups, 2), torch.nan),
    ]
    grads = [torch.full((c,), torch.nan) for _ in range(2)]
    grads += [torch.full((n, c), torch.nan) for _ in range(3)]
    call = Call()
    call.params = Params(
        x.data_ptr(), None, y.data_ptr(), *map(small, options), *(s.data_ptr() for s in stats),
        *(w.data_ptr() for w in work), n, c, positions, groups, parts, length, 1e-5,
    )  # fmt: skip
    call.element, call.silu = DTYPES.index(x.dtype), silu
    call.packed = row * x.element_size() % 16 == 0
    call.columns, call.by_group, call.cached, call.seed = columns, by_group, cached, seed
    ok = library.emulated_forward(ctypes.byref(call))
    assert ok, library.emulated_error().decode()
    if cotangent is None:
        return y, *stats
    call.params.grad = cotangent.data_ptr()
    for name, g in zip(("weight", "bias", "add", "scale", "shift"), grads, strict=True):
        setattr(call, f"d_{name}", g.data_ptr())
    ok = library.emulated_backward(ctypes.byref(call))
    assert ok, library.emulated_error().decode()
    return y, *grads


def make(dtype, shape, channels_last=False, modulated=True):
    torch.manual_seed(0)
    n, c = shape[:2]
    x = torch.randn(shape).to(dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    rest = [torch.randn(c).to(dtype) for _ in range(2)]
    rest += [torch.randn(n, c).to(dtype) if modulated else None for _ in range(3)]
    return [x, *rest]


CASES = {
    "group_in_shared_memory": ((2, 8, 6, 8), 2, 0, True, False),
    "group_read_again": ((1, 6, 5, 3), 3, 0, False, False),
    "rows_in_parts": ((1, 4, 40, 32), 2, 3, False, False),
    "odd_rows_in_parts": ((2, 3, 7, 11), 1, 4, False, False),
    "columns": ((2, 16, 5, 3), 8, 2, False, True),  # packs of several groups
    "odd_columns": ((1, 21, 4, 5), 7, 3, False, True),
    "one_position": ((3, 8, 1, 1), 2, 1, False, False),
}
every_case = pytest.mark.parametrize(
    ("shape", "groups", "parts", "cached", "columns"), CASES.values(), ids=CASES.keys()
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@every_case
@every_dtype
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
def test_emulated_forward(library, dtype, shape, groups, parts, cached, columns, silu):
    tensors = make(dtype, shape, columns)
    y, mean, rstd = run(library, tensors, groups, silu, parts, cached)
    x, w, b, *rest = tensors
    exact = reference(*double(x), groups, *double(w, b), 1e-5, silu, *double(*rest))
    eager = eager_group_norm(x, groups, w, b, 1e-5, silu, *rest)
    assert_parity("y", y, eager, exact, terms=x[0].numel() // groups)
    grouped = (x.double() + rest[0].double()[..., None, None]).reshape(shape[0], groups, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(2), rtol=1e-4, atol=1e-5)
    var = grouped.var(2, unbiased=False)
    torch.testing.assert_close(rstd.double(), (var + 1e-5).rsqrt(), rtol=1e-4, atol=1e-5)


@every_case
@every_dtype
def test_emulated_backward(library, dtype, shape, groups, parts, cached, columns):
    tensors = make(dtype, shape, columns)
    torch.manual_seed(1)
    cotangent = torch.randn(shape).to(dtype)
    cotangent = cotangent.movedim(1, -1).contiguous().movedim(-1, 1) if columns else cotangent
    got = run(library, tensors, groups, True, parts, cached, cotangent=cotangent)

    def of(function):
        return lambda x, w, b, *rest: function(x, groups, w, b, 1e-5, True, *rest)

    want = gradients(of(reference), double(*tensors), [cotangent])[1]
    eager = gradients(of(eager_group_norm), tensors, [cotangent])[1]
    names = ("x", "weight", "bias", "add", "scale", "shift")
    for name, a, e, w in zip(names, got, eager, want, strict=True):
        assert_parity(f"d{name}", a, e, w, dtype=dtype, terms=tensors[0].numel())


@every_case
def test_emulated_thread_order_changes_nothing(library, shape, groups, parts, cached, columns):
    tensors = make(torch.float32, shape, columns)
    assert_order_changes_nothing(
        lambda seed: run(library, tensors, groups, True, parts, cached, seed=seed), range(2, 8)
    )


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    flags = ("-shared", "-DEMULATED_F32_ONLY")
    broken = load(emulated("group_norm_silu", csrc=csrc, flags=flags))
    for case in CASES.values():
        test_emulated_forward(broken, torch.float32, *case, True)
        test_emulated_backward(broken, torch.float32, *case)
        test_emulated_thread_order_changes_nothing(broken, *case)
