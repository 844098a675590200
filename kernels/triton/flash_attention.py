"""flash_attention: dense and packed token maps over the attention core, with any score term.

The gradient of a term is reduced to the term's own shape inside kernels of its own
(_score_terms.py). No atomics anywhere: results do not change from run to run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl

from . import _attention as core
from ._primitives import (
    AotSpec,
    Device,
    Launch,
    cdiv,
    device_of,
    next_power_of_2,
    run,
    token_strides,
)
from ._score_terms import DecomposedTerm, DenseTerm, DistanceTerm, Term
from ._tiles import (
    BACKWARD_DKV,
    BACKWARD_DQ,
    DELTA,
    FORWARD,
    Row,
    Tile,
    head_constants,
    pick_tile,
    ragged_tile,
)

# ---- token maps


@triton.jit
def locate_dense(map_args, pid, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    n_q, n_k, heads = map_args
    tiles = tl.cdiv(n_k if KEYS else n_q, BLOCK)
    tile = pid % tiles
    if not KEYS:
        tile = tiles - 1 - tile  # causal: the longest programs start first
    batch = (pid // tiles // heads).to(tl.int64)
    head = (pid // tiles % heads).to(tl.int64)
    return batch, head, tile * BLOCK, 0, n_q, 0, n_k


@triton.jit
def tokens_dense(map_args, origin, i):
    return i.to(tl.int64)


@triton.jit
def _bounds(cu_ptr, sequence, sequences, total):
    """Tokens [begin, end) of a sequence, inside [0, total) whatever cu_seqlens holds."""
    begin = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), total)
    begin = tl.where(sequence == 0, 0, begin)
    end = tl.load(cu_ptr + tl.minimum(sequence + 1, sequences))
    return begin, tl.minimum(tl.maximum(end, begin), total)


@triton.jit
def locate_packed(map_args, pid, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence s owns the tile slots from cu[s] // BLOCK + s on: at least as many as it has tiles,
    and total // BLOCK + sequences + 1 in all, so the grid needs no value of cu_seqlens. Tokens
    behind the last sequence are one more, which attends nothing."""
    cu_q_ptr, cu_k_ptr, sequences, total_q, total_k, heads = map_args
    total = total_k if KEYS else total_q
    cu_ptr = cu_k_ptr if KEYS else cu_q_ptr
    slots = total // BLOCK + sequences + 1
    slot = pid % slots
    sequence = 0
    for start in range(1, sequences + 1, 128):
        i = start + tl.arange(0, 128)
        cu = tl.load(cu_ptr + i, mask=i <= sequences, other=0)
        first_slot = tl.minimum(tl.maximum(cu, 0), total) // BLOCK + i
        sequence += tl.sum(((i <= sequences) & (first_slot <= slot)).to(tl.int32), 0)
    begin_q, end_q = _bounds(cu_q_ptr, sequence, sequences, total_q)
    begin_k, end_k = _bounds(cu_k_ptr, sequence, sequences, total_k)
    if KEYS:
        end_k = tl.where(sequence == sequences, total_k, end_k)
        begin, end = begin_k, end_k
    else:
        end_q = tl.where(sequence == sequences, total_q, end_q)
        begin, end = begin_q, end_q
    tile = slot - begin // BLOCK - sequence
    first = tl.where(tile < 0, end - begin, tile * BLOCK)
    head = (pid // slots).to(tl.int64)
    return 0, head, first, begin_q, end_q - begin_q, begin_k, end_k - begin_k


@triton.jit
def tokens_packed(map_args, origin, i):
    return (origin + i).to(tl.int64)


# ---- launchers


@dataclass
class _Call:
    """One call, as its kernels see it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    term: Term | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    causal: bool
    scale: float
    device: Device

    def __post_init__(self) -> None:
        self.packed = self.cu_seqlens_q is not None
        if self.packed:
            self.batch, self.n_q, self.heads, self.head_dim = 1, *self.q.shape
            self.sequences = self.cu_seqlens_q.shape[0] - 1
        else:
            self.batch, self.n_q, self.heads, self.head_dim = self.q.shape
            self.sequences = self.batch
        self.n_k = self.k.shape[-3]
        self.constants: dict[str, Any] = {
            "CAUSAL": bool(self.causal),
            # A scale <= 0 would turn the maximum around.
            "FOLD": self.term is None and self.scale > 0,
            **head_constants(self.q, self.device),
        }
        self.map = {
            "LOCATE": locate_packed if self.packed else locate_dense,
            "TOKENS": tokens_packed if self.packed else tokens_dense,
        }
        self.scale_log2 = self.scale * math.log2(math.e)

    @property
    def map_args(self) -> tuple[Any, ...]:
        if self.packed:
            cu = (self.cu_seqlens_q, self.cu_seqlens_k)
            return (*cu, self.sequences, self.n_q, self.n_k, self.heads)
        return (self.n_q, self.n_k, self.heads)

    @property
    def term_args(self) -> tuple[Any, ...] | None:
        return None if self.term is None else self.term.args(self)

    def core(self, tile: Tile) -> dict[str, Any]:
        """The plug-ins and constants of a kernel of the core."""
        term = None if self.term is None else self.term.function(tile.block_n)
        return {**self.map, **self.constants, "TERM": term}

    def row_strides(self, t: torch.Tensor) -> tuple[int, int, int]:
        """(batch, head, token) of statistics [B, H, N] or [H, T]."""
        return (0 if self.packed else t.stride(0), t.stride(-2), t.stride(-1))

    def tile(self, table: tuple[Row, ...], n_k: int | None = None) -> Tile:
        """Packed sequences are taken to be equally long: their lengths are on the device. n_k: of
        the keys that a tile has to choose from, where that is fewer than all."""
        share = max(1, self.sequences) if self.packed else 1
        lengths = (cdiv(self.n_q, share), cdiv(self.n_k if n_k is None else n_k, share))
        of = (self.device, self.q.dtype, self.head_dim, *lengths)
        computed = self.term is not None and self.term.computed
        return pick_tile(table, *of, self.term is not None, computed)

    def programs(self, n: int, block: int) -> int:
        slots = n // block + self.sequences + 1 if self.packed else self.batch * cdiv(n, block)
        return slots * self.heads

    def key_tail(self, block_n: int) -> int:
        """Diagonal and packed tiles take the whole block: where they end is not known here."""
        return block_n if self.packed or self.causal else ragged_tile(self.n_k, block_n)

    def query_tail(self, block_m: int) -> int:
        return block_m if self.packed else ragged_tile(self.n_q, block_m)


def _forward_launches(call: _Call, out: torch.Tensor, lse: torch.Tensor) -> list[Launch]:
    tile = call.tile(FORWARD)
    q, k, v = call.q, call.k, call.v
    unit, strides = token_strides(q, k, v, out)
    return [
        Launch(
            core.attention_fwd_kernel,
            (call.programs(call.n_q, tile.block_m),),
            (q, k, v, out, lse, *strides, call.row_strides(lse), call.scale_log2, call.map_args,
             call.term_args),
            {**call.core(tile), "UNIT": unit, "BLOCK_M": tile.block_m,
             "BLOCK_N": tile.block_n, "TAIL": call.key_tail(tile.block_n)},
            tile.num_warps,
            tile.num_stages,
        )
    ]  # fmt: skip


def plan_forward(call: _Call):
    """(out like q, lse [B, H, Nq] or [H, Tq] float32), launches."""
    q = call.q
    *batch, n_q, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*batch, heads, n_q), dtype=torch.float32, device=q.device)
    return (out, lse), [] if out.numel() == 0 else _forward_launches(call, out, lse)


def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q = arguments[0]
    results, launches = plan_forward(_Call(*arguments, device_of(q)))
    run(launches, q)
    return results


def forward(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, causal, scale):
    """(out, lse) of vitkit::flash_attention_fwd; bias [B|1, H|1, Nq|1, Nk|1] or None."""
    term = None if bias is None else DenseTerm(bias)
    return _forward(q, k, v, term, cu_seqlens_q, cu_seqlens_k, causal, scale)


def forward_decomposed(q, k, v, rel_h, rel_w, causal, scale):
    return _forward(q, k, v, DecomposedTerm(rel_h, rel_w), None, None, causal, scale)


def forward_distance(q, k, v, slopes, coords_q, coords_k, causal, scale):
    term = DistanceTerm(slopes, coords_q, coords_k)
    return _forward(q, k, v, term, None, None, causal, scale)


def _backward_launches(call, grad, grad_lse, out, lse, delta, dq, dk, dv) -> list[Launch]:
    q, k, v = call.q, call.k, call.v
    rows = call.row_strides(lse)
    unit, (grad_strides, out_strides) = token_strides(grad, out)
    launches = [
        Launch(
            core.attention_delta_kernel,
            (call.programs(call.n_q, DELTA.block_m),),
            (grad, out, grad_lse, delta, grad_strides, out_strides,
             None if grad_lse is None else call.row_strides(grad_lse), rows, call.map_args),
            {**call.map, "HAS_DLSE": grad_lse is not None, "D": call.head_dim,
             "BLOCK_D": max(16, next_power_of_2(call.head_dim)), "UNIT": unit,
             "BLOCK_M": DELTA.block_m},
            DELTA.num_warps,
            DELTA.num_stages,
        )
    ]  # fmt: skip
    scalars = (call.scale_log2, call.scale, call.map_args, call.term_args)
    inputs = (q, k, v, grad, lse, delta)
    tile = call.tile(BACKWARD_DKV)
    unit, strides = token_strides(q, k, v, grad, dk, dv)
    launches.append(
        Launch(
            core.attention_bwd_dkv_kernel,
            (call.programs(call.n_k, tile.block_n),),
            (*inputs, dk, dv, *strides[:4], rows, *strides[4:], *scalars),
            {**call.core(tile), "UNIT": unit, "BLOCK_M": tile.block_m,
             "BLOCK_N": tile.block_n, "TAIL": call.query_tail(tile.block_m)},
            tile.num_warps,
            tile.num_stages,
        )
    )  # fmt: skip
    tile = call.tile(BACKWARD_DQ)
    unit, strides = token_strides(q, k, v, grad, dq)
    launches.append(
        Launch(
            core.attention_bwd_dq_kernel,
            (call.programs(call.n_q, tile.block_m),),
            (*inputs, dq, *strides[:4], rows, *strides[4:], *scalars),
            {**call.core(tile), "UNIT": unit, "BLOCK_M": tile.block_m,
             "BLOCK_N": tile.block_n, "TAIL": call.key_tail(tile.block_n)},
            tile.num_warps,
            tile.num_stages,
        )
    )  # fmt: skip
    return launches


def plan_backward(call: _Call, grad, grad_lse, out, lse, need_dterm):
    """((dq, dk, dv), partial sums of the gradients of the term or None, launches)."""
    q, k, v = call.q, call.k, call.v
    empty = q.numel() == 0 or k.numel() == 0
    make = torch.zeros if empty else torch.empty
    grads = tuple(make(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if empty:
        return grads, None, []
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    lse = lse.contiguous()
    launches = _backward_launches(call, grad, grad_lse, out, lse, delta, *grads)
    if not need_dterm:
        return grads, None, launches
    partials, more = call.term.gradients(call, grad, lse, delta)
    return grads, partials, launches + more


def _backward(saved, arguments: tuple[Any, ...], need_dterm: bool, count: int):
    """dq, dk, dv and ``count`` gradients of the term, empty ones unless needed."""
    q = arguments[0]
    call = _Call(*arguments, device_of(q))
    grads, partials, launches = plan_backward(call, *saved, need_dterm)
    run(launches, q)
    if not need_dterm:
        return (*grads, *(q.new_empty(0) for _ in range(count)))
    return (*grads, *(call.term.zeros() if partials is None else call.term.finish(partials)))


def backward(
    grad, grad_lse, q, k, v, out, lse, bias, cu_seqlens_q, cu_seqlens_k, causal, scale, need_dterm
):
    """(dq, dk, dv, dbias) of vitkit::flash_attention_bwd."""
    term = None if bias is None else DenseTerm(bias)
    call = (q, k, v, term, cu_seqlens_q, cu_seqlens_k, causal, scale)
    return _backward((grad, grad_lse, out, lse), call, need_dterm, 1)


def backward_decomposed(grad, grad_lse, q, k, v, out, lse, rel_h, rel_w, causal, scale, need_dterm):
    """(dq, dk, dv, drel_h, drel_w)"""
    call = (q, k, v, DecomposedTerm(rel_h, rel_w), None, None, causal, scale)
    return _backward((grad, grad_lse, out, lse), call, need_dterm, 2)


def backward_distance(
    grad, grad_lse, q, k, v, out, lse, slopes, coords_q, coords_k, causal, scale, need_dterm
):
    """(dq, dk, dv, dslopes)"""
    term = DistanceTerm(slopes, coords_q, coords_k)
    call = (q, k, v, term, None, None, causal, scale)
    return _backward((grad, grad_lse, out, lse), call, need_dterm, 1)


def aot_specs() -> list[AotSpec]:
    """Calls worth compiling without a GPU: the lengths and head dims of ViT-B, SigLIP and long
    sequences, every score term with its gradient, packed sequences."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call(
        name: str,
        n: int,
        head_dim: int,
        term: Term | None = None,
        batch: int = 8,
        packed: bool = False,
    ) -> AotSpec:
        def launches(device: Device) -> list[Launch]:
            tokens = (8 * n,) if packed else (batch, n)
            q, k, v = meta(*tokens, 3, 12, head_dim).unbind(-3)
            cu = meta(9, dtype=torch.int32) if packed else None
            call = _Call(q, k, v, term, cu, cu, False, head_dim**-0.5, device)
            (out, lse), forward_launches = plan_forward(call)
            return forward_launches + plan_backward(call, out, None, out, lse, term is not None)[2]

        return AotSpec(name, launches, matmul=True)

    rel = meta(1, 12, 4096, 64)
    coords = meta(1, 20000, 2, dtype=torch.float32)
    distance = DistanceTerm(meta(12, dtype=torch.float32), coords, coords)
    return [
        call("vit_b_197", 197, 64),
        call("siglip_head_dim_72", 256, 72),
        call("long_head_dim_128", 4096, 128),
        call("beit_learned_bias", 197, 64, DenseTerm(meta(1, 12, 197, 197))),
        call("packed_head_dim_64", 256, 64, packed=True),
        call("sam_b_global", 4096, 64, DecomposedTerm(rel, rel), batch=1),
        call("titan_20000_tiles", 20000, 64, distance, batch=1),
    ]
