"""The CUDA kernels of swiglu, geglu and gelu, run on the CPU by the emulator in tests/emulator.

Emulated, not yet confirmed on hardware: index arithmetic, tails and the fits of the activations in
the very file nvcc compiles. The hardware's exponential and speed need a GPU (``make gpu``).
"""

from __future__ import annotations

import ctypes
import itertools

import gated
import pytest
import torch
import torch.nn.functional as F
from emulation import emulated, load_kernels
from numerics import DTYPES, assert_parity, double, gradients
from test_emulated_gated_residual import I64, P, Tiling
from test_gelu import every_float

FLOAT, BF16, F16 = DTYPES
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


class Rows(ctypes.Structure):
    _fields_ = [("data", P), ("stride", I64)]


def params(*names):
    class Params(ctypes.Structure):
        _fields_ = [
            *((n, I64) for n in ("rows", "columns")),
            *((n, Rows) for n in names),
            ("tiling", Tiling),
        ]

    return Params


Forward = params("value", "gate", "y")
Backward = params("grad", "value", "gate", "dvalue", "dgate")


def load(path):
    return load_kernels(path, Forward, Backward, emulated_tiling=ctypes.c_bool)


@pytest.fixture(scope="module")
def library():
    return load(emulated("gated_activation", flags=("-shared",)))


def rows(t):
    if t is None:
        return Rows(None, 0)
    assert t.dim() == 2 and (t.shape[1] == 1 or t.stride(1) == 1)
    return Rows(t.data_ptr(), t.stride(0))


def blank(rows, columns, dtype, gap):
    """NaN rows with a gap behind each."""
    return torch.full((rows, columns + gap), torch.nan, dtype=dtype)


def run(library, activation, value, gate, cotangent=None, packed=None, gap=0, seed=1):
    """[y], and with a cotangent the gradients of value (unless None) and gate; those of a packed
    tensor as its halves, in the order of ``packed``: (value, gate) if it is "gate_last"."""
    which, dtype = list(ACTIVATIONS).index(activation), DTYPES.index(gate.dtype)
    n, columns = gate.shape
    y = blank(n, columns, gate.dtype, gap)
    p = Forward(n, columns, rows(value), rows(gate), rows(y))
    error = library.emulated_forward(ctypes.byref(p), which, dtype, ctypes.c_uint64(seed))
    assert error is None, error.decode()
    assert y[:, columns:].isnan().all()
    if cotangent is None:
        return [y[:, :columns]]
    if packed:
        first, second = blank(n, 2 * columns, gate.dtype, 0).chunk(2, 1)
        dvalue, dgate = (first, second) if packed == "gate_last" else (second, first)
    else:
        whole = blank(n, columns, gate.dtype, gap), blank(n, columns, gate.dtype, gap)
        dvalue, dgate = (t[:, :columns] for t in whole)
    of_value = None if value is None else dvalue
    b = Backward(n, columns, *map(rows, (cotangent, value, gate, of_value, dgate)))
    error = library.emulated_backward(ctypes.byref(b), which, dtype, ctypes.c_uint64(seed))
    assert error is None, error.decode()
    assert packed or all(t[:, columns:].isnan().all() for t in whole)
    return [y[:, :columns], *(() if value is None else (dvalue,)), dgate]


def check(library, activation, value, gate, **options):
    host = ACTIVATIONS[activation]
    gated_host = (lambda z: host(z)) if value is None else (lambda v, z: v * host(z))
    tensors = [gate] if value is None else [value, gate]
    torch.manual_seed(1)
    cotangent = torch.randn(gate.shape).to(gate.dtype)
    found = run(library, activation, value, gate, cotangent, **options)
    want = gradients(gated_host, double(*tensors), [cotangent])
    near = gradients(gated_host, tensors, [cotangent])
    names = ("y", "dgate") if value is None else ("y", "dvalue", "dgate")
    triples = zip((*near[0], *near[1]), (*want[0], *want[1]), strict=True)
    for name, a, (e, w) in zip(names, found, triples, strict=True):
        assert_parity(name, a, e, w)


def make(dtype, n, columns, packed):
    """(value, gate); the halves of one tensor if ``packed`` says in which order."""
    torch.manual_seed(0)
    if not packed:
        return torch.randn(n, columns).to(dtype), (3 * torch.randn(n, columns)).to(dtype)
    first, second = (3 * torch.randn(n, 2 * columns)).to(dtype).chunk(2, 1)
    return (first, second) if packed == "gate_last" else (second, first)


