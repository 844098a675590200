"""Windows of a map, for the attention core: token map, score term, and the way back from scores to
the table.

A sequence is a window. Where its tokens lie in the map, which slot of the table a pair of them has
and whether the shift has brought the two together is all arithmetic on (y, x). The window's sizes
are constants: divisions by them are multiplications.
"""

from __future__ import annotations

import triton
import triton.language as tl

MASK = tl.constexpr(-100.0 * 1.4426950408889634)  # of regions, in the exp2 domain

# ---- token map. args: height, width, heads, shifts, window (WH, WW), RAGGED, ROLL_FIRST


@triton.jit
def find_window(map_args, window):
    """(batch, (y, x) of the window's first place in the shifted grid)"""
    height, width, _, _, _, WH, WW, _, _ = map_args
    rows = tl.cdiv(height, WH)
    columns = tl.cdiv(width, WW)
    origin = (window // columns % rows * WH, window % columns * WW)
    return (window // columns // rows).to(tl.int64), origin


@triton.jit
def locate_window(map_args, pid, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Heads of a window are neighbours: their rows share cache lines."""
    heads, WH, WW = map_args[2], map_args[5], map_args[6]
    TILES: tl.constexpr = (WH * WW + BLOCK - 1) // BLOCK
    batch, origin = find_window(map_args, pid // TILES // heads)
    head = (pid // TILES % heads).to(tl.int64)
    return batch, head, pid % TILES * BLOCK, origin, WH * WW, origin, WH * WW


@triton.jit
def _source(
    place, size, shift, WINDOW: tl.constexpr, RAGGED: tl.constexpr, ROLL_FIRST: tl.constexpr
):
    """Token at a place of the shifted grid along one axis, -1 at a pad."""
    if not RAGGED:
        source = place + shift
        return tl.where(source >= size, source - size, source)
    elif ROLL_FIRST:
        return tl.where(place < size, (place + shift) % size, -1)
    else:
        places = tl.cdiv(size, WINDOW) * WINDOW
        source = place + shift
        source = tl.where(source >= places, source - places, source)
        return tl.where(source < size, source, -1)


@triton.jit
def tokens_window(map_args, origin, i):
    height, width, _, shift_y, shift_x, WH, WW, RAGGED, ROLL_FIRST = map_args
    y = _source(origin[0] + i // WW, height, shift_y, WH, RAGGED, ROLL_FIRST)
    x = _source(origin[1] + i % WW, width, shift_x, WW, RAGGED, ROLL_FIRST)
    token = y.to(tl.int64) * width + x
    if RAGGED:
        token = tl.where((y < 0) | (x < 0), -1, token)
    return token


# ---- score term. args: table [heads, slots] times log2(e) or None, first row and column of the
# grid that the shift has brought there (None: no shift), window


@triton.jit
def _slot(i, WW: tl.constexpr):
    """The slot of places i and j is _slot(i) - _slot(j) + that of the last place."""
    return i // WW * (2 * WW - 1) + i % WW


@triton.jit
def _region(origin, i, limits, WW: tl.constexpr):
    moved_y = origin[0] + i // WW >= limits[0]
    moved_x = origin[1] + i % WW >= limits[1]
    return moved_y.to(tl.int32) * 2 + moved_x.to(tl.int32)


@triton.jit
def table_term(term_args, head, m, n):
    """The table's part of the term, the same in every window; None without a table."""
    table_ptr, _, WH, WW = term_args
    if table_ptr is None:
        return None
    else:
        LAST: tl.constexpr = WH * WW - 1
        n = tl.minimum(n, LAST)
        table_ptr += head * ((2 * WH - 1) * (2 * WW - 1))
        return tl.load(table_ptr + (_slot(m, WW) + _slot(LAST, WW) - _slot(n, WW)))


@triton.jit
def add_region_term(t, term_args, origin, m, n):
    limits, WW = term_args[1], term_args[3]
    if limits is None:
        return t
    else:
        apart = _region(origin, m, limits, WW) != _region(origin, n, limits, WW)
        mask = tl.where(apart, MASK, 0.0)
        if t is None:
            return mask
        else:
            return t + mask


@triton.jit
def window_term(term_args, batch, head, origin, m, n, inside):
    return add_region_term(table_term(term_args, head, m, n), term_args, origin, m, n)


# ---- gradient of the table


@triton.jit
def first_slot_row(
    first_m, first_n, S: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Smallest dy + wh - 1 in the tile at (first_m, first_n): its slots are a range from there."""
    return first_m // WW - (tl.minimum(first_n + BLOCK_N, S) - 1) // WW + WH - 1


@triton.jit
def fold_tile(
    acc, partial_ptr, first_m, first_n, WH: tl.constexpr, WW: tl.constexpr, SLOTS: tl.constexpr,
    SLOT_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of the tile over each relative position: [SLOTS] from that of first_slot_row on. Of
    every row, at most one key is at a given position."""
    lowest = first_slot_row(first_m, first_n, WH * WW, WH, WW, BLOCK_N)
    m = first_m + tl.arange(0, BLOCK_M)[:, None]
    for start in tl.range(0, SLOTS, SLOT_BLOCK):
        slot = start + tl.arange(0, SLOT_BLOCK)
        dy = lowest - (WH - 1) + slot // (2 * WW - 1)
        dx = slot % (2 * WW - 1) - (WW - 1)
        x = m % WW - dx[None, :]
        n = (m // WW - dy[None, :]) * WW + x - first_n
        there = (x >= 0) & (x < WW) & (n >= 0) & (n < BLOCK_N)
        found = tl.where(there, tl.gather(acc, tl.where(there, n, 0), 1), 0.0)
        tl.store(partial_ptr + slot, tl.sum(found, 0), mask=slot < SLOTS)


@triton.jit
def window_dtable_sum_kernel(
    partial_ptr, dtable_ptr, heads, parts,
    WH: tl.constexpr, WW: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTS: tl.constexpr, SLOT_BLOCK: tl.constexpr,
):  # fmt: skip
    """dtable [slots, heads]: the partial sums of one head, added in their order."""
    S: tl.constexpr = WH * WW
    TILES_M: tl.constexpr = (S + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    ALL: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
    head = tl.program_id(1)
    slot = tl.program_id(0) * SLOT_BLOCK + tl.arange(0, SLOT_BLOCK)
    acc = tl.zeros([SLOT_BLOCK], tl.float32)
    for start in tl.range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        tile = part % (TILES_M * TILES_N)
        chunk = part // (TILES_M * TILES_N)
        lowest = first_slot_row(
            tile // TILES_N * BLOCK_M, tile % TILES_N * BLOCK_N, S, WH, WW, BLOCK_N
        )
        here = slot[None, :] - (lowest * (2 * WW - 1))[:, None]
        row = (chunk.to(tl.int64) * heads + head) * (TILES_M * TILES_N) + tile
        mask = (part < parts)[:, None] & (here >= 0) & (here < SLOTS)
        acc += tl.sum(tl.load(partial_ptr + row[:, None] * SLOTS + here, mask=mask, other=0.0), 0)
    tl.store(dtable_ptr + slot * heads + head, acc, mask=slot < ALL)
