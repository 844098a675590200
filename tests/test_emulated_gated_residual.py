"""The CUDA gated_residual kernels, run on the CPU by the emulator in tests/emulator.

Emulated, not yet confirmed on hardware: index arithmetic, tails, reductions and barriers of the
very file nvcc compiles. Memory ordering, the compiler and speed need a GPU (``make gpu``).
"""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from emulation import assert_order_changes_nothing, emulated, load_kernels
from numerics import DTYPES, assert_parity, double, gradients
from test_gated_residual import eager, make

from vitkit.ops.gated_residual import reference

P, I64, INT, BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_bool


class RowTensor(ctypes.Structure):
    _fields_ = [("data", P), ("element", INT), ("stride", I64)]


class SmallGradient(ctypes.Structure):
    _fields_ = [("data", P), ("element", INT)]


class Tiling(ctypes.Structure):
    _fields_ = [
        *((n, I64) for n in ("segments", "rows", "units")),
        *((n, INT) for n in ("shift", "row_blocks", "unit_blocks")),
    ]


class Shape(ctypes.Structure):
    _fields_ = [
        *((n, I64) for n in ("segments", "rows")),
        ("width", INT),
        ("per_token", BOOL),
        ("gate", RowTensor),
    ]


class Forward(ctypes.Structure):
    _fields_ = [("shape", Shape), *((n, P) for n in ("x", "y", "out")), ("tiling", Tiling)]


class Backward(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((n, P) for n in ("grad", "y", "dy")),
        ("dgate", SmallGradient),
        ("partial", P),
        *((n, I64) for n in ("parts", "part_rows")),
        ("tiling", Tiling),
    ]


def load(path):
    return load_kernels(path, Forward, Backward, emulated_part_rows=I64)


@pytest.fixture(scope="module")
def library():
    return load(emulated("gated_residual", flags=("-shared",)))


