"""The CUDA layer_norm_modulate kernels, run on the CPU by the emulator in tests/emulator.

Emulated, not yet confirmed on hardware: index arithmetic, masks, reductions and barriers of the
very file nvcc compiles. Memory ordering, the compiler and speed need a GPU (``make gpu``).
"""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from emulation import assert_order_changes_nothing, emulated, load_kernels
from numerics import DTYPES, assert_parity, double, eager_layer_norm, gradients

from vitkit.ops.layer_norm_modulate import reference

P, I64, INT, F32, BOOL = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_bool,
)  # fmt: skip
SMALL = ("weight", "bias", "shift", "scale")
NAMES = ("x", "shift", "scale", "weight", "bias")
EPS = 1e-6


class RowTensor(ctypes.Structure):
    _fields_ = [("data", P), ("element", INT), ("stride", I64)]


class SmallGradient(ctypes.Structure):
    _fields_ = [("data", P), ("element", INT)]


class Shape(ctypes.Structure):
    _fields_ = [
        *((n, I64) for n in ("segments", "rows")),
        ("width", INT),
        ("per_token", BOOL),
        *((n, RowTensor) for n in SMALL),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((n, P) for n in ("x", "y", "mean", "rstd")),
        ("eps", F32),
        ("blocks", ctypes.c_uint),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((n, P) for n in ("x", "grad", "dx", "mean", "rstd")),
        ("dscale", SmallGradient),
        ("partial", P),
        *((n, I64) for n in ("parts", "part_rows")),
    ]


class SmallParams(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((n, P) for n in ("partial", "sums")),
        ("parts", I64),
        *((n, SmallGradient) for n in ("dshift", "dscale", "dweight", "dbias")),
    ]


def load(path):
    return load_kernels(path, Forward, Backward, SmallParams, emulated_part_rows=I64)


@pytest.fixture(scope="module")
def library():
    return load(emulated("layer_norm_modulate", flags=("-shared",)))


def row_tensor(t):
    if t is None:
        return RowTensor(None, 0, 0)
    assert t.stride(-1) == 1
    stride = next((t.stride(d) for d in range(t.dim() - 2, -1, -1) if t.shape[d] != 1), 0)
    return RowTensor(t.data_ptr(), DTYPES.index(t.dtype), stride)


def gradient(t, wanted=True):
    if t is None or not wanted:
        return SmallGradient(None, 0)
    return SmallGradient(t.data_ptr(), DTYPES.index(t.dtype))


