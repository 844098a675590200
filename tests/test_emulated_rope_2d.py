"""The CUDA rope_2d kernel, run on the CPU by the emulator in tests/emulator.

Emulated, not yet confirmed on hardware: index arithmetic, prefixes and packs of the very file nvcc
compiles. The compiler and speed need a GPU (``make gpu``).
"""

from __future__ import annotations

import ctypes

import gated
import pytest
import torch
from emulation import emulated
from numerics import DTYPES, assert_parity, double, gradients
from test_emulated_gated_residual import BOOL, I64, INT, P, Tiling
from test_rope_2d import host, make

from vitkit.ops.rope_2d import _table


class Heads(ctypes.Structure):
    _fields_ = [
        *((n, P) for n in ("x", "y")),
        *((n, I64) for n in ("batch_stride", "token_stride", "head_stride")),
        *((n, INT) for n in ("heads", "steps")),
        ("tiling", Tiling),
    ]


class Table(ctypes.Structure):
    _fields_ = [("data", P), *((n, I64) for n in ("batch_stride", "token_stride", "head_stride"))]


class Params(ctypes.Structure):
    _fields_ = [
        *((n, Heads) for n in ("q", "k")),
        *((n, Table) for n in ("cos", "sin")),
        *((n, I64) for n in ("batch", "tokens", "prefix")),
        ("head_dim", INT),
        ("inverse", BOOL),
    ]


def load(path):
    library = ctypes.CDLL(str(path))
    library.emulated_rope.restype = ctypes.c_char_p
    library.emulated_size.restype = ctypes.c_size_t
    assert library.emulated_size() == ctypes.sizeof(Params)
    return library


@pytest.fixture(scope="module")
def library():
    return load(emulated("rope_2d", flags=("-shared",)))


def strides(t):
    return [0 if t.shape[d] == 1 else t.stride(d) for d in range(3)]


def run(library, q, k, cos, sin, layout, inverse=False, seed=1):
    """(q, k) turned, k of any number of heads or None."""
    interleaved = layout == "interleaved"
    tables = [_table(t, q.shape[-1], interleaved, torch.float32) for t in (cos, sin)]
    out = [None if t is None else torch.full(t.shape, torch.nan, dtype=t.dtype) for t in (q, k)]
    heads = [
        Heads() if t is None else Heads(t.data_ptr(), y.data_ptr(), *strides(t), t.shape[2])
        for t, y in zip((q, k), out, strict=True)
    ]
    of_tables = [Table(t.data_ptr(), *strides(t)) for t in tables]
    b, n, _, d = q.shape
    p = Params(*heads, *of_tables, b, n, n - tables[0].shape[1], d, inverse)
    element = DTYPES.index(q.dtype)
    error = library.emulated_rope(
        ctypes.byref(p), element, ctypes.c_bool(interleaved), ctypes.c_uint64(seed)
    )
    assert error is None, error.decode()
    return out


def check(library, tensors, layout):
    q, k, cos, sin = tensors
    cotangents = [torch.randn(t.shape).to(t.dtype) for t in (q, k)]
    found = run(library, *tensors, layout)
    found += run(library, *cotangents, cos, sin, layout, inverse=True)
    plain = lambda q, k: host(q, k, cos, sin, layout)  # noqa: E731
    exact = lambda q, k: host(q, k, cos.double(), sin.double(), layout)  # noqa: E731
    near, want = gradients(plain, [q, k], cotangents), gradients(exact, double(q, k), cotangents)
    triples = zip((*near[0], *near[1]), (*want[0], *want[1]), strict=True)
    for name, a, (e, w) in zip(("q", "k", "dq", "dk"), found, triples, strict=True):
        assert_parity(name, a, e, w, terms=2)


FLOAT, BF16, F16 = DTYPES
# dtype, options of make
CASES = {
    "prefix_and_few_key_heads": (BF16, {"heads": 5, "k_heads": 1, "d": 32}),
    "tables_of_samples_and_heads": (F16, {"d": 16, "table": (2, 5, 3, 16)}),
    "tables_of_samples": (FLOAT, {"d": 24, "table": (2, 7, 1, 24)}),
    "half_tables": (BF16, {"d": 16, "table": (7, 8)}),
    "odd_pairs": (F16, {"d": 6, "heads": 9, "k_heads": 2}),
    "eight_bytes": (BF16, {"b": 1, "d": 72, "n": 5}),
    "one_pair": (FLOAT, {"d": 2, "n": 3}),
    "several_blocks": (BF16, {"b": 1, "n": 9, "heads": 12, "k_heads": 12, "d": 256}),
}
every_layout = pytest.mark.parametrize("layout", ["half", "interleaved"])


@every_layout
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_rope(library, case, layout):
    dtype, options = case
    check(library, make("cpu", dtype, **options), layout)


@every_layout
def test_emulated_views(library, layout):
    """Thirds of a qkv, heads before tokens, unaligned heads and strides; tables with gaps."""
    torch.manual_seed(0)
    q, k, _ = torch.randn(2, 7, 3, 2, 16).bfloat16().unbind(2)
    wide = torch.randn(2, 7, 2, 20).bfloat16()
    for a in (0, 1):
        cos, sin = torch.randn(2, 6, 40)[:, :, a : a + 16]
        check(library, [q, k, cos, sin], layout)
        check(library, [q.transpose(1, 2).contiguous().transpose(1, 2), q, cos, sin], layout)
        check(library, [wide[..., a : a + 16], wide[:, :, :1, 4:], cos, sin], layout)
        check(library, [wide[..., :16], k, cos, sin], layout)  # strides alone, where a is 0


def test_emulated_one_of_two(library):
    """q alone; no heads of q beside some of k."""
    q, k, cos, sin = make("cpu", BF16)
    both = run(library, q, k, cos, sin, "half")
    alone = run(library, q, None, cos, sin, "half")
    assert alone[1] is None and torch.equal(alone[0], both[0])
    assert torch.equal(run(library, q[:, :, :0], k, cos, sin, "half")[1], both[1])


def test_emulated_prefix_is_copied(library):
    """Bit by bit, and without a look at the tables."""
    q, k, cos, sin = make("cpu", F16, table=(4, 16))
    q[0, 0, 0, 0] = torch.inf
    turned = run(library, q, k, cos, sin, "half")
    assert all(torch.equal(y[:, :3], x[:, :3]) for y, x in zip(turned, (q, k), strict=True))


def test_emulated_offsets_beyond_32_bits(library, tmp_path):
    far, near = gated.far_rows(tmp_path, 32)
    cos, sin = torch.randn(2, 20, 16)
    shaped = [t.as_strided((1, 20, 2, 16), (0, t.stride(0), 16, 1)) for t in (far, near)]
    turned = [run(library, t, None, cos, sin, "interleaved")[0] for t in shaped]
    assert torch.equal(*turned)


def catch(csrc):
    """Raises AssertionError if the kernel in ``csrc`` is broken."""
    broken = load(emulated("rope_2d", csrc=csrc, flags=("-shared",)))
    for layout in ("half", "interleaved"):
        for dtype, options in CASES.values():
            check(broken, make("cpu", dtype, **options), layout)
        test_emulated_views(broken, layout)
    test_emulated_one_of_two(broken)
    test_emulated_prefix_is_copied(broken)
