"""window_attention: the window map and term of ``_window.py`` over the attention core.

The gradient of the table is a sum over windows and then along diagonals of the score matrix. A
program owns one tile of that matrix and a chunk of the windows: it sums ds over its windows in
registers and folds the sum onto the slots once. Partial sums are [programs, slots of a tile], added
up in a fixed order: no atomics, no [S, S] matrix in memory.

A window that fits one tile has its whole backward pass in one kernel. The rows are then read once
(the core's kernels for delta, dk and dv, and dq, and that of the table would read them three times
over), the scores are computed once, and the table's tile is gathered once for a chunk of windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl

from . import _attention as core
from . import _cosine
from ._attention import load_lse_delta, load_rows, score_grad_tile, term_tile, weight_tile
from ._cosine import (
    inverse_norms,
    pair_scale,
    row_grad,
    row_scale,
    sum_products,
    weigh_score_grad,
)
from ._primitives import (
    LOG2E,
    AotSpec,
    Device,
    Launch,
    cdiv,
    device_of,
    next_power_of_2,
    run,
)
from ._tiles import (
    DELTA,
    WINDOW_DKV,
    WINDOW_DQ,
    WINDOW_DTABLE,
    WINDOW_FORWARD,
    Row,
    Tile,
    pick_tile,
    pick_window_tile,
    ragged_tile,
    split_head_dim,
)
from ._window import (
    add_region_term,
    find_window,
    fold_tile,
    locate_window,
    table_term,
    tokens_window,
    window_dtable_sum_kernel,
    window_term,
)

SLOT_BLOCK = 64  # slots folded at once
REDUCE_PARTS, REDUCE_SLOTS = 32, 64


@triton.jit
def window_dtable_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, partial_ptr,
    q_strides, k_strides, v_strides, grad_strides, lse_strides,
    scale,  # times log2(e)
    map_args, term_args, windows,
    chunk,  # windows of one program
    TERM: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, SLOT_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, pads=None, log_gain_ptr=None,
):  # fmt: skip
    """partial [chunks, heads, query tiles, key tiles, SLOTS]: ds of a tile, summed over a chunk of
    the windows and folded."""
    heads, WH, WW = map_args[2], map_args[5], map_args[6]
    S: tl.constexpr = WH * WW
    TILES_M: tl.constexpr = (S + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    COSINE: tl.constexpr = log_gain_ptr is not None
    pid = tl.program_id(0)
    first_n = pid % TILES_N * BLOCK_N
    first_m = pid // TILES_N % TILES_M * BLOCK_M
    head = (pid // (TILES_M * TILES_N) % heads).to(tl.int64)
    lo = pid // (TILES_M * TILES_N) // heads * chunk
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    valid_n = offs_n < S
    pad = core.pad_rows(pads, head, D)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in tl.range(lo, tl.minimum(lo + chunk, windows)):
        batch, origin = find_window(map_args, window)
        at = (batch, head, first_m, origin, S, origin, S)
        t = term_tile(term_args, at, offs_m, offs_n, valid_n, True, 0, TERM)
        m = tokens_window(map_args, origin, offs_m)
        n = tokens_window(map_args, origin, offs_n) * UNIT
        valid_m = core.existing(m, offs_m, S, pads)
        q_row = q_ptr + (batch * q_strides[0] + head * q_strides[1]) * UNIT
        k_row = k_ptr + (batch * k_strides[0] + head * k_strides[1]) * UNIT
        v_row = v_ptr + (batch * v_strides[0] + head * v_strides[1]) * UNIT
        grad_row = grad_ptr + (batch * grad_strides[0] + head * grad_strides[1]) * UNIT
        q = load_rows(q_row, m * UNIT, q_strides[2], valid_m, True, D, D0, D1)
        k = load_rows(k_row, n, k_strides[2], valid_n, True, D, D0, D1, pad[0])
        statistics = batch * lse_strides[0] + head * lse_strides[1] + m * lse_strides[2]
        lse, delta = load_lse_delta(lse_ptr, delta_ptr, statistics, valid_m, True)
        row_factor = row_scale(q, head, scale, log_gain_ptr, D1)
        factor, inverse = pair_scale(row_factor, k, D1, COSINE)
        keep = valid_n[None, :]
        p = weight_tile(q, k, lse[:, None], factor, t, keep, False, True, D1, PRECISION)
        grad = load_rows(grad_row, m * UNIT, grad_strides[2], valid_m, True, D, D0, D1)
        v = load_rows(v_row, n, v_strides[2], valid_n, True, D, D0, D1, pad[1])
        acc += score_grad_tile(p, grad, v, delta[:, None], D1, PRECISION)
    partial_ptr += pid.to(tl.int64) * SLOTS
    fold_tile(acc, partial_ptr, first_m, first_n, WH, WW, SLOTS, SLOT_BLOCK, BLOCK_M, BLOCK_N)


@triton.jit
def window_bwd_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, partial_ptr,
    qkv_strides, grad_strides, out_strides, dqkv_strides, lse_strides,
    scale, dscale,  # scale times log2(e), scale
    map_args, term_args, windows,
    chunk,  # windows of one program
    FOLD: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, SLOT_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, pads=None, log_gain_ptr=None, dlog_gain_ptr=None, dpads_ptr=None,
):  # fmt: skip
    """All gradients of windows that are one tile, from one look at their rows: dq, dk and dv,
    dlog_gain [windows, heads], dpads [windows, heads, 2, D], and unless partial is None the
    gradient of the table as in window_dtable_kernel. The tile is transposed: rows are keys."""
    heads, WH, WW = map_args[2], map_args[5], map_args[6]
    S: tl.constexpr = WH * WW
    COSINE: tl.constexpr = log_gain_ptr is not None
    head = (tl.program_id(0) % heads).to(tl.int64)
    lo = tl.program_id(0) // heads * chunk
    i = tl.arange(0, BLOCK)
    inside = i < S
    pad = core.pad_rows(pads, head, D)
    n = i[:, None]
    m = tl.minimum(i, S - 1)[None, :]
    bias = None
    if term_args is not None:
        bias = table_term(term_args, head, m, n)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    # Hoisted, the arithmetic on (y, x) is held in registers by every layout: 20 spills.
    for window in tl.range(lo, tl.minimum(lo + chunk, windows), disable_licm=True):
        batch, origin = find_window(map_args, window)
        if term_args is not None:
            t = add_region_term(bias, term_args, origin, m, n)
        else:
            t = None
        tokens = tokens_window(map_args, origin, i)
        exists = core.existing(tokens, i, S, pads)
        row = (batch * qkv_strides[0] + head * qkv_strides[1]) * UNIT
        grad_row = grad_ptr + (batch * grad_strides[0] + head * grad_strides[1]) * UNIT
        out_row = out_ptr + (batch * out_strides[0] + head * out_strides[1]) * UNIT
        token = tokens * UNIT
        q = load_rows(q_ptr + row, token, qkv_strides[2], exists, True, D, D0, D1)
        k = load_rows(k_ptr + row, token, qkv_strides[2], inside, True, D, D0, D1, pad[0])
        v = load_rows(v_ptr + row, token, qkv_strides[2], inside, True, D, D0, D1, pad[1])
        grad = load_rows(grad_row, token, grad_strides[2], exists, True, D, D0, D1)
        out = load_rows(out_row, token, out_strides[2], exists, True, D, D0, D1)
        statistics = batch * lse_strides[0] + head * lse_strides[1] + tokens * lse_strides[2]
        lse = tl.load(lse_ptr + statistics, mask=exists, other=float("inf")) * LOG2E
        delta = sum_products(grad, out, D1)

        k_scale = row_scale(k, head, scale, log_gain_ptr, D1)
        factor, inverse = pair_scale(k_scale, q, D1, COSINE)
        keep = inside[:, None]
        p = weight_tile(k, q, lse[None, :], factor, t, keep, FOLD, True, D1, PRECISION)
        ds = score_grad_tile(p, v, grad, delta[None, :], D1, PRECISION)
        acc += ds
        dv = core.add_weighted_rows(core.zero_rows(BLOCK, D0, D1), p, grad, D1, PRECISION)
        w = weigh_score_grad(ds, inverse, q[0].dtype)
        dk = core.add_weighted_rows(core.zero_rows(BLOCK, D0, D1), w, q, D1, PRECISION)
        if COSINE:
            w = weigh_score_grad(ds, inverse_norms(k, D1)[:, None], q[0].dtype)
        w = tl.trans(w.to(q[0].dtype))
        dq = core.add_weighted_rows(core.zero_rows(BLOCK, D0, D1), w, k, D1, PRECISION)
        at_window = window * heads + head
        if COSINE:
            q_scale = row_scale(q, head, scale, log_gain_ptr, D1)
            dq, along = row_grad(dq, q, q_scale, D1)
            dk, beside = row_grad(dk, k, k_scale, D1)
            tl.store(dlog_gain_ptr + at_window, tl.sum(along, 0))
        else:
            dq = core.scale_rows(dq, dscale, D1)
            dk = core.scale_rows(dk, dscale, D1)
        row = (batch * dqkv_strides[0] + head * dqkv_strides[1]) * UNIT
        core.store_rows(dq_ptr + row, token, dqkv_strides[2], exists, dq, D, D0, D1)
        core.store_rows(dk_ptr + row, token, dqkv_strides[2], exists, dk, D, D0, D1)
        core.store_rows(dv_ptr + row, token, dqkv_strides[2], exists, dv, D, D0, D1)
        if pads is not None:
            dpad_ptr = dpads_ptr + at_window * 2 * D
            core.store_row_sums(dpad_ptr, dk, inside & (tokens < 0), D, D0, D1)
            core.store_row_sums(dpad_ptr + D, dv, inside & (tokens < 0), D, D0, D1)
    if partial_ptr is not None:
        partial_ptr += tl.program_id(0).to(tl.int64) * SLOTS
        fold_tile(tl.trans(acc), partial_ptr, 0, 0, WH, WW, SLOTS, SLOT_BLOCK, BLOCK, BLOCK)


# ---- launchers


def _one_token_axis(t: torch.Tensor) -> torch.Tensor:
    """[B, H, W, ...] with rows behind each other, so that a token has one index: itself if it is
    already so."""
    return t if t.stride(1) == t.shape[2] * t.stride(2) or t.shape[1] == 1 else t.contiguous()


@dataclass
class _Call:
    """One call, as its kernels see it."""

    qkv: torch.Tensor  # [B, H, W, 3, heads, D]
    bias_table: torch.Tensor | None
    logit_scale: torch.Tensor | None
    pad_value: torch.Tensor | None
    window: tuple[int, int]
    shift: tuple[int, int]
    scale: float
    roll_first: bool
    device: Device

    def __post_init__(self) -> None:
        self.qkv = _one_token_axis(self.qkv)
        self.batch, self.height, self.width, _, self.heads, self.head_dim = self.qkv.shape
        (wh, ww), (sh, sw) = self.window, self.shift
        rows, columns = cdiv(self.height, wh), cdiv(self.width, ww)
        self.windows = self.batch * rows * columns
        self.tokens = wh * ww
        self.ragged = self.height % wh != 0 or self.width % ww != 0
        window = (tl.constexpr(wh), tl.constexpr(ww))
        self.map_args = (
            self.height, self.width, self.heads, sh, sw, *window, tl.constexpr(self.ragged),
            tl.constexpr(self.ragged and self.roll_first),
        )  # fmt: skip
        limits = (rows * wh - sh, columns * ww - sw) if sh or sw else None
        term = self.bias_table is not None or limits is not None
        cosine = self.logit_scale is not None
        self.term_args = (self._table(), limits, *window) if term else None
        fp32 = self.qkv.dtype == torch.float32
        tf32 = fp32 and torch.backends.cuda.matmul.allow_tf32 and self.device.arch.startswith("sm")
        d0, d1 = split_head_dim(self.head_dim)
        self.constants: dict[str, Any] = {
            "TERM": window_term if term else None,
            "D": self.head_dim,
            "D0": d0,
            "D1": d1,
            "PRECISION": "tf32" if tf32 else "ieee",
        }
        self.map = {"LOCATE": locate_window, "TOKENS": tokens_window, "CAUSAL": False}
        # A scale <= 0 would turn the maximum around.
        self.map["FOLD"] = not term and not cosine and self.scale > 0
        self.scale_log2 = self.scale * math.log2(math.e)
        self.extra = {"pads": self._pads(), "log_gain_ptr": self.logit_scale}

    def _table(self) -> torch.Tensor | None:
        """[heads, slots], times log2(e): slots of a head are neighbours."""
        if self.bias_table is None:
            return None
        table = torch.empty_like(self.bias_table.t(), memory_format=torch.contiguous_format)
        return torch.mul(self.bias_table.t(), math.log2(math.e), out=table)

    def _pads(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.ragged:
            return None
        pad = self.pad_value
        if pad is None:
            pad = self.qkv.new_zeros(3, self.heads, self.head_dim)
        return pad[1], pad[2]

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.split(self.qkv)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, [B, H, W, heads, D]"""
        q, k, v = qkv.unbind(3)
        return q, k, v

    def by_head(self, t: torch.Tensor) -> torch.Tensor:
        return t.view(*t.shape[:3], self.heads, self.head_dim)

    def strides(self, *tensors: torch.Tensor) -> tuple[int, list[tuple[int, int, int]]]:
        """(unit, [(batch, head, token) in units of ``unit`` elements]) of [B, H, W, heads, D]."""
        triples = [(t.stride(0), t.stride(3), t.stride(2)) for t in tensors]
        unit = 8 if all(s % 8 == 0 for triple in triples for s in triple) else 1
        return unit, [tuple(s // unit for s in triple) for triple in triples]

    def tile(self, table: tuple[Row, ...]) -> Tile:
        term = self.constants["TERM"] is not None
        n = self.tokens
        return pick_tile(table, self.device, self.qkv.dtype, self.head_dim, n, n, term)

    def small_tile(self) -> Tile | None:
        """The tile of a backward pass in one kernel, None if the window does not fit one."""
        return pick_window_tile(self.device, self.qkv.dtype, self.head_dim, self.tokens)

    def programs(self, block: int) -> int:
        return self.windows * self.heads * cdiv(self.tokens, block)


def _statistics(t: torch.Tensor) -> tuple[int, int, int]:
    """(batch, head, token) strides of [B, H, W, heads]."""
    return (t.stride(0), t.stride(3), t.stride(2))


def forward(
    qkv: torch.Tensor,  # [B, H, W, 3, heads, D]
    bias_table: torch.Tensor | None,  # [(2 wh - 1) (2 ww - 1), heads] float32
    logit_scale: torch.Tensor | None,  # [heads] float32
    pad_value: torch.Tensor | None,  # [3, heads, D]
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    scale: float,
    roll_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, H, W, heads * D], lse [B, H, W, heads] float32)."""
    arguments = (bias_table, logit_scale, pad_value, window_size, shift_size, scale, roll_first)
    out, lse, launches = plan_forward(qkv, *arguments, device_of(qkv))
    run(launches, qkv)
    return out, lse


def plan_forward(qkv, *arguments):
    """Outputs and launches of :func:`forward` on the device ``arguments`` end with."""
    b, h, w, _, heads, d = qkv.shape
    out = torch.empty((b, h, w, heads * d), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((b, h, w, heads), dtype=torch.float32, device=qkv.device)
    if out.numel() == 0:
        return out, lse, []
    call = _Call(qkv, *arguments)
    tile = call.tile(WINDOW_FORWARD)
    unit, strides = call.strides(*call.rows, call.by_head(out))
    launch = Launch(
        core.attention_fwd_kernel,
        (call.programs(tile.block_m),),
        (*call.rows, out, lse, *strides, _statistics(lse), call.scale_log2, call.map_args,
         call.term_args),
        {**call.map, **call.constants, **call.extra, "UNIT": unit, "BLOCK_M": tile.block_m,
         "BLOCK_N": tile.block_n, "TAIL": ragged_tile(call.tokens, tile.block_n)},
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip
    return out, lse, [launch]


@dataclass
class _Partials:
    """What backward kernels leave to be summed; None where nothing asks for it."""

    dtable: torch.Tensor | None = None
    dlog_gain: torch.Tensor | None = None
    dpads: torch.Tensor | None = None


def _delta_launch(call: _Call, grad, out, lse, delta) -> Launch:
    unit, strides = call.strides(call.by_head(grad), call.by_head(out))
    return Launch(
        core.attention_delta_kernel,
        (call.programs(DELTA.block_m),),
        (grad, out, None, delta, *strides, None, _statistics(lse), call.map_args),
        {"LOCATE": locate_window, "TOKENS": tokens_window, "HAS_DLSE": False, "D": call.head_dim,
         "BLOCK_D": max(16, next_power_of_2(call.head_dim)), "UNIT": unit,
         "BLOCK_M": DELTA.block_m, "pads": call.extra["pads"]},
        DELTA.num_warps,
        DELTA.num_stages,
    )  # fmt: skip


def _row_launches(call: _Call, grad, lse, delta, dqkv, partials: _Partials) -> list[Launch]:
    """Gradients of k and v, then of q."""
    dq, dk, dv = call.split(dqkv)
    q, k, v = call.rows
    inputs = (q, k, v, grad, lse, delta)
    scalars = (call.scale_log2, call.scale, call.map_args, call.term_args)
    unit, strides = call.strides(q, k, v, call.by_head(grad), dq)
    shared = (*strides[:4], _statistics(lse))
    launches = []
    for kernel, table, outputs in (
        (core.attention_bwd_dkv_kernel, WINDOW_DKV, (dk, dv)),
        (core.attention_bwd_dq_kernel, WINDOW_DQ, (dq,)),
    ):
        tile = call.tile(table)
        own, loop = (tile.block_n, tile.block_m) if len(outputs) == 2 else tile[:2]
        extra: dict[str, Any] = {}
        if len(outputs) == 1 and call.logit_scale is not None:
            shape = (call.windows, call.heads, cdiv(call.tokens, own))
            partials.dlog_gain = extra["dlog_gain_ptr"] = lse.new_empty(shape)
        if len(outputs) == 2 and call.ragged:
            shape = (call.windows, call.heads, cdiv(call.tokens, own), 2, call.head_dim)
            partials.dpads = extra["dpads_ptr"] = lse.new_empty(shape)
        launches.append(
            Launch(
                kernel,
                (call.programs(own),),
                (*inputs, *outputs, *shared, *strides[4:] * len(outputs), *scalars),
                {**call.map, **call.constants, **call.extra, **extra, "UNIT": unit,
                 "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                 "TAIL": ragged_tile(call.tokens, loop)},
                tile.num_warps,
                tile.num_stages,
            )
        )  # fmt: skip
    return launches


def _small_launches(call: _Call, tile: Tile, grad, out, lse, dqkv, dtable, partials):
    """The whole backward pass where a window is one tile."""
    block = tile.block_m
    chunks = _chunks(call, call.heads)
    chunk = cdiv(call.windows, chunks)
    chunks = cdiv(call.windows, chunk)
    slots = _tile_slots(call, block, block)
    partial = None if dtable is None else lse.new_empty(chunks, call.heads, slots)
    extra: dict[str, Any] = {}
    if call.logit_scale is not None:
        partials.dlog_gain = extra["dlog_gain_ptr"] = lse.new_empty(call.windows, call.heads, 1)
    if call.ragged:
        shape = (call.windows, call.heads, 1, 2, call.head_dim)
        partials.dpads = extra["dpads_ptr"] = lse.new_empty(shape)
    rows, drows = call.rows, call.split(dqkv)
    unit, strides = call.strides(rows[0], call.by_head(grad), call.by_head(out), drows[0])
    constants = {**call.constants, **call.extra, **extra, "FOLD": call.map["FOLD"]}
    del constants["TERM"]
    whole = Launch(
        window_bwd_kernel,
        (chunks * call.heads,),
        (*rows, grad, out, lse, *drows, partial, *strides, _statistics(lse), call.scale_log2,
         call.scale, call.map_args, call.term_args, call.windows, chunk),
        {**constants, "UNIT": unit, "BLOCK": block, "SLOTS": slots, "SLOT_BLOCK": SLOT_BLOCK},
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip
    if dtable is None:
        return [whole]
    blocks = {"BLOCK_M": block, "BLOCK_N": block, "SLOTS": slots}
    return [whole, _dtable_sum_launch(call, partial, dtable, chunks, blocks)]


def _chunks(call: _Call, programs: int) -> int:
    """Into how many parts to cut the windows, for every multiprocessor to be busy."""
    return min(call.windows, cdiv(4 * call.device.units, programs))


def _tile_slots(call: _Call, block_m: int, block_n: int) -> int:
    """Slots that a tile of the score matrix may touch: all dx, and a range of dy."""
    wh, ww = call.window
    spans = (min(wh, (block + ww - 2) // ww + 1) for block in (block_m, block_n))
    return min(2 * wh - 1, sum(spans) - 1) * (2 * ww - 1)


def _dtable_launches(call: _Call, grad, lse, delta, dtable) -> list[Launch]:
    tile = call.tile(WINDOW_DTABLE)
    q, k, v = call.rows
    unit, strides = call.strides(q, k, v, call.by_head(grad))
    tiles = cdiv(call.tokens, tile.block_m) * cdiv(call.tokens, tile.block_n)
    chunks = _chunks(call, tiles * call.heads)
    chunk = cdiv(call.windows, chunks)
    chunks = cdiv(call.windows, chunk)
    slots = _tile_slots(call, tile.block_m, tile.block_n)
    partial = lse.new_empty(chunks, call.heads, tiles, slots)
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SLOTS": slots}
    fold = Launch(
        window_dtable_kernel,
        (chunks * call.heads * tiles,),
        (q, k, v, grad, lse, delta, partial, *strides, _statistics(lse), call.scale_log2,
         call.map_args, call.term_args, call.windows, chunk),
        {**call.constants, **call.extra, **blocks, "UNIT": unit, "SLOT_BLOCK": SLOT_BLOCK},
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip
    return [fold, _dtable_sum_launch(call, partial, dtable, chunks * tiles, blocks)]


def _dtable_sum_launch(call: _Call, partial, dtable, parts: int, blocks) -> Launch:
    wh, ww = call.window
    return Launch(
        window_dtable_sum_kernel,
        (cdiv(dtable.shape[0], REDUCE_SLOTS), call.heads),
        (partial, dtable, call.heads, parts),
        {**blocks, "WH": wh, "WW": ww, "PARTS": REDUCE_PARTS, "SLOT_BLOCK": REDUCE_SLOTS},
        4,
        1,
    )


def backward(
    grad: torch.Tensor,  # [B, H, W, heads * D], any strides
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias_table: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    pad_value: torch.Tensor | None,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    scale: float,
    roll_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dqkv, dbias_table, dlogit_scale, dpad_value); empty for what is None."""
    arguments = (bias_table, logit_scale, pad_value, window_size, shift_size, scale, roll_first)
    call = _Call(qkv, *arguments, device_of(qkv))
    dqkv, dtable, partials, launches = plan_backward(call, grad, out, lse)
    run(launches, qkv)
    none = qkv.new_empty(0)
    dlogit_scale = dpad = none
    if logit_scale is not None:
        clamped = logit_scale > _cosine.MAX_LOG_GAIN.value
        dlogit_scale = torch.where(clamped, 0.0, partials.dlog_gain.sum((0, 2)))
    if pad_value is not None:
        dpad = torch.zeros_like(pad_value)
        if partials.dpads is not None:  # pads have no query, and so no gradient of it
            dpad[1:] = partials.dpads.sum((0, 2)).transpose(0, 1)
    return dqkv, none if dtable is None else dtable, dlogit_scale, dpad


def plan_backward(call: _Call, grad, out, lse):
    """(dqkv, dtable or None, partial sums, launches)"""
    grad = _one_token_axis(grad if grad.stride(-1) == 1 else grad.contiguous())
    lse = lse.contiguous()
    dqkv = torch.empty(call.qkv.shape, dtype=call.qkv.dtype, device=call.qkv.device)
    dtable = None if call.bias_table is None else torch.empty_like(call.bias_table)
    partials = _Partials()
    tile = call.small_tile()
    if tile is not None:
        launches = _small_launches(call, tile, grad, out, lse, dqkv, dtable, partials)
        return dqkv, dtable, partials, launches
    delta = torch.empty_like(lse)
    launches = [_delta_launch(call, grad, out, lse, delta)]
    launches += _row_launches(call, grad, lse, delta, dqkv, partials)
    if dtable is not None:
        launches += _dtable_launches(call, grad, lse, delta, dtable)
    return dqkv, dtable, partials, launches


def aot_specs() -> list[AotSpec]:
    """Calls worth compiling without a GPU: first stages of Swin-T, Swin-B at 384 and Swin V2, and a
    detector's map that the window does not divide."""

    def call(name: str, size: tuple[int, int], window: int, heads: int, cosine=False) -> AotSpec:
        def launches(device: Device) -> list[Launch]:
            def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
                return torch.empty(*shape, dtype=dtype, device="meta")

            qkv = meta(8, *size, 3, heads, 32, dtype=torch.bfloat16)
            table, gain = meta((2 * window - 1) ** 2, heads), meta(heads) if cosine else None
            pad = meta(3, heads, 32, dtype=torch.bfloat16)
            shift = window // 2
            arguments = (table, gain, pad, (window,) * 2, (shift,) * 2, 32**-0.5, False, device)
            out, lse, forward_launches = plan_forward(qkv, *arguments)
            call = _Call(qkv, *arguments)
            return forward_launches + plan_backward(call, out, out, lse)[3]

        return AotSpec(name, launches, matmul=True)

    return [
        call("swin_t_window_7", (56, 56), 7, 3),
        call("swin_detector_padded", (200, 334), 7, 3),
        call("swin_b_window_12", (96, 96), 12, 4),
        call("swin_v2_window_16", (64, 64), 16, 3, cosine=True),
        call("swin_v2_window_24", (96, 96), 24, 6, cosine=True),
    ]
