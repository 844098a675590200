"""The emulator's primitives against the figures of the PTX manual, and its verdict on misuse.

Emulated, not yet confirmed on hardware: a misreading of the manual would pass here.
"""

from __future__ import annotations

import copy
import ctypes
import json

import conformance
import pytest
import torch
from emulation import emulated

SEEDS = (1, 2, 3)


def load(path):
    library = ctypes.CDLL(str(path))
    for name in ("load_matrices", "multiply", "shuffle", "copies", "misuse"):
        getattr(library, name).restype = ctypes.c_char_p
    library.swizzle.restype = ctypes.c_bool
    return library


@pytest.fixture(scope="module")
def primitives():
    return load(emulated("primitives", flags=("-shared",)))


def call(function, *args, seed=1):
    args = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
    error = function(*args, ctypes.c_uint64(seed))
    assert error is None, error.decode()


LANE = torch.arange(32)
GROUP, PAIR = LANE // 4, LANE % 4 * 2


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_emulated_load_matrices(primitives, transposed):
    """Lane l holds elements (l / 4, 2 (l % 4)) and the next one of the row of every matrix."""
    rows = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    out = torch.zeros(32, 4, dtype=torch.int32)
    for seed in SEEDS:
        call(primitives.load_matrices, rows, out, transposed, seed=seed)
        m = rows.mT if transposed else rows
        low, high = (m[:, GROUP, PAIR + i].T.int() for i in range(2))
        assert torch.equal(out, low | high << 16)


@pytest.mark.parametrize("element", [1, 2], ids=["bf16", "f16"])
def test_emulated_product_of_16_bits(primitives, element):
    dtype = (None, torch.bfloat16, torch.float16)[element]
    torch.manual_seed(element)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    places = [(GROUP, PAIR), (GROUP + 8, PAIR), (GROUP, PAIR + 8), (GROUP + 8, PAIR + 8)]
    pairs = [torch.stack([a[r, k], a[r, k + 1]], -1) for r, k in places]
    a_registers = torch.stack(pairs, 1).contiguous().view(torch.int32).reshape(32, 4)
    pairs = [torch.stack([b[k, GROUP], b[k + 1, GROUP]], -1) for k in (PAIR, PAIR + 8)]
    b_registers = torch.stack(pairs, 1).contiguous().view(torch.int32).reshape(32, 2)
    check_product(primitives, element, a_registers, b_registers, a, b, c)


def test_emulated_product_of_tf32(primitives):
    """The low 13 bits are not read."""
    torch.manual_seed(3)
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    column = LANE % 4
    places = [(GROUP, column), (GROUP + 8, column), (GROUP, column + 4), (GROUP + 8, column + 4)]
    a_registers = torch.stack([a[p] for p in places], 1).contiguous()
    b_registers = torch.stack([b[column, GROUP], b[column + 4, GROUP]], 1).contiguous()
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b)]
    check_product(primitives, 0, a_registers, b_registers, *cut, c)


