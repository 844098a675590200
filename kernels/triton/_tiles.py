"""Tiles of the attention kernels, by class of device, element size, head dim and score term.

Chosen from machine code, not by timing: ``python -m vitkit.kernels._aot`` prints the registers,
spills and shared memory that the reasons speak of. The largest tile was taken that fits and does
not spill in an inner loop ("hot"); ranges are over the head dims of a row. Float32 products are
exact (no tensor cores): their tile is what the multiply-adds of a thread can hold. Head dims
between the rows (72 is held as 64 + 16) take the next larger one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ._primitives import Device, largest_power_of_2, next_power_of_2


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    archs: str  # classes of _primitives.Device, space-separated
    itemsize: int
    head_dim: int  # up to this one
    tile: Tile
    reason: str
    plain: bool = False  # only without a score term
    loaded: bool = False  # not with a score term that is computed, in float32


NVIDIA = "sm80 sm86 sm90 sm100"
INTERPRETER = Row("cpu", 4, 256, Tile(32, 32, 4, 1), "interpreter: several tiles at test sizes")

FORWARD: tuple[Row, ...] = (
    INTERPRETER,
    Row("sm80 sm86", 2, 80, Tile(128, 64, 4, 3), "32 rows a warp, 11 instructions", loaded=True),
    Row("sm80 sm86", 2, 128, Tile(128, 64, 8, 2), "252 registers, 80 KB; 4 warps: 36 hot spills"),
    Row("sm80", 2, 192, Tile(128, 64, 8, 2), "255 registers, 112 KB"),
    Row("sm80", 2, 256, Tile(128, 32, 8, 2), "255 registers, 104 KB; 64 x 64: 14 hot spills"),
    Row("sm86", 2, 192, Tile(64, 64, 4, 2), "255 registers, 80 KB; 128 rows take 112"),
    Row("sm86", 2, 256, Tile(64, 32, 4, 2), "255 registers, 72 KB; 64 keys take 112"),
    Row("sm90", 2, 80, Tile(128, 64, 4, 3), "216 to 255 registers, 64 to 112 KB", loaded=True),
    Row("sm90", 2, 192, Tile(128, 64, 8, 3), "179 to 254 registers; 4 warps: 21 hot spills"),
    Row("sm90", 2, 256, Tile(128, 64, 8, 2), "241 to 254 registers; 3 stages take 288 KB"),
    Row("sm100", 2, 192, Tile(128, 64, 8, 3), "138 to 210 registers; 128 keys spill with a term"),
    Row("sm100", 2, 256, Tile(128, 64, 8, 2), "198 registers, 177 KB; 3 stages take 256"),
    Row("hip", 2, 64, Tile(128, 64, 4, 1), "142 registers: 3 waves a SIMD, 2 with a term"),
    Row("hip", 2, 128, Tile(128, 32, 4, 1), "191 registers: 2 waves a SIMD, 64 keys leave 1"),
    Row("hip", 2, 256, Tile(64, 32, 4, 1), "231 to 264 registers"),
    Row(NVIDIA, 4, 64, Tile(64, 32, 8, 1), "122 registers; 64 keys spill"),
    Row(NVIDIA, 4, 256, Tile(32, 32, 8, 1), "208 to 226 registers, 68 KB; 64 rows spill"),
    Row("hip", 4, 128, Tile(64, 32, 8, 1), "124 to 206 registers: 2 waves a SIMD"),
    Row("hip", 4, 256, Tile(32, 32, 4, 1), "300 to 340 registers; 8 warps spill"),
)
BACKWARD_DQ: tuple[Row, ...] = (
    INTERPRETER,
    Row("sm80 sm86", 2, 96, Tile(128, 64, 8, 2), "182 to 255 registers, 48 to 88 KB"),
    Row("sm80", 2, 128, Tile(128, 64, 8, 2), "255 registers, 112 KB"),
    Row("sm80", 2, 256, Tile(64, 64, 4, 2), "255 registers, 144 KB; 128 rows: 10 hot spills"),
    Row("sm86", 2, 128, Tile(64, 64, 4, 2), "244 registers, 80 KB; 128 rows take 112"),
    Row("sm86", 2, 192, Tile(64, 32, 4, 2), "255 registers, 76 KB"),
    Row("sm86", 2, 256, Tile(32, 64, 8, 1), "180 registers, 80 KB; 2 stages take 104"),
    Row("sm90", 2, 192, Tile(64, 64, 4, 2), "one warpgroup, 138 to 255 registers, 48 to 152 KB"),
    Row("sm90", 2, 256, Tile(64, 32, 4, 2), "254 registers, 132 KB; 64 keys: 8 hot spills"),
    Row("sm100", 2, 192, Tile(128, 64, 8, 2), "106 to 186 registers, 74 to 185 KB"),
    Row("sm100", 2, 256, Tile(64, 64, 4, 2), "174 registers, 169 KB; 128 rows take 240"),
    Row("hip", 2, 64, Tile(64, 64, 4, 1), "228 registers: 2 waves a SIMD"),
    Row("hip", 2, 128, Tile(64, 32, 4, 1), "194 registers: 2 waves a SIMD"),
    Row("hip", 2, 256, Tile(64, 32, 4, 1), "290 to 366 registers; 64 keys: 16 hot spills"),
    Row(NVIDIA, 4, 64, Tile(64, 32, 8, 1), "104 registers; 64 keys spill"),
    Row(NVIDIA, 4, 128, Tile(32, 32, 8, 1), "118 registers, 64 KB"),
    Row(NVIDIA, 4, 256, Tile(16, 16, 4, 1), "112 registers, 64 KB; more does not fit sm86"),
    Row("hip", 4, 96, Tile(64, 32, 8, 1), "172 to 255 registers"),
    Row("hip", 4, 128, Tile(32, 32, 4, 1), "356 registers; 8 warps: 77 hot spills"),
    Row("hip", 4, 256, Tile(32, 16, 4, 1), "297 registers; 32 keys take 511"),
)
# block_m is the loop here, block_n what a program owns.
BACKWARD_DKV: tuple[Row, ...] = (
    INTERPRETER,
    Row("sm80 sm86", 2, 64, Tile(64, 128, 8, 2), "255 registers, 53 KB, 16 rows a warp"),
    Row("sm80 sm86", 2, 96, Tile(64, 128, 8, 2), "255 registers, 73 KB", plain=True),
    Row("sm80 sm86", 2, 80, Tile(64, 64, 4, 2), "255 registers, 43 KB; 128 keys: 8 hot spills"),
    Row("sm80 sm86", 2, 96, Tile(32, 64, 4, 1), "255 registers, 38 KB; 64 rows: 35 hot spills"),
    Row("sm80 sm86", 2, 128, Tile(64, 64, 4, 2), "255 registers, 73 KB; 128 keys: 57 hot spills"),
    Row("sm80", 2, 192, Tile(128, 32, 8, 2), "244 registers, 129 KB; 64 x 64 spills"),
    Row("sm80", 2, 256, Tile(64, 64, 8, 2), "255 registers, 137 KB"),
    Row("sm86", 2, 192, Tile(64, 32, 4, 2), "251 registers, 77 KB"),
    Row("sm86", 2, 256, Tile(32, 32, 4, 1), "255 registers, 72 KB; 64 keys take 104"),
    Row("sm90", 2, 96, Tile(64, 64, 4, 2), "one warpgroup, 222 to 255 registers, 49 to 75 KB"),
    Row("sm90", 2, 128, Tile(64, 64, 4, 2), "one warpgroup, 255 registers, 97 KB", plain=True),
    Row("sm90", 2, 128, Tile(64, 64, 8, 2), "234 registers; 4 warps spill with a term"),
    Row("sm90", 2, 256, Tile(64, 32, 4, 1), "255 registers, 104 KB; 64 keys: 88 hot spills"),
    # 128 x 128 beyond a head dim of 64, and 64 x 128 beyond 128, would need more than the 512
    # columns of tensor memory; Triton then emits a kernel that only traps.
    Row("sm100", 2, 128, Tile(64, 128, 8, 2), "132 to 206 registers, 83 to 209 KB"),
    Row("sm100", 2, 256, Tile(64, 64, 8, 2), "127 to 250 registers, 148 to 205 KB"),
    Row("hip", 2, 64, Tile(64, 64, 4, 1), "246 registers: 2 waves a SIMD"),
    Row("hip", 2, 128, Tile(32, 64, 4, 1), "266 registers; 64 rows take 345"),
    Row("hip", 2, 256, Tile(32, 64, 4, 1), "360 to 468 registers; 64 x 32: 77 hot spills"),
    Row(NVIDIA, 4, 64, Tile(64, 32, 8, 1), "112 registers, 64 KB"),
    Row(NVIDIA, 4, 128, Tile(32, 32, 8, 1), "144 registers, 72 KB"),
    Row(NVIDIA, 4, 256, Tile(16, 16, 4, 1), "168 registers, 66 KB; more does not fit sm86"),
    Row("hip", 4, 64, Tile(32, 32, 8, 1), "204 to 224 registers; 64 rows: 36 hot spills"),
    Row("hip", 4, 128, Tile(32, 32, 4, 1), "327 to 444 registers; 8 warps: 66 hot spills"),
    Row("hip", 4, 256, Tile(32, 16, 4, 1), "360 to 481 registers; 8 warps: 50 hot spills"),
)
BACKWARD_DBIAS: tuple[Row, ...] = (
    INTERPRETER,
    Row("sm80 sm86", 2, 80, Tile(128, 64, 8, 2), "255 registers, 60 KB, 15 instructions"),
    Row("sm80 sm86", 2, 128, Tile(128, 32, 8, 2), "186 registers, 80 KB; 64 x 64: 8 hot spills"),
    Row("sm80", 2, 256, Tile(128, 32, 8, 2), "195 to 255 registers, 160 KB"),
    Row("sm86", 2, 256, Tile(64, 32, 4, 2), "255 registers, 96 KB; 128 rows take 120"),
    Row("sm90", 2, 128, Tile(64, 64, 4, 2), "one warpgroup, 213 to 247 registers, 128 KB"),
    Row("sm90", 2, 192, Tile(64, 64, 8, 2), "188 registers, 196 KB; 4 warps: 9 hot spills"),
    Row("sm90", 2, 256, Tile(64, 32, 4, 2), "180 registers, 192 KB; 64 keys take 260"),
    Row("sm100", 2, 128, Tile(128, 64, 8, 2), "255 registers, 197 KB"),
    Row("sm100", 2, 256, Tile(64, 64, 8, 2), "216 registers, 137 KB; 128 rows: 22 hot spills"),
    Row("hip", 2, 64, Tile(128, 64, 4, 1), "215 registers: 2 waves a SIMD"),
    Row("hip", 2, 128, Tile(64, 64, 4, 1), "198 registers: 2 waves a SIMD"),
    Row("hip", 2, 256, Tile(128, 64, 4, 1), "341 registers"),
    Row(NVIDIA, 4, 64, Tile(64, 32, 8, 1), "118 registers; 64 keys spill"),
    Row(NVIDIA, 4, 128, Tile(32, 32, 8, 1), "80 registers, 64 KB"),
    Row(NVIDIA, 4, 256, Tile(16, 16, 4, 1), "94 registers, 64 KB"),
    Row("hip", 4, 80, Tile(64, 32, 8, 1), "222 to 236 registers: 2 waves a SIMD"),
    Row("hip", 4, 256, Tile(32, 32, 4, 1), "316 to 491 registers; 8 warps: 15 hot spills"),
)
DELTA = Tile(32, 0, 4, 1)  # one pass over two tensors: 128 threads times 16 bytes and more

# Windows: the term is gathered from the table, one load an element, which takes more registers
# than a plane does, and a tile of 64 rows leaves less of a window's last one idle than 128 (a
# window of 144: 3 tiles, or 2 of which one has 16 rows). Published head dims end at 64; larger ones
# take the tiles above. Float32 too: it spills nowhere inside a loop.
INTERPRETER_WINDOW = Row("cpu", 4, 256, Tile(64, 64, 4, 1), "interpreter: 65 tokens are two tiles")
GPUS = f"{NVIDIA} hip"
WINDOW_FORWARD: tuple[Row, ...] = (
    INTERPRETER_WINDOW,
    Row(GPUS, 2, 64, Tile(64, 64, 4, 2), "80 to 248 registers; 128 rows: 130 hot spills on sm90"),
    *FORWARD,
)
WINDOW_DQ: tuple[Row, ...] = (
    INTERPRETER_WINDOW,
    Row(GPUS, 2, 64, Tile(64, 64, 4, 2), "137 to 255 registers, 24 to 45 KB"),
    *BACKWARD_DQ,
)
WINDOW_DKV: tuple[Row, ...] = (
    INTERPRETER_WINDOW,
    Row(GPUS, 2, 64, Tile(32, 64, 4, 2), "150 to 271 registers; 64 rows: 11 hot spills on sm90"),
    *BACKWARD_DKV,
)
WINDOW_DTABLE: tuple[Row, ...] = (
    INTERPRETER_WINDOW,
    Row(GPUS, 2, 64, Tile(64, 64, 8, 2), "120 to 255 registers; 4 warps: 18 hot spills on sm90"),
    *BACKWARD_DBIAS,
)
# The whole backward pass of a window that fits: block_m = block_n. Other types and head dims take
# the four kernels above.
WINDOW_BACKWARD: tuple[Row, ...] = (
    INTERPRETER_WINDOW,
    Row(GPUS, 2, 32, Tile(64, 64, 8, 1), "175 to 255 registers; sm90: 4 warps or 2 stages spill"),
)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Power-of-two blocks (D0, D1) covering ``head_dim``, each 0 or at least the 16 that a matrix
    instruction contracts; one block where two would not be smaller. None is wider than 128: on
    sm80 a product with more columns than rows is split by columns, and then each row of the softmax
    is spread over all warps. Beside 128 columns the second block has 64 or 128: with 32, every tile
    of the key gradient spills."""
    whole = max(16, next_power_of_2(head_dim))
    main = min(128, max(16, largest_power_of_2(head_dim)))
    tail = max(64 if main == 128 else 16, next_power_of_2(head_dim - main))
    one = main >= head_dim or (main + tail >= whole and whole <= 128)
    return (whole, 0) if one else (main, tail)


