"""flash_attention: dense and packed token maps, bias and mask terms over the attention core.

The gradient of a bias is reduced to the bias's own shape inside a kernel of its own: a program owns
a tile of the bias and walks over everything the tile is shared by (batches, heads, and the query or
key tiles of a bias that broadcasts there), so no [B, H, Nq, Nk] buffer exists unless the bias
itself is one. No atomics anywhere: results do not change from run to run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl

from . import _attention as core
from ._attention import load_lse_delta, load_rows, score_grad_tile, term_tile, weight_tile
from ._primitives import (
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
from ._tiles import (
    BACKWARD_DBIAS,
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


# ---- score terms. args: pointer, then strides of batch, head, query, key, None where it broadcasts


@triton.jit
def _load_plane(term_args, batch, head, m, n, inside):
    ptr, stride_batch, stride_head, stride_m, stride_n = term_args
    if stride_batch is not None:
        ptr += batch * stride_batch
    if stride_head is not None:
        ptr += head * stride_head
    if stride_m is not None:
        ptr += m.to(tl.int64) * stride_m
    # A constexpr condition does not end a function early: what follows a return is compiled too.
    if stride_n is not None:
        ptr += n.to(tl.int64) * stride_n
    if stride_n is not None and inside is not None:
        return tl.load(ptr, mask=inside, other=0)
    else:
        return tl.load(ptr)


@triton.jit
def bias_term(term_args, batch, head, origin, m, n, inside):
    bias = _load_plane(term_args, batch, head, m, n, inside).to(tl.float32)
    scaled = bias * LOG2E
    if term_args[0].dtype.element_ty != tl.float16:
        # torch.finfo.min as a bias: a row that has nothing else still attends, evenly.
        scaled = tl.where((scaled == float("-inf")) & (bias > float("-inf")), -3.0e38, scaled)
    return scaled


@triton.jit
def mask_term(term_args, batch, head, origin, m, n, inside):
    return _load_plane(term_args, batch, head, m, n, inside) != 0


# ---- bias gradient


@triton.jit
def attention_dbias_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dbias_ptr,
    q_strides, k_strides, v_strides, grad_strides, lse_strides,
    scale,  # times log2(e)
    term_args, n_q, n_k,
    own,  # of the bias: batches, heads, query tiles, key tiles
    shared,  # what each of them is shared by: batches, heads, query tiles, key tiles
    chunk,  # steps of one program; several programs share a tile if there are few tiles
    TERM: tl.constexpr, CAUSAL: tl.constexpr, REDUCE_M: tl.constexpr,
    REDUCE_N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbias [chunks, batches, heads, Nq or 1, Nk or 1]: sum of ds over what shares the bias."""
    pid = tl.program_id(0)
    own_n = pid % own[3]
    own_m = pid // own[3] % own[2]
    own_head = pid // own[3] // own[2] % own[1]
    plane = pid // own[3] // own[2]  # (chunk, batch, head)
    own_batch = plane // own[1] % own[0]
    lo = plane // own[1] // own[0] * chunk
    hi = tl.minimum(lo + chunk, shared[0] * shared[1] * shared[2] * shared[3])
    if CAUSAL and not REDUCE_M and not REDUCE_N:
        hi = tl.where(own_n * BLOCK_N > own_m * BLOCK_M + BLOCK_M - 1, lo, hi)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(lo, hi):
        offs_n = (own_n + step % shared[3]) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_m = (own_m + step // shared[3] % shared[2]) * BLOCK_M + tl.arange(0, BLOCK_M)
        step_head = step // shared[3] // shared[2]
        head = (own_head + step_head % shared[1]).to(tl.int64)
        batch = (own_batch + step_head // shared[1]).to(tl.int64)
        valid_m = offs_m < n_q
        valid_n = offs_n < n_k
        at = (batch, head, 0, 0, n_q, 0, n_k)
        t = term_tile(term_args, at, offs_m, offs_n, valid_n, True, 0, TERM)
        m = offs_m.to(tl.int64)
        n = offs_n.to(tl.int64) * UNIT
        q_row = q_ptr + (batch * q_strides[0] + head * q_strides[1]) * UNIT
        k_row = k_ptr + (batch * k_strides[0] + head * k_strides[1]) * UNIT
        v_row = v_ptr + (batch * v_strides[0] + head * v_strides[1]) * UNIT
        grad_row = grad_ptr + (batch * grad_strides[0] + head * grad_strides[1]) * UNIT
        q = load_rows(q_row, m * UNIT, q_strides[2], valid_m, True, D, D0, D1)
        k = load_rows(k_row, n, k_strides[2], valid_n, True, D, D0, D1)
        statistics = batch * lse_strides[0] + head * lse_strides[1] + m * lse_strides[2]
        lse, delta = load_lse_delta(lse_ptr, delta_ptr, statistics, valid_m, True)
        keep = valid_n[None, :]
        if CAUSAL:
            keep = keep & (offs_n[None, :] <= offs_m[:, None])
        p = weight_tile(q, k, lse[:, None], scale, t, keep, False, True, D1, PRECISION)
        grad = load_rows(grad_row, m * UNIT, grad_strides[2], valid_m, True, D, D0, D1)
        v = load_rows(v_row, n, v_strides[2], valid_n, True, D, D0, D1)
        acc += score_grad_tile(p, grad, v, delta[:, None], D1, PRECISION)

    size_m = 1 if REDUCE_M else n_q
    size_n = 1 if REDUCE_N else n_k
    offs_m = tl.arange(0, 1) if REDUCE_M else own_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, 1) if REDUCE_N else own_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if REDUCE_M:
        acc = tl.sum(acc, 0, keep_dims=True)
    if REDUCE_N:
        acc = tl.sum(acc, 1, keep_dims=True)
    row = (plane.to(tl.int64) * size_m + offs_m)[:, None] * size_n
    tl.store(
        dbias_ptr + row + offs_n[None, :],
        acc.to(dbias_ptr.dtype.element_ty),
        mask=(offs_m < size_m)[:, None] & (offs_n < size_n)[None, :],
    )


# ---- launchers


@dataclass
class _Call:
    """One call, as its kernels see it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
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
            "TERM": None if self.bias is None else mask_term if self._mask else bias_term,
            "CAUSAL": bool(self.causal),
            # A scale <= 0 would turn the maximum around.
            "FOLD": self.bias is None and self.scale > 0,
            **head_constants(self.q, self.device),
        }
        self.map = {
            "LOCATE": locate_packed if self.packed else locate_dense,
            "TOKENS": tokens_packed if self.packed else tokens_dense,
        }
        self.scale_log2 = self.scale * math.log2(math.e)

    @property
    def _mask(self) -> bool:
        return self.bias is not None and self.bias.dtype == torch.bool

    @property
    def map_args(self) -> tuple[Any, ...]:
        if self.packed:
            cu = (self.cu_seqlens_q, self.cu_seqlens_k)
            return (*cu, self.sequences, self.n_q, self.n_k, self.heads)
        return (self.n_q, self.n_k, self.heads)

    @property
    def term_args(self) -> tuple[Any, ...] | None:
        if self.bias is None:
            return None
        full = (self.batch, self.heads, self.n_q, self.n_k)
        strides = (
            None if size == 1 and size != whole else stride
            for size, stride, whole in zip(self.bias.shape, self.bias.stride(), full, strict=True)
        )
        return (self.bias.view(torch.uint8) if self._mask else self.bias, *strides)

    def row_strides(self, t: torch.Tensor) -> tuple[int, int, int]:
        """(batch, head, token) of statistics [B, H, N] or [H, T]."""
        return (0 if self.packed else t.stride(0), t.stride(-2), t.stride(-1))

    def tile(self, table: tuple[Row, ...]) -> Tile:
        """Packed sequences are taken to be equally long: their lengths are on the device."""
        share = max(1, self.sequences) if self.packed else 1
        lengths = (cdiv(self.n_q, share), cdiv(self.n_k, share))
        term = self.bias is not None
        return pick_tile(table, self.device, self.q.dtype, self.head_dim, *lengths, term)

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
            {**call.map, **call.constants, "UNIT": unit, "BLOCK_M": tile.block_m,
             "BLOCK_N": tile.block_n, "TAIL": call.key_tail(tile.block_n)},
            tile.num_warps,
            tile.num_stages,
        )
    ]  # fmt: skip


def forward(
    q: torch.Tensor,  # [B, Nq, H, D] or [Tq, H, D]
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,  # [B|1, H|1, Nq|1, Nk|1]
    cu_seqlens_q: torch.Tensor | None,  # [S + 1]
    cu_seqlens_k: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q, lse [B, H, Nq] or [H, Tq] float32)."""
    out, lse, launches = plan_forward(
        q, k, v, bias, cu_seqlens_q, cu_seqlens_k, causal, scale, device_of(q)
    )
    run(launches, q)
    return out, lse


def plan_forward(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, causal, scale, device):
    """Outputs and launches of :func:`forward` on ``device``, which meta tensors need not be on."""
    *batch, n_q, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*batch, heads, n_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse, []
    call = _Call(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, causal, scale, device)
    return out, lse, _forward_launches(call, out, lse)


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
            {**call.map, **call.constants, "UNIT": unit, "BLOCK_M": tile.block_m,
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
            {**call.map, **call.constants, "UNIT": unit, "BLOCK_M": tile.block_m,
             "BLOCK_N": tile.block_n, "TAIL": call.key_tail(tile.block_n)},
            tile.num_warps,
            tile.num_stages,
        )
    )  # fmt: skip
    return launches


