"""dilated_attention: every branch is the attention core over the slots of its segments, and the
branches are mixed by what their softmax sums are worth.

Slot i of a segment is the token ``start + phase + i * ratio``: a token map, nothing is gathered.
Slots behind the last token of a segment hold zeros; they come last, are counted and never loaded.
The forward pass is one launch for all branches, then one that mixes their rows. The backward pass
takes one branch after the other, each adding to float32 sums of dq, dk and dv: a row has one writer
at a time, so there are no atomics and results do not change from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import triton
import triton.language as tl

from . import _attention as core
from ._attention import load_rows, store_rows
from ._primitives import (
    LN2,
    LOG2E,
    AotSpec,
    Device,
    Launch,
    cdiv,
    device_of,
    next_power_of_2,
    run,
    token_strides,
)
from ._tiles import BACKWARD_DKV, BACKWARD_DQ, FORWARD, Row, Tile, head_constants, pick_tile

# ---- token map. map_args: tokens, batches, heads, and of each branch (first program, tiles of a
# segment, length, slots, ratio, heads of a phase, first row of its output, a quarter of its first
# row of statistics). All but batches and heads are kept as `opaque` makes them.


@triton.jit
def _branch_of(branches, pid):
    """The branch of program ``pid``, its numbers read."""
    begin, tiles, length, slots, ratio, group, row, stat = branches[0]
    for b in tl.static_range(1, len(branches)):
        here = pid >= branches[b][0] >> 2
        begin = tl.where(here, branches[b][0], begin)
        tiles = tl.where(here, branches[b][1], tiles)
        length = tl.where(here, branches[b][2], length)
        slots = tl.where(here, branches[b][3], slots)
        ratio = tl.where(here, branches[b][4], ratio)
        group = tl.where(here, branches[b][5], group)
        row = tl.where(here, branches[b][6], row)
        stat = tl.where(here, branches[b][7], stat)
    stat = stat >> 2
    return begin >> 2, tiles >> 2, length >> 2, slots >> 2, ratio >> 2, group >> 2, row >> 2, stat


@triton.jit
def _locate(map_args, pid, KEYS: tl.constexpr, DRIFT: tl.constexpr):
    """(batch, head, tile, origin of a segment's slots, queries, keys). The origin: (token of the
    first slot, ratio, its row in the output of the branches, its token in the output of the op, a
    quarter of its row of statistics, slots)."""
    tokens, batches, heads, branches = map_args
    tokens = tokens >> 2
    begin, tiles, length, slots, ratio, group, row, stat = _branch_of(branches, pid)
    pid -= begin
    tile = pid % tiles
    if not KEYS:
        tile = tiles - 1 - tile  # causal: the longest programs start first
    head = pid // tiles % heads
    plane = pid // tiles // heads
    segment = (plane // batches).to(tl.int64)
    phase = head // group
    start = segment * length
    n_k = (tl.minimum(length, tokens - start).to(tl.int32) - phase + ratio - 1) // ratio
    if DRIFT:
        start_out = segment * slots * ratio
        rest = tl.maximum(tokens - start_out - phase, 0).to(tl.int32)
        n_q = tl.minimum((rest + ratio - 1) // ratio, slots)
    else:
        start_out = start
        n_q = n_k
    rows = row + segment * slots
    stats = stat + segment * ((slots + 3) // 4)
    origin = (start + phase, ratio, rows, start_out + phase, stats, slots)
    return (plane % batches).to(tl.int64), head.to(tl.int64), tile, origin, n_q, n_k


@triton.jit
def locate_slots(map_args, pid, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    batch, head, tile, origin, n_q, n_k = _locate(map_args, pid, KEYS, False)
    return batch, head, tile * BLOCK, origin, n_q, origin, n_k


@triton.jit
def locate_drifting_slots(map_args, pid, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Results of a segment lie slots * ratio tokens behind those of the one before: the first ones
    may belong to tokens that are not its own, the last one may be that of a zero."""
    batch, head, tile, origin, n_q, n_k = _locate(map_args, pid, KEYS, True)
    return batch, head, tile * BLOCK, origin, n_q, origin, n_k