def shape_of(x, gate):
    per_token, width = gate.dim() == x.dim(), x.shape[-1]
    segments = x.shape[0] if gate.dim() == 2 and not per_token else 1
    assert gate.stride(-1) == 1
    stride = next((gate.stride(d) for d in range(gate.dim() - 2, -1, -1) if gate.shape[d] != 1), 0)
    row_tensor = RowTensor(gate.data_ptr(), DTYPES.index(gate.dtype), stride)
    return Shape(segments, x.numel() // width // segments, width, per_token, row_tensor)


def run(library, tensors, cotangent=None, part_rows=None, seed=1):
    """(out,), and with a cotangent (out, dy, dgate)."""
    x, y, gate = tensors
    shape, element = shape_of(x, gate), DTYPES.index(x.dtype)
    out = torch.full_like(x, torch.nan)
    p = Forward(shape, x.data_ptr(), y.data_ptr(), out.data_ptr())
    error = library.emulated_forward(ctypes.byref(p), element, ctypes.c_uint64(seed))
    assert error is None, error.decode()
    if cotangent is None:
        return (out,)
    part_rows = part_rows or library.emulated_part_rows(I64(shape.rows))
    parts = -(-shape.rows // part_rows)
    dy, dgate = torch.full_like(y, torch.nan), torch.full(gate.shape, torch.nan, dtype=gate.dtype)
    partial = torch.full((shape.segments, parts, shape.width), torch.nan)
    b = Backward(
        shape, cotangent.data_ptr(), y.data_ptr(), dy.data_ptr(),
        SmallGradient(dgate.data_ptr(), DTYPES.index(gate.dtype)),
        None if shape.per_token else partial.data_ptr(), parts, part_rows,
    )  # fmt: skip
    error = library.emulated_backward(ctypes.byref(b), element, ctypes.c_uint64(seed))
    assert error is None, error.decode()
    return out, dy, dgate


def check(library, tensors, **options):
    x, _, gate = tensors
    torch.manual_seed(1)
    cotangent = torch.randn(x.shape).to(x.dtype)
    found = run(library, tensors, cotangent, **options)
    want = gradients(reference, double(*tensors), [cotangent])
    near = gradients(eager, tensors, [cotangent])
    assert_parity("out", found[0], near[0][0], want[0][0], terms=2)
    for name, a, e, w in zip(("dy", "dgate"), found[1:], near[1][1:], want[1][1:], strict=True):
        terms = max(1, x.numel() // gate.numel())
        assert_parity(name, a, e, w, dtype=x.dtype, terms=terms)


FLOAT, BF16, F16 = DTYPES
# dtype, shape of x, of the gate, dtype of the gate; options of run
CASES = {
    "sample": ((BF16, (3, 7, 40), (3, 40)), {}),
    "token": ((F16, (2, 5, 24), (2, 5, 24)), {}),
    "token_in_float32": ((BF16, (2, 5, 24), (2, 5, 24), FLOAT), {}),
    "layer_scale": ((FLOAT, (2, 5, 24), (24,)), {}),
    "odd_layer_scale": ((BF16, (2, 5, 21), (21,)), {}),
    "half_gate_beside_float32": ((FLOAT, (2, 5, 24), (2, 24), F16), {}),
    "float32_gate": ((F16, (2, 5, 40), (2, 40), FLOAT), {}),
    "odd_width": ((BF16, (2, 9, 77), (2, 77)), {"part_rows": 4}),
    "odd_width_per_token": ((F16, (3, 5, 7), (3, 5, 7)), {}),
    "one_element": ((FLOAT, (2, 3, 1), (2, 1)), {}),
    "parts_of_more_rows_than_a_block": ((BF16, (2, 75, 88), (2, 88)), {"part_rows": 70}),
    "columns_of_several_blocks": ((BF16, (1, 5, 2056), (2056,)), {"part_rows": 2}),
    "map": ((F16, (2, 3, 4, 32), (2, 32)), {"part_rows": 5}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_gated_residual(library, case):
    arguments, options = case
    check(library, make("cpu", *arguments), **options)


def test_emulated_gates_in_chunks(library):
    """Rows of a slice of [B, 6 E], unaligned ones too, and one row for all."""
    x, y, _ = make("cpu", BF16, (3, 4, 32), (3, 32))
    table = torch.randn(3, 6 * 32).bfloat16()
    for start in (32, 33):
        check(library, [x, y, table[:, start : start + 32]])
    gate = torch.randn(32).bfloat16()
    expanded = run(library, [x, y, gate.expand(3, 32)])
    assert torch.equal(expanded[0], run(library, [x, y, gate])[0])


def test_emulated_offsets_beyond_32_bits(library):
    """Rows of a gate 2^31 elements apart, in memory that is mapped and not filled."""
    stride = 2**31 + 64
    memory = torch.frombuffer(mmap.mmap(-1, (stride + 64) * 2), dtype=BF16)
    x, y, _ = make("cpu", BF16, (2, 3, 32), (2, 32))
    gate = memory.as_strided((2, 32), (stride, 1))
    gate.copy_(torch.randn(2, 32))
    check(library, [x, y, gate])


def test_emulated_sums_depend_on_nothing_but_the_shape(library):
    """Neither on the order of threads nor, one part or many, beyond rounding on the parts."""
    for name in ("sample", "parts_of_more_rows_than_a_block", "odd_width"):
        arguments, options = CASES[name]
        order_changes_nothing(library, make("cpu", *arguments), **options)


def order_changes_nothing(library, tensors, **options):
    cotangent = torch.randn(tensors[0].shape).to(tensors[0].dtype)
    assert_order_changes_nothing(
        lambda seed: run(library, tensors, cotangent, seed=seed, **options)
    )


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    broken = load(emulated("gated_residual", csrc=csrc, flags=("-shared",)))
    for arguments, options in CASES.values():
        check(broken, make("cpu", *arguments), **options)
    test_emulated_gates_in_chunks(broken)
    test_emulated_sums_depend_on_nothing_but_the_shape(broken)