def _dbias_launch(call: _Call, grad, lse, delta) -> tuple[torch.Tensor, Launch]:
    """(partial sums [chunks, *bias.shape], launch). One chunk: it is the gradient itself."""
    q, k, v, bias = call.q, call.k, call.v, call.bias
    tile = call.tile(BACKWARD_DBIAS)
    sizes = (call.batch, call.heads, cdiv(call.n_q, tile.block_m), cdiv(call.n_k, tile.block_n))
    lengths = (call.batch, call.heads, call.n_q, call.n_k)
    reduced = [b == 1 and full != 1 for b, full in zip(bias.shape, lengths, strict=True)]
    own = tuple(1 if r else size for r, size in zip(reduced, sizes, strict=True))
    shared = tuple(size if r else 1 for r, size in zip(reduced, sizes, strict=True))
    programs, steps = math.prod(own), math.prod(shared)
    chunk = cdiv(steps, min(steps, cdiv(2 * call.device.units, programs)))
    chunks = cdiv(steps, chunk)
    dtype = bias.dtype if chunks == 1 else torch.float32
    partial = torch.empty((chunks, *bias.shape), dtype=dtype, device=bias.device)
    unit, strides = token_strides(q, k, v, grad)
    constants = {key: value for key, value in call.constants.items() if key != "FOLD"}
    launch = Launch(
        attention_dbias_kernel,
        (chunks * programs,),
        (q, k, v, grad, lse, delta, partial, *strides, call.row_strides(lse), call.scale_log2,
         call.term_args, call.n_q, call.n_k, own, shared, chunk),
        {**constants, "REDUCE_M": reduced[2], "REDUCE_N": reduced[3], "UNIT": unit,
         "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip
    return partial, launch


def backward(
    grad: torch.Tensor,  # like q, any strides
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    causal: bool,
    scale: float,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dbias); dbias is empty unless needed."""
    call = _Call(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, causal, scale, device_of(q))
    grads, partial, launches = plan_backward(call, grad, grad_lse, out, lse, need_dbias)
    run(launches, q)
    if partial is None:
        return (*grads, q.new_empty(0))
    return (*grads, partial[0] if len(partial) == 1 else partial.sum(0).to(bias.dtype))


def plan_backward(call: _Call, grad, grad_lse, out, lse, need_dbias):
    """((dq, dk, dv), partial sums of dbias or None, launches)."""
    q, k, v = call.q, call.k, call.v
    empty = q.numel() == 0 or k.numel() == 0
    make = torch.zeros if empty else torch.empty
    grads = tuple(make(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if empty:
        return grads, call.bias.new_zeros((1, *call.bias.shape)) if need_dbias else None, []
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    lse = lse.contiguous()
    launches = _backward_launches(call, grad, grad_lse, out, lse, delta, *grads)
    partial = None
    if need_dbias:
        partial, launch = _dbias_launch(call, grad, lse, delta)
        launches.append(launch)
    return grads, partial, launches


def aot_specs() -> list[AotSpec]:
    """Calls worth compiling without a GPU: the lengths and head dims of ViT-B, SigLIP and long
    sequences, a learned bias with its gradient, packed sequences."""

    def call(name: str, n: int, head_dim: int, bias: bool = False, packed: bool = False) -> AotSpec:
        def launches(device: Device) -> list[Launch]:
            tokens, heads = (8 * n,) if packed else (8, n), 12
            qkv = torch.empty(*tokens, 3, heads, head_dim, dtype=torch.bfloat16, device="meta")
            q, k, v = qkv.unbind(-3)
            shared = (1, heads, n, n)
            term = torch.empty(shared, dtype=q.dtype, device="meta") if bias else None
            cu = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
            arguments = (q, k, v, term, cu, cu, False, head_dim**-0.5, device)
            out, lse, forward_launches = plan_forward(*arguments)
            return forward_launches + plan_backward(_Call(*arguments), out, None, out, lse, bias)[2]

        return AotSpec(name, launches, matmul=True)

    return [
        call("vit_b_197", 197, 64),
        call("siglip_head_dim_72", 256, 72),
        call("long_head_dim_128", 4096, 128),
        call("beit_learned_bias", 197, 64, bias=True),
        call("packed_head_dim_64", 256, 64, packed=True),
    ]