def check_product(primitives, element, a_registers, b_registers, a, b, c):
    places = [(GROUP + i // 2 * 8, PAIR + i % 2) for i in range(4)]
    for seed in SEEDS:
        d = torch.stack([c[p] for p in places], 1).contiguous()
        call(primitives.multiply, element, a_registers, b_registers, d, seed=seed)
        want = a.double() @ b.double() + c.double()
        got = torch.empty(16, 8)
        for i, p in enumerate(places):
            got[p] = d[:, i]
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_emulated_rounding_to_tf32(primitives):
    """To 11 bits of significand, ties away from zero."""
    ulp = 2.0**-10
    x = torch.tensor([1.0, 1 + ulp / 2, -1 - ulp / 2, 1 + ulp * 0.499, 3e38, torch.inf])
    y = torch.empty(6, dtype=torch.int32)
    primitives.to_tf32(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), 6)
    y = y.view(torch.float32)
    want = torch.tensor([1.0, 1 + ulp, -1 - ulp, 1.0])
    assert torch.equal(y[:4], want) and y[5] == torch.inf
    assert (y[4] / x[4] - 1).abs() <= ulp / 2


def test_emulated_shuffles(primitives):
    value, other, shifted = torch.randn(32), torch.empty(32), torch.empty(32)
    for distance in (1, 2, 16):
        call(primitives.shuffle, value, distance, other, shifted)
        assert torch.equal(other, value[LANE ^ distance])
        want = torch.cat([value[distance:], value[32 - distance :]])
        assert torch.equal(shifted, want)


def test_emulated_copies_arrive_when_waited_for(primitives):
    """By group, oldest first; zeros where nothing is read; NaN until then."""
    source = torch.randn(2, 32, 4)
    want = torch.where((LANE % 2 == 0)[:, None], source, 0.0)
    one, both = torch.empty(2, 32, 4), torch.empty(2, 32, 4)
    for seed in SEEDS:
        call(primitives.copies, source, one, both, seed=seed)
        assert torch.equal(one[0], want[0]) and one[1].isnan().all()
        assert torch.equal(both, want)


CHUNKS = (4, 6, 8, 10, 12, 16, 24, 32, 64)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_emulated_swizzle(primitives, chunks):
    """A permutation within each row; the eight rows of a matrix at one chunk lie in eight banks
    (of 16 bytes). Float32: four rows at two chunks do, and so do rows two apart where a row is a
    multiple of the banks."""
    rows = 16
    plain, pairs = (torch.empty(rows, chunks, dtype=torch.int32) for _ in range(2))
    assert primitives.swizzle(
        chunks, rows, *(ctypes.c_void_p(t.data_ptr()) for t in (plain, pairs))
    )
    row_of = torch.arange(rows * chunks, dtype=torch.int32).reshape(rows, chunks)
    for t in (plain, pairs):
        assert torch.equal(t.sort(1).values, row_of)
    for first in (0, 8):
        for chunk in range(chunks):
            assert len(set((plain[first : first + 8, chunk] % 8).tolist())) == 8
    for first in (0, 4, 8, 12):
        for chunk in range(0, chunks, 2):
            banks = pairs[first : first + 4, chunk : chunk + 2] % 8
            assert len(set(banks.flatten().tolist())) == 8
    if chunks % 8 == 0:
        for first in (0, 1, 8, 9):
            for chunk in range(0, chunks, 2):
                assert len(set((pairs[first : first + 8 : 2, chunk] // 2 % 4).tolist())) == 4


MISUSE = {
    "shuffle_by_half_a_warp": (0, "warp operation.*has ended"),
    "two_shuffles_in_one_warp": (1, r"warp operation.*is at .*primitives\.cpp"),
    "shuffle_of_16_lanes": (2, "part of a warp"),
    "barrier_without_a_warp": (3, "waits at a barrier.*has ended"),
    "two_barriers": (4, "waits at a barrier.*is at the barrier of"),
    "misaligned_row": (5, "misaligned shared address"),
    "row_behind_the_end": (6, "the launch has 256"),
    "copy_behind_the_end": (7, "the launch has 256"),
    "misaligned_copy": (8, "misaligned source"),
    "copy_nobody_waits_for": (9, "copies in flight"),
}


@pytest.mark.parametrize(("which", "message"), MISUSE.values(), ids=MISUSE.keys())
def test_emulated_misuse_is_named(primitives, which, message):
    for seed in SEEDS:
        with pytest.raises(AssertionError, match=message):
            call(primitives.misuse, which, seed=seed)


@pytest.fixture(scope="module")
def emulated_outputs():
    return conformance.output(emulated("conformance"))


def test_emulated_conformance_program(emulated_outputs):
    """Everything is written, whatever the order of threads, and a wrong bit is found."""
    for seed in SEEDS:
        again = conformance.output(emulated("conformance"), str(seed))
        assert conformance.differences(emulated_outputs, again) == []
    for name, result in emulated_outputs["primitives"].items():
        assert "deadbeef" not in result["words"], name
        words = result["words"]
        # The last bit; with a tolerance, the sign of a number of at least 1/2.
        i = len(words) - 1
        if result["tolerance"]:
            i = next(i for i in range(0, len(words), 8) if words[i : i + 2] in ("3f", "40", "bf"))
        for bit in (8,) if result["tolerance"] else (1, 2):
            flipped = words[:i] + f"{int(words[i], 16) ^ bit:x}" + words[i + 1 :]
            wrong = copy.deepcopy(emulated_outputs)
            wrong["primitives"][name]["words"] = flipped
            (line,) = conformance.differences(emulated_outputs, wrong)
            assert line.startswith(f"{name}: 1 of ")


def test_conformance_program_compiles_for_a_gpu():
    try:
        assert conformance.built("80").exists()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_emulator_reproduces_hardware(emulated_outputs):
    if not conformance.GOLDEN.exists():
        pytest.skip("emulated, not yet confirmed on hardware: `make gpu` writes golden.json")
    golden = json.loads(conformance.GOLDEN.read_text())
    assert golden["hardware"] != emulated_outputs["hardware"]
    assert conformance.differences(golden, emulated_outputs) == []


def catch(csrc):
    """Raises AssertionError if the vocabulary in ``csrc`` is broken."""
    broken = load(emulated("primitives", csrc=csrc, flags=("-shared",)))
    for chunks in CHUNKS:
        test_emulated_swizzle(broken, chunks)