# dtype, rows, columns, order of a packed tensor
CASES = {
    "packed": (BF16, 5, 96, "gate_last"),
    "packed_gate_first": (F16, 3, 40, "gate_first"),
    "packed_odd": (FLOAT, 3, 7, "gate_last"),
    "halves_unaligned": (BF16, 3, 12, "gate_first"),
    "one_column": (F16, 5, 1, "gate_last"),
    "separate_with_a_tail": (BF16, 3, 7, None),
    "rows_of_several_blocks": (F16, 70, 16, "gate_first"),
    "columns_of_several_blocks": (FLOAT, 1, 4099, None),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_gates(library, activation, case):
    check(library, activation, *make(*case), packed=case[-1])


@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh"))
def test_emulated_activations_alone(library, activation):
    """One row, whole packs and not, aligned and not."""
    memory = (3 * torch.randn(1, 3000)).bfloat16()
    for start, end in ((0, 2048), (0, 2051), (0, 3), (1, 18)):
        check(library, activation, None, memory[:, start:end])
    check(library, activation, None, memory.float())


def test_emulated_rows_with_gaps(library):
    """Rows of a larger tensor: a tail in every row, what lies behind is not touched."""
    wide = torch.randn(5, 2, 48).bfloat16()
    for columns in (32, 37):
        value, gate = (t[:, :columns] for t in wide.unbind(1))
        check(library, "silu", value, gate, gap=8)
        check(library, "silu", value, gate, gap=3)


def test_emulated_far_rows(library, tmp_path):
    """Rows 2^27 elements apart, the last beyond 2^31."""
    far, near = gated.far_rows(tmp_path, 24)
    assert torch.equal(run(library, "silu", far, near)[0], run(library, "silu", near, near)[0])
    assert torch.equal(run(library, "silu", near, far)[0], run(library, "silu", near, near)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_special_values(library, activation, dtype):
    """Infinities and NaN where PyTorch has them, finite slopes at the ends of the fits."""
    gate = gated.SPECIAL.repeat(8).to(dtype)[None]
    value, ones = torch.full_like(gate, 0.75), torch.ones_like(gate)
    host = ACTIVATIONS[activation]
    y, _, dgate = run(library, activation, value, gate, ones)
    near, want = (
        gradients(lambda v, z: v * host(z), t, [ones]) for t in ([value, gate], double(value, gate))
    )
    for part in (gate.abs() <= 100, gate.abs() > 100, ~(gate.abs() <= 1e30)):
        assert_parity("y", y[part], near[0][0][part], want[0][0][part])
        if gate[part].isfinite().all():
            assert_parity("dgate", dgate[part], near[1][1][part], want[1][1][part])
    assert dgate[gate.isnan()].isnan().all()


def test_emulated_gelu_over_all_floats(library):
    """The fits hold for every float16, and beyond where they end."""
    x = every_float(F16, 60.0)[None]
    exact = x.double().requires_grad_()
    truth = F.gelu(exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    y, dx = run(library, "gelu", None, x, torch.ones_like(x))
    info = torch.finfo(F16)
    for got, want, limit in ((y, truth.detach(), 2e-7 * x.double().abs()), (dx, slope, 5e-6)):
        error = (got.double() - want).abs() - want.abs() * info.eps / 2 - info.tiny * info.eps
        assert (error <= limit).all(), error.max()


def test_tiles_reach_all_units_with_few_idle_threads(library):
    lanes, blocks = ctypes.c_int(), ctypes.c_uint()
    sizes = (1, 7, 8, 12, 25, 33, 96, 144, 255, 256, 1000, 4097)
    for n, units in itertools.product((1, 3, 257, 100000), sizes):
        arguments = I64(2), I64(n), I64(units), ctypes.byref(lanes), ctypes.byref(blocks)
        assert library.emulated_tiling(*arguments)
        side = -(-units // lanes.value)
        assert blocks.value == 2 * side * -(-n // (256 // lanes.value))
        idle = side * lanes.value - units
        assert idle <= units / 8 if units >= 32 or units % 4 == 0 else idle < 4
    huge = I64(1), I64(1 << 40), I64(24), ctypes.byref(lanes), ctypes.byref(blocks)
    assert not library.emulated_tiling(*huge)


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    broken = load(emulated("gated_activation", csrc=csrc, flags=("-shared",)))
    for activation, case in itertools.product(ACTIVATIONS, CASES.values()):
        check(broken, activation, *make(*case), packed=case[-1])
    for activation in ("gelu", "gelu_tanh"):
        test_emulated_activations_alone(broken, activation)
    test_emulated_rows_with_gaps(broken)
    for activation, dtype in itertools.product(ACTIVATIONS, DTYPES):
        test_emulated_special_values(broken, activation, dtype)