def ragged_tile(n: int, block: int) -> int:
    """Smallest tile for the last ``n % block`` rows, 0 if there are none."""
    rest = n % block
    return max(16, next_power_of_2(rest)) if rest else 0


def _fitting(
    table: tuple[Row, ...],
    device: Device,
    dtype: torch.dtype,
    head_dim: int,
    term: bool,
    computed: bool = False,
) -> Tile | None:
    size = 4 if device.arch == "cpu" else dtype.itemsize
    fitting = (
        row.tile
        for row in table
        if device.arch in row.archs.split()
        and row.itemsize == size
        and head_dim <= row.head_dim
        and not (term and row.plain)
        and not (computed and row.loaded)
    )
    return next(fitting, None)


def pick_tile(
    table: tuple[Row, ...],
    device: Device,
    dtype: torch.dtype,
    head_dim: int,
    n_q: int,
    n_k: int,
    term: bool,
    computed: bool = False,
) -> Tile:
    """The table's tile, cut down to short sequences. computed: the term is, in registers."""
    tile = _fitting(table, device, dtype, head_dim, term, computed)
    if tile is None:
        raise NotImplementedError(
            f"flash_attention: no tile for head dim {head_dim} in {dtype} on {device.arch}"
        )
    block_m = min(tile.block_m, max(16, next_power_of_2(n_q)))
    block_n = min(tile.block_n, max(16, next_power_of_2(n_k)))
    share = max(tile.block_m // block_m, 1)
    return Tile(block_m, block_n, max(1, tile.num_warps // share), tile.num_stages)


def pick_window_tile(device: Device, dtype: torch.dtype, head_dim: int, tokens: int) -> Tile | None:
    """The tile of WINDOW_BACKWARD cut down to a window of ``tokens``, None if it does not fit."""
    tile = _fitting(WINDOW_BACKWARD, device, dtype, head_dim, True)
    if tile is None or tokens > tile.block_m:
        return None
    block = max(16, next_power_of_2(tokens))
    warps = max(1, tile.num_warps * block // tile.block_m)
    return Tile(block, block, warps, tile.num_stages)


def head_constants(q: torch.Tensor, device: Device) -> dict[str, Any]:
    """The constants of the attention kernels that follow from the head dim and the dtype."""
    blocks = split_head_dim(q.shape[-1])
    fp32 = q.dtype == torch.float32
    tf32 = fp32 and torch.backends.cuda.matmul.allow_tf32 and device.arch.startswith("sm")
    return {
        "D": q.shape[-1],
        "D0": blocks[0],
        "D1": blocks[1],
        "PRECISION": "tf32" if tf32 else "ieee",
    }