@triton.jit
def tokens_of_slots(map_args, origin, i):
    return origin[0] + i.to(tl.int64) * origin[1]


@triton.jit
def rows_of_slots(map_args, origin, i):
    return origin[2] + i


@triton.jit
def out_tokens_of_slots(map_args, origin, i):
    return origin[3] + i.to(tl.int64) * origin[1]


@triton.jit
def stats_of_slots(map_args, origin, i):
    """Consecutive and, at the start of a tile, a multiple of 4: for loads of several at once."""
    return origin[4] * 4 + i


@triton.jit
def zeros_of_segment(map_args, at, m):
    return (at[3][5] - at[6]).to(tl.float32)


@triton.jit
def zeros_before(map_args, at, m):
    return tl.maximum(m + 1 - at[6], 0).to(tl.float32)


# ---- mixing


@triton.jit
def _tile_of_tokens(map_args, pid, BLOCK: tl.constexpr):
    """(batch, head, first token, tokens, which of them exist)."""
    tokens, batches, heads, _ = map_args
    first = pid // heads // batches * BLOCK
    t = first + tl.arange(0, BLOCK)
    batch = (pid // heads % batches).to(tl.int64)
    return batch, (pid % heads).to(tl.int64), first, t, t < tokens >> 2


@triton.jit
def _rows_of_tokens(
    first, t, valid, head, branch, DRIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(rows of the tokens t in the output of a branch, in its statistics, whether it has them).
    A division of integers takes as long as all else that is done for a row: none is made where it
    can be avoided."""
    _, _, length, slots, ratio, group, row, stat = branch
    length, slots, ratio = length >> 2, slots >> 2, ratio >> 2
    pitch = slots * ratio if DRIFT else length
    segment = first // pitch
    place = t - segment * pitch
    if pitch >= BLOCK:
        crossed = (place >= pitch).to(tl.int32)
    else:
        crossed = place // pitch
    segment += crossed
    place -= crossed * pitch + (head // (group >> 2)).to(tl.int32)
    if length <= 1048576:
        # Right for multiples of ratio, which are 0.5 / ratio away from where it would round; the
        # error is below 0.32 / ratio. No others are covered.
        slot = ((place.to(tl.float32) + 0.5) * (1.0 / ratio.to(tl.float32))).to(tl.int32)
    else:
        slot = place // ratio
    covered = valid & (place >= 0) & (slot * ratio == place)
    out_row = (row >> 2) + segment * slots + slot
    stat_row = ((stat >> 2) + segment * ((slots + 3) // 4)) * 4 + slot
    return out_row.to(tl.int64), stat_row.to(tl.int64), covered


@triton.jit
def dilated_merge_kernel(
    parts_ptr, parts_lse_ptr, out_ptr, lse_ptr,
    parts_strides, stat_strides, out_strides, lse_strides, map_args,
    DRIFT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out = sum_b exp(lse_b - lse) out_b with lse = log sum_b exp(lse_b), over the branches that
    keep the token."""
    batch, head, first, t, valid = _tile_of_tokens(map_args, tl.program_id(0), BLOCK_M)
    branches = map_args[3]
    parts_ptr += (batch * parts_strides[0] + head * parts_strides[1]) * UNIT
    parts_lse_ptr += batch * stat_strides[0] + head * stat_strides[1]
    found = (_rows_of_tokens(first, t, valid, head, branches[0], DRIFT, BLOCK_M),)
    for b in tl.static_range(1, len(branches)):
        found = found + (_rows_of_tokens(first, t, valid, head, branches[b], DRIFT, BLOCK_M),)
    z = (tl.load(parts_lse_ptr + found[0][1], mask=found[0][2], other=float("-inf")) * LOG2E,)
    m_i = z[0]
    for b in tl.static_range(1, len(branches)):
        stats = tl.load(parts_lse_ptr + found[b][1], mask=found[b][2], other=float("-inf"))
        z = z + (stats * LOG2E,)
        m_i = tl.maximum(m_i, z[b])
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for b in tl.static_range(len(branches)):
        weight = tl.exp2(z[b] - shift)
        l_i += weight
        part = load_rows(
            parts_ptr, found[b][0] * UNIT, parts_strides[2], found[b][2], True, D, BLOCK_D, 0
        )  # fmt: skip
        acc += part[0].to(tl.float32) * weight[:, None]
    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    out_ptr += (batch * out_strides[0] + head * out_strides[1]) * UNIT
    tokens = t.to(tl.int64)
    acc = (acc * (1.0 / l_i)[:, None],)
    store_rows(out_ptr, tokens * UNIT, out_strides[2], valid, acc, D, BLOCK_D, 0)
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    lse_ptr += batch * lse_strides[0] + head * lse_strides[1]
    tl.store(lse_ptr + tokens * lse_strides[2], lse, mask=valid)


@triton.jit
def dilated_delta_kernel(
    grad_ptr, parts_ptr, lse_ptr, dlse_ptr, parts_lse_ptr, delta_ptr,
    grad_strides, parts_strides, lse_strides, dlse_strides, stat_strides, map_args,
    DRIFT: tl.constexpr, HAS_DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The statistics of every branch b, in the order of its slots: delta = sum_d grad * out_b -
    grad_lse, for the weights of the branches are constants, and the lse of all branches."""
    batch, head, first, t, valid = _tile_of_tokens(map_args, tl.program_id(0), BLOCK_M)
    branches = map_args[3]
    grad_ptr += (batch * grad_strides[0] + head * grad_strides[1]) * UNIT
    parts_ptr += (batch * parts_strides[0] + head * parts_strides[1]) * UNIT
    lse_ptr += batch * lse_strides[0] + head * lse_strides[1]
    parts_lse_ptr += batch * stat_strides[0] + head * stat_strides[1]
    delta_ptr += batch * stat_strides[0] + head * stat_strides[1]
    tokens = t.to(tl.int64)
    grad = load_rows(grad_ptr, tokens * UNIT, grad_strides[2], valid, True, D, BLOCK_D, 0)
    lse = tl.load(lse_ptr + tokens * lse_strides[2], mask=valid, other=0.0)
    dlse = tl.zeros([BLOCK_M], tl.float32)
    if HAS_DLSE:
        dlse_ptr += batch * dlse_strides[0] + head * dlse_strides[1]
        dlse = tl.load(dlse_ptr + tokens * dlse_strides[2], mask=valid, other=0.0).to(tl.float32)
    for b in tl.static_range(len(branches)):
        rows, stats, covered = _rows_of_tokens(first, t, valid, head, branches[b], DRIFT, BLOCK_M)
        part = load_rows(
            parts_ptr, rows * UNIT, parts_strides[2], covered, True, D, BLOCK_D, 0
        )  # fmt: skip
        delta = tl.sum(grad[0].to(tl.float32) * part[0].to(tl.float32), 1) - dlse
        tl.store(parts_lse_ptr + stats, lse, mask=covered)
        tl.store(delta_ptr + stats, delta, mask=covered)


# ---- launchers

MAX_BLOCK = max(row.tile.block_m for table in (FORWARD, BACKWARD_DKV, BACKWARD_DQ) for row in table)
# 64 rows of several tensors, 128 threads times 16 bytes and more.
MIX = Tile(64, 0, 4, 1)


def opaque(x: int) -> int:
    """Triton compiles a kernel anew for arguments that are 1 or multiples of 16. Lengths differ
    from slide to slide: they are passed as 4 x + 3, which is never either."""
    return 4 * x + 3


class _Branch(NamedTuple):
    length: int
    ratio: int
    segments: int
    slots: int
    row: int  # its first in the output of the branches
    rows: int
    stat: int  # a quarter of its first row of statistics

    def programs(self, block: int) -> int:
        """Of one batch and head."""
        return self.segments * cdiv(self.slots, block)


def _branches(
    tokens: int, heads: int, lengths: Sequence[int], ratios: Sequence[int], torchscale: bool
) -> tuple[list[_Branch], bool]:
    """(branches, whether segments drift)."""
    sizes = []
    for wanted, ratio in zip(lengths, ratios, strict=True):
        length = min(wanted, tokens)
        # Ratios above both of these are all alike; products of this one stay within tokens + heads.
        ratio = min(ratio, max(tokens, heads))
        sizes.append((length, ratio, cdiv(tokens, length), cdiv(length, ratio)))
    drift = torchscale and any(w % r and segments > 1 for w, r, segments, _ in sizes)
    result, row, stat = [], 0, 0
    for length, ratio, segments, slots in sizes:
        pitch = slots * ratio if drift else length
        last = min(segments, cdiv(tokens, pitch)) - 1
        rows = last * slots + min(slots, cdiv(tokens - last * pitch, ratio))
        result.append(_Branch(length, ratio, segments, slots, row, rows, stat))
        row += rows
        stat += segments * cdiv(slots, 4)
    return result, drift


@dataclass
class _Call:
    """One call, as its kernels see it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    segment_lengths: Sequence[int]
    dilation_ratios: Sequence[int]
    causal: bool
    scale: float
    torchscale: bool
    device: Device

    def __post_init__(self) -> None:
        self.batch, self.tokens, self.heads, self.head_dim = self.q.shape
        self.branches, self.drift = _branches(
            self.tokens, self.heads, self.segment_lengths, self.dilation_ratios, self.torchscale
        )
        self.rows = sum(branch.rows for branch in self.branches)
        self.slots = max(branch.slots for branch in self.branches)
        self.constants: dict[str, Any] = {
            "LOCATE": locate_drifting_slots if self.drift else locate_slots,
            "TOKENS": tokens_of_slots,
            "TERM": None,
            "CAUSAL": bool(self.causal),
            "FOLD": self.scale > 0,  # a scale <= 0 would turn the maximum around
            **head_constants(self.q, self.device),
        }
        self.zeros = zeros_before if self.causal else zeros_of_segment
        self.scale_log2 = self.scale * math.log2(math.e)

    def tile(self, table: tuple[Row, ...]):
        """One for all branches: each other one would be compiled."""
        dtype, n = self.q.dtype, self.slots
        return pick_tile(table, self.device, dtype, self.head_dim, n, n, term=False)

    def map_args(self, branches: Sequence[_Branch], block: int) -> tuple[tuple[Any, ...], int]:
        """(map_args, programs) of the attention over tiles of ``block`` slots."""
        described, begin = [], 0
        for b in branches:
            tiles, group = cdiv(b.slots, block), cdiv(self.heads, b.ratio)
            numbers = (begin, tiles, b.length, b.slots, b.ratio, group, b.row, b.stat)
            described.append(tuple(map(opaque, numbers)))
            begin += b.programs(block) * self.batch * self.heads
        return (opaque(self.tokens), self.batch, self.heads, tuple(described)), begin

    def statistics(self) -> torch.Tensor:
        """[B, H, rows of statistics]"""
        last = self.branches[-1]
        rows = 4 * (last.stat + last.segments * cdiv(last.slots, 4))
        # Padded for whole tiles, to a size that always is a multiple of 16 when compiled.
        shape = (self.batch, self.heads, cdiv(rows, 16) * 16 + MAX_BLOCK)
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def mixing(self, kernel: Any, args: tuple[Any, ...], strides: tuple[Any, ...], **constants):
        """A launch of a kernel that walks over tokens and knows all branches."""
        map_args, _ = self.map_args(self.branches, 1)
        return Launch(
            kernel,
            (cdiv(self.tokens, MIX.block_m) * self.batch * self.heads,),
            (*args, *strides, map_args),
            {"DRIFT": self.drift, **constants, "D": self.head_dim,
             "BLOCK_D": max(16, next_power_of_2(self.head_dim)), "BLOCK_M": MIX.block_m},
            MIX.num_warps,
            MIX.num_stages,
        )  # fmt: skip


def forward(
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,
    v: torch.Tensor,
    segment_lengths: Sequence[int],
    dilation_ratios: Sequence[int],
    causal: bool,
    scale: float,
    torchscale: bool,
    need_branches: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out like q, lse [B, H, N] float32, outputs of the branches [B, rows or 0, H, D])."""
    options = (segment_lengths, dilation_ratios, causal, scale, torchscale)
    out, lse, parts, launches = plan_forward(q, k, v, *options, device_of(q))
    run(launches, q)
    return out, lse, parts if need_branches else parts.new_empty((*q.shape[:1], 0, *q.shape[2:]))


def plan_forward(q, k, v, segment_lengths, dilation_ratios, causal, scale, torchscale, device):
    """Outputs and launches of :func:`forward` on ``device``, which meta tensors need not be on."""
    batch, n, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, n), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse, out.new_empty((batch, 0, heads, head_dim)), []
    options = (segment_lengths, dilation_ratios, causal, scale, torchscale)
    call = _Call(q, k, v, *options, device)
    # Zeros: rows that no head of a phase fills may be part of what the operator returns.
    parts = torch.zeros((batch, call.rows, heads, head_dim), dtype=q.dtype, device=q.device)
    parts_lse = call.statistics()
    tile = call.tile(FORWARD)
    longest_first = sorted(call.branches, key=lambda branch: -branch.slots)
    map_args, programs = call.map_args(longest_first, tile.block_m)
    unit, strides = token_strides(q, k, v, parts)
    attend = Launch(
        core.attention_fwd_kernel,
        (programs,),
        (q, k, v, parts, parts_lse, *strides, parts_lse.stride(), call.scale_log2, map_args, None),
        {**call.constants, "UNIT": unit, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
         "TAIL": tile.block_n, "OUT_TOKENS": rows_of_slots, "STAT_TOKENS": stats_of_slots,
         "ZEROS": call.zeros},
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip
    unit, (parts_strides, out_strides) = token_strides(parts, out)
    merge = call.mixing(
        dilated_merge_kernel,
        (parts, parts_lse, out, lse),
        (parts_strides, parts_lse.stride(), out_strides, lse.stride()),
        UNIT=unit,
    )
    return out, lse, parts, [attend, merge]


def _delta_launch(call: _Call, grad, grad_lse, lse, parts, stats) -> Launch:
    unit, (grad_strides, parts_strides) = token_strides(grad, parts)
    return call.mixing(
        dilated_delta_kernel,
        (grad, parts, lse, grad_lse, *stats),
        (grad_strides, parts_strides, lse.stride(),
         None if grad_lse is None else grad_lse.stride(), stats[0].stride()),
        HAS_DLSE=grad_lse is not None,
        UNIT=unit,
    )  # fmt: skip


def _gradient_launches(call: _Call, keys: bool, grad, stats):
    """([dk, dv] if ``keys``, else [dq], in the type they are summed in; a launch per branch)."""
    kernel = core.attention_bwd_dkv_kernel if keys else core.attention_bwd_dq_kernel
    tile = call.tile(BACKWARD_DKV if keys else BACKWARD_DQ)
    own, loop = (tile.block_n, tile.block_m) if keys else (tile.block_m, tile.block_n)
    # A branch of ratio 1 has every row. Taken first, it writes the sums, and the others add.
    order = sorted(range(len(call.branches)), key=lambda b: call.branches[b].ratio > 1)
    dense = call.branches[order[0]].ratio == 1
    exact = call.q.dtype == torch.float32 or (dense and len(order) == 1)
    make = torch.empty if dense else torch.zeros
    dtype = call.q.dtype if exact else torch.float32
    shape = call.q.shape
    sums = [make(shape, dtype=dtype, device=call.q.device) for _ in range(2 if keys else 1)]
    unit, strides = token_strides(call.q, call.k, call.v, grad, *sums)
    drifting = {"OUT_TOKENS": out_tokens_of_slots, "ZEROS": call.zeros} if call.drift else {}
    launches = []
    for b in order:
        map_args, programs = call.map_args([call.branches[b]], own)
        launches.append(
            Launch(
                kernel,
                (programs,),
                (call.q, call.k, call.v, grad, *stats, *sums, *strides[:4], stats[0].stride(),
                 *strides[4:], call.scale_log2, call.scale, map_args, None),
                {**call.constants, **drifting, "STAT_TOKENS": stats_of_slots,
                 "ADD": not dense or b != order[0], "UNIT": unit, "BLOCK_M": tile.block_m,
                 "BLOCK_N": tile.block_n, "TAIL": loop},
                tile.num_warps,
                tile.num_stages,
            )
        )  # fmt: skip
    return sums, launches


def backward(
    grad: torch.Tensor,  # like q, any strides
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    branch_out: torch.Tensor,  # [B, rows, H, D]
    segment_lengths: Sequence[int],
    dilation_ratios: Sequence[int],
    causal: bool,
    scale: float,
    torchscale: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv)"""
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    options = (segment_lengths, dilation_ratios, causal, scale, torchscale)
    call = _Call(q, k, v, *options, device_of(q))
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    stats = (call.statistics(), call.statistics())  # lse, delta
    run([_delta_launch(call, grad, grad_lse, lse, branch_out, stats)], q)

    def gradients(keys: bool) -> list[torch.Tensor]:
        sums, launches = _gradient_launches(call, keys, grad, stats)
        run(launches, q)
        return [t.to(q.dtype) for t in sums]

    # One after the other: the sums of dk and dv are gone before that of dq is made.
    dk, dv = gradients(keys=True)
    (dq,) = gradients(keys=False)
    return dq, dk, dv


def plan_call(
    n: int, lengths: Sequence[int], torchscale: bool, device: Device
) -> tuple[list[Launch], list[Launch]]:
    """Launches (forward, backward) of a call in Prov-GigaPath's encoder, for ``n`` tiles."""
    q = torch.empty(1, n, 16, 48, dtype=torch.bfloat16, device="meta")
    options = (lengths, (1, 2, 4, 8, 16), False, 48**-0.5, torchscale)
    out, lse, parts, launches = plan_forward(q, q, q, *options, device)
    call = _Call(q, q, q, *options, device)
    stats = (call.statistics(), call.statistics())
    backward_launches = [_delta_launch(call, out, None, lse, parts, stats)]
    for keys in (True, False):
        backward_launches += _gradient_launches(call, keys, out, stats)[1]
    return launches, backward_launches


GIGAPATH = (1024, 5792, 32768, 185363, 1048576)


def aot_specs() -> list[AotSpec]:
    """Calls worth compiling without a GPU: a slide of 10,000 tiles in Prov-GigaPath's encoder, and
    one of 30,000 with the segment lengths for which its published code drifts."""

    def call(name: str, n: int, lengths: Sequence[int], torchscale: bool) -> AotSpec:
        def launches(device: Device) -> list[Launch]:
            forward_launches, (delta, *gradients) = plan_call(n, lengths, torchscale, device)
            # All branches but the first are compiled to the same code.
            per_branch = len(gradients) // 2
            return [*forward_launches, delta, *gradients[:2], *gradients[per_branch:][:2]]

        return AotSpec(name, launches, matmul=True)

    return [
        call("gigapath_10k", 10_000, GIGAPATH, False),
        call("gigapath_30k_drifting", 30_000, (1024, 4870, 23170, 110217, 524288), True),
    ]
