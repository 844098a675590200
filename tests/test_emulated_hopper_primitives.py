"""The emulator's barriers that count bytes, copies of boxes and products of a warpgroup against the
figures of the PTX manual, written down a second time; and its verdict on misuse.

Emulated, not yet confirmed on hardware: a misreading of the manual would pass here.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulation import emulated

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def hopper():
    library = ctypes.CDLL(str(emulated("hopper_primitives", flags=("-shared",))))
    for name in ("box", "phases", "product_of_rows", "product_of_columns", "hopper_misuse"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def call(function, *args, seed=1):
    args = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
    error = function(*args, ctypes.c_uint64(seed))
    assert error is None, error.decode()


def swizzled(rows, columns):
    """[rows, columns]: at which 16-bit place of the box an element lies."""
    chunks = columns // 8
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    line = row * columns * 2 // 128  # of 128 bytes, all banks
    chunk = (column // 8) ^ (line % chunks)
    return row * columns + chunk * 8 + column % 8


@pytest.mark.parametrize("columns", [16, 32, 64])
def test_emulated_box(hopper, columns):
    """Zeros outside the tensor, on every side; swizzled by rows of 32, 64 or 128 bytes."""
    data = torch.randn(2, 3, 20, 72).bfloat16()
    padded = torch.nn.functional.pad(data, (64, 64, 64, 64, 1, 1, 1, 1))
    rows = 24
    sizes = torch.tensor(data.shape)
    places = swizzled(rows, columns)
    assert torch.equal(places.flatten().sort().values, torch.arange(rows * columns))
    for i, first in enumerate([(0, 0, 0, 0), (1, 2, 8, 64), (1, 1, -3, -8), (0, 2, 17, 0),
                               (2, 0, 0, 0), (0, 3, 0, 0), (0, -1, 0, 0)]):  # fmt: skip
        out = torch.full((rows * columns,), torch.nan, dtype=torch.bfloat16)
        begin = torch.tensor(first, dtype=torch.int32)
        call(hopper.box, data, sizes, begin, columns, rows, out, seed=i + 1)
        b, h, r, c = (f + p for f, p in zip(first, (1, 1, 64, 64), strict=True))
        want = padded[b, h, r : r + rows, c : c + columns]
        assert torch.equal(out[places], want)


def test_emulated_phases(hopper):
    """A phase ends with its last arrival and its last byte, and not before."""
    data = torch.randn(64, 64).bfloat16()
    for seed in range(1, 9):
        early, missing = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
        call(hopper.phases, data, 1 if seed % 2 else 6, early, missing, seed=seed)
        assert early.item() == 0 and (seed % 2 == 0 or missing.item() == 0)


THREAD = torch.arange(128)
ROW, PAIR = THREAD // 32 * 16 + THREAD % 32 // 4, THREAD % 4 * 2


def from_accumulators(d):
    """[64, columns] of [128 threads, tiles, 4]."""
    tiles = d.shape[1]
    out = torch.full((64, tiles * 8), torch.nan)
    for n in range(tiles):
        for i in range(4):
            out[ROW + i // 2 * 8, n * 8 + PAIR + i % 2] = d[:, n, i]
    return out


@pytest.mark.parametrize(
    ("row_bytes", "depth", "dtype"),
    [(128, 64, torch.bfloat16), (128, 128, torch.float16), (64, 96, torch.bfloat16),
     (32, 80, torch.float16)],
    ids=["one_panel", "two_panels", "panels_of_32", "panels_of_16"],
)  # fmt: skip
def test_emulated_product_of_rows(hopper, row_bytes, depth, dtype):
    torch.manual_seed(depth)
    a, b = torch.randn(64, depth).to(dtype), torch.randn(128, depth).to(dtype)
    want = a.double() @ b.double().T
    for seed in SEEDS:
        d = torch.full((128, 16, 4), torch.nan)
        half = dtype is torch.float16
        call(hopper.product_of_rows, row_bytes, half, depth, a, b, d, seed=seed)
        torch.testing.assert_close(from_accumulators(d).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiles", [8, 10, 12, 16])
def test_emulated_product_of_columns(hopper, tiles):
    """One operand in registers, as those of mma.m16n8k16; 32 rows of the other."""
    dtype = torch.float16 if tiles % 8 else torch.bfloat16
    torch.manual_seed(tiles)
    a, b = torch.randn(64, 32).to(dtype), torch.randn(32, tiles * 8).to(dtype)
    steps = []
    for k in (0, 16):
        places = [(ROW, PAIR), (ROW + 8, PAIR), (ROW, PAIR + 8), (ROW + 8, PAIR + 8)]
        pairs = [torch.stack([a[r, k + c], a[r, k + c + 1]], -1) for r, c in places]
        steps.append(torch.stack(pairs, 1).contiguous().view(torch.int32).reshape(128, 4))
    registers = torch.stack(steps).contiguous()
    want = a.double() @ b.double() + 1
    for seed in SEEDS:
        d = torch.full((128, tiles, 4), torch.nan)
        half = dtype is torch.float16
        call(hopper.product_of_columns, tiles, half, registers, b, d, seed=seed)
        torch.testing.assert_close(from_accumulators(d).double(), want, rtol=1e-5, atol=1e-5)


MISUSE = {
    "copy_to_no_barrier": (0, "there is no barrier"),
    "barrier_not_shown": (1, "not shown to the copy engine"),
    "box_at_an_odd_place": (2, "no multiple of 1024"),
    "box_behind_the_end": (3, "the launch has"),
    "bytes_that_never_come": (4, "waits for what never comes"),
    "product_without_fence": (5, "without a fence"),
    "product_nobody_waits_for": (6, "products in flight"),
    "operand_under_way": (7, "under way"),
    "accumulators_written_early": (8, "accumulators were written"),
    "operand_written_early": (9, "registers of a product were written"),
    "two_copies_to_one_place": (10, "where another one is under way"),
    "warpgroup_barrier_without_a_warp": (11, "waits for what never comes"),
    "wait_for_no_barrier": (12, "there is no barrier"),
    "target_of_a_copy": (13, "poison until it arrives"),
}


@pytest.mark.parametrize(("which", "message"), MISUSE.values(), ids=MISUSE.keys())
def test_emulated_hopper_misuse_is_named(hopper, which, message):
    data = torch.randn(64, 64).bfloat16()
    for seed in SEEDS:
        with pytest.raises(AssertionError, match=message):
            call(hopper.hopper_misuse, which, data, seed=seed)