def run(library, tensors, cotangent=None, part_rows=None, seed=1):
    """(y, mean, rstd), and with a cotangent the gradients of the tensors that are given."""
    x, shift, scale, weight, bias = tensors
    modulation = scale if scale is not None else shift
    per_token = modulation is not None and modulation.dim() == x.dim()
    width = x.shape[-1]
    segments = x.shape[0] if modulation is not None and not per_token else 1
    rows = x.numel() // width // segments
    shape = Shape(segments, rows, width, per_token, *map(row_tensor, (weight, bias, shift, scale)))
    y, mean, rstd = torch.full_like(x, torch.nan), *torch.full((2, segments * rows), torch.nan)
    p = Forward(shape, x.data_ptr(), y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), EPS)
    element = DTYPES.index(x.dtype)
    error = library.emulated_forward(ctypes.byref(p), element, ctypes.c_uint64(seed))
    assert error is None, error.decode()
    if cotangent is None:
        return y, mean, rstd
    part_rows = part_rows or library.emulated_part_rows(I64(rows))
    parts = -(-rows // part_rows)
    dx = torch.full_like(x, torch.nan)
    small = [None if t is None else torch.full(t.shape, torch.nan, dtype=t.dtype)
             for t in (shift, scale, weight, bias)]  # fmt: skip
    dshift, dscale, dweight, dbias = small
    summed = weight is not None or bias is not None or (modulation is not None and not per_token)
    partial = torch.full((segments, parts, 2, width), torch.nan)
    sums = torch.full((segments, 2, width), torch.nan)
    b = Backward(
        shape, x.data_ptr(), cotangent.data_ptr(), dx.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        gradient(dscale, per_token), partial.data_ptr() if summed else None, parts, part_rows,
    )  # fmt: skip
    s = SmallParams(
        shape, partial.data_ptr(), sums.data_ptr() if segments > 1 else None, parts,
        gradient(dshift, not per_token), gradient(dscale, not per_token),
        gradient(dweight), gradient(dbias),
    )  # fmt: skip
    error = library.emulated_backward(
        ctypes.byref(b), ctypes.byref(s), element, ctypes.c_uint64(seed)
    )
    assert error is None, error.decode()
    if per_token and shift is not None:
        dshift.copy_(cotangent)  # as the op does
    return y, mean, rstd, dx, *(t for t in small if t is not None)


def make(dtype, shape, modulation=None, affine=True, small=None):
    torch.manual_seed(shape[-1])
    x = torch.randn(shape).to(dtype) * 2 + 1
    of = {None: None, "sample": (shape[0], shape[-1]), "token": shape}[modulation]
    draw = lambda size: torch.randn(size).to(small or dtype)  # noqa: E731
    return [
        x,
        *(draw(of) if of else None for _ in range(2)),
        *(draw(shape[-1]) if affine else None for _ in range(2)),
    ]


def check(library, tensors, **options):
    x = tensors[0]
    torch.manual_seed(1)
    cotangent = torch.randn(x.shape).to(x.dtype)
    found = run(library, tensors, cotangent, **options)
    want = gradients(lambda *t: reference(*t, EPS), double(*tensors), [cotangent])
    near = gradients(lambda *t: eager_layer_norm(*t, EPS), tensors, [cotangent])
    assert_parity("y", found[0], near[0][0], want[0][0], terms=x.shape[-1])
    rows = x.double().flatten(0, -2)
    torch.testing.assert_close(found[1].double(), rows.mean(1), rtol=1e-4, atol=1e-5)
    rstd = (rows.var(1, unbiased=False) + EPS).rsqrt()
    torch.testing.assert_close(found[2].double(), rstd, rtol=1e-4, atol=1e-5)
    names = [n for n, t in zip(NAMES, tensors, strict=True) if t is not None]
    for name, a, e, w in zip(names, found[3:], near[1], want[1], strict=True):
        terms = x.shape[-1] if name == "x" else len(rows)
        assert_parity(f"d{name}", a, e, w, dtype=x.dtype, terms=terms)


FLOAT, BF16, F16 = DTYPES
# arguments of make, options of check
CASES = {
    "swin_16_threads": ((BF16, (1, 21, 96)), {"part_rows": 2}),
    "swin_float": ((FLOAT, (2, 9, 128), "sample"), {}),
    "a_warp_a_row": ((F16, (1, 7, 264), "sample"), {}),
    "odd_width_of_a_warp": ((BF16, (2, 5, 77), "sample"), {"part_rows": 3}),
    "one_element": ((FLOAT, (3, 2, 1), None, False), {}),
    "backward_by_128_threads": ((FLOAT, (2, 3, 772), "sample", False), {}),
    "forward_by_256_threads": ((BF16, (1, 3, 1152), "sample", False), {"part_rows": 2}),
    "backward_by_512_threads": ((F16, (1, 2, 2056)), {}),
    "odd_width_of_a_block": ((FLOAT, (1, 2, 1027), "token"), {}),
    "per_token": ((BF16, (2, 5, 96), "token"), {"part_rows": 4}),
    "per_token_in_float32": ((F16, (2, 5, 40), "token", True, FLOAT), {}),
    "float32_parameters": ((BF16, (3, 5, 72), "sample", True, FLOAT), {}),
    "half_parameters_beside_float32": ((FLOAT, (2, 5, 40), "sample", True, F16), {}),
    "alone": ((BF16, (5, 48), None, False), {}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_emulated_layer_norm(library, case):
    arguments, options = case
    check(library, make(*arguments), **options)


def test_emulated_modulation_in_chunks(library):
    """Rows of a slice of [B, 6 E], unaligned ones too."""
    x, *_ = make(BF16, (3, 4, 96))
    for start in (96, 97):
        table = torch.randn(3, 6 * 96).bfloat16()
        check(library, [x, table[:, start : start + 96], table[:, :96], None, None])


def test_emulated_offsets_beyond_32_bits(library):
    """Rows of a modulation 2^31 elements apart, in memory that is mapped and not filled."""
    stride = 2**31 + 64
    memory = torch.frombuffer(mmap.mmap(-1, (stride + 64) * 2), dtype=BF16)
    x, *_ = make(BF16, (2, 3, 32))
    rows = [memory.as_strided((2, 32), (stride, 1), 32 * i) for i in range(2)]
    for t in rows:
        t.copy_(torch.randn(2, 32))
    check(library, [x, *rows, None, None])


def test_emulated_thread_order_changes_nothing(library):
    for name in ("swin_16_threads", "a_warp_a_row", "forward_by_256_threads"):
        arguments, options = CASES[name]
        order_changes_nothing(library, make(*arguments), **options)


def order_changes_nothing(library, tensors, **options):
    cotangent = torch.randn(tensors[0].shape).to(tensors[0].dtype)
    assert_order_changes_nothing(
        lambda seed: run(library, tensors, cotangent, seed=seed, **options), range(2, 8)
    )


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    broken = load(emulated("layer_norm_modulate", csrc=csrc, flags=("-shared",)))
    for arguments, options in CASES.values():
        check(broken, make(*arguments), **options)
        order_changes_nothing(broken, make(*arguments), **options)
