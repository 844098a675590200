"""Score terms of flash_attention and their gradients: dense bias, mask, decomposed bias, distances.

A term is a class here: ``function`` is its plug-in for the attention core (the protocol is in
``_attention.py``), ``args`` what that reads, ``gradients`` plans the launches that reduce ds to the
shape of its own tensors, ``finish`` sums what several programs share. No program adds to what
another one writes: there are no atomics, and no [B, H, Nq, Nk] buffer unless the bias is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl

from ._attention import load_lse_delta, load_rows, score_grad_tile, term_tile, weight_tile
from ._primitives import LOG2E, Launch, cdiv, token_strides
from ._tiles import BACKWARD_DBIAS, BACKWARD_DQ, Tile

# ---- plug-ins. Strides are None where a tensor broadcasts


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


@triton.jit
def _rel_rows(ptr, strides, batch, head, m):
    return ptr + batch * strides[0] + head * strides[1] + m.to(tl.int64) * strides[2]


@triton.jit
def decomposed_term(term_args, batch, head, origin, m, n, inside):
    rel_h_ptr, rel_w_ptr, h_strides, w_strides, width = term_args
    row = n // width
    h_ptr = _rel_rows(rel_h_ptr, h_strides, batch, head, m) + row
    w_ptr = _rel_rows(rel_w_ptr, w_strides, batch, head, m) + (n - row * width)
    if inside is not None:
        h = tl.load(h_ptr, mask=inside, other=0.0)
        w = tl.load(w_ptr, mask=inside, other=0.0)
    else:
        h = tl.load(h_ptr)
        w = tl.load(w_ptr)
    return (h.to(tl.float32) + w.to(tl.float32)) * LOG2E


@triton.jit
def decomposed_row_term(term_args, batch, head, origin, m, n, inside):
    """The keys n lie in one row of the grid: rel_h is one number per query."""
    rel_h_ptr, rel_w_ptr, h_strides, w_strides, width = term_args
    row = tl.min(n) // width
    h = tl.load(_rel_rows(rel_h_ptr, h_strides, batch, head, m) + row)
    w_ptr = _rel_rows(rel_w_ptr, w_strides, batch, head, m) + (n - row * width)
    if inside is not None:
        w = tl.load(w_ptr, mask=inside, other=0.0)
    else:
        w = tl.load(w_ptr)
    return (h.to(tl.float32) + w.to(tl.float32)) * LOG2E


@triton.jit
def _coordinates(ptr, strides, batch, i, inside):
    ptr += i.to(tl.int64) * strides[1]
    if strides[0] is not None:
        ptr += batch * strides[0]
    if inside is not None:
        x = tl.load(ptr, mask=inside, other=0.0)
        y = tl.load(ptr + strides[2], mask=inside, other=0.0)
    else:
        x = tl.load(ptr)
        y = tl.load(ptr + strides[2])
    return x, y


@triton.jit
def _distance(term_args, batch, m, n, inside):
    """Of rows m and keys n; NaN coordinates (a token without a place) give 0."""
    _, q_ptr, k_ptr, q_strides, k_strides = term_args
    qx, qy = _coordinates(q_ptr, q_strides, batch, m, None)
    kx, ky = _coordinates(k_ptr, k_strides, batch, n, inside)
    dx = kx - qx
    dy = ky - qy
    squared = dx * dx + dy * dy
    return tl.sqrt(tl.where(squared == squared, squared, 0.0))


@triton.jit
def distance_term(term_args, batch, head, origin, m, n, inside):
    factor = tl.load(term_args[0] + head) * -LOG2E
    return _distance(term_args, batch, m, n, inside) * factor


# ---- gradients


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


@triton.jit
def _own_rows(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, q_strides, k_strides, v_strides,
    grad_strides, lse_strides, batch, head, offs_m, n_q, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(q, grad, lse, delta) of the rows of a program, pointers to the keys and values they meet."""
    valid = offs_m < n_q
    m = offs_m.to(tl.int64)
    q_ptr += (batch * q_strides[0] + head * q_strides[1]) * UNIT
    grad_ptr += (batch * grad_strides[0] + head * grad_strides[1]) * UNIT
    q = load_rows(q_ptr, m * UNIT, q_strides[2], valid, True, D, D0, D1)
    grad = load_rows(grad_ptr, m * UNIT, grad_strides[2], valid, True, D, D0, D1)
    statistics = batch * lse_strides[0] + head * lse_strides[1] + m * lse_strides[2]
    lse, delta = load_lse_delta(lse_ptr, delta_ptr, statistics, valid, True)
    k_ptr += (batch * k_strides[0] + head * k_strides[1]) * UNIT
    v_ptr += (batch * v_strides[0] + head * v_strides[1]) * UNIT
    return q, grad, lse, delta, k_ptr, v_ptr


@triton.jit
def _score_grad(
    q, grad, lse, delta, t, offs_m, offs_n, valid_n, k_ptr, k_stride, v_ptr, v_stride, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ds of rows with keys, zero where a key is not valid."""
    n = offs_n.to(tl.int64) * UNIT
    k = load_rows(k_ptr, n, k_stride, valid_n, True, D, D0, D1)
    keep = valid_n[None, :]
    if CAUSAL:
        keep = keep & (offs_n[None, :] <= offs_m[:, None])
    p = weight_tile(q, k, lse[:, None], scale, t, keep, False, True, D1, PRECISION)
    v = load_rows(v_ptr, n, v_stride, valid_n, True, D, D0, D1)
    return score_grad_tile(p, grad, v, delta[:, None], D1, PRECISION)


@triton.jit
def attention_drel_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, drel_h_ptr, drel_w_ptr,
    q_strides, k_strides, v_strides, grad_strides, lse_strides,
    scale,  # times log2(e)
    term_args, n_q, height, batches, heads,
    CAUSAL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """drel_w [B, H, Nq, Kw] and drel_h [tiles of columns, B, H, Nq, Kh]. A program owns a tile of
    queries and one of columns of the grid of keys, and walks over the rows of the grid: ds summed
    over its columns is an element of drel_h, summed over the rows it is drel_w."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(n_q, BLOCK_M)
    first = pid % tiles * BLOCK_M
    head = (pid // tiles % heads).to(tl.int64)
    batch = (pid // tiles // heads % batches).to(tl.int64)
    column_tile = pid // tiles // heads // batches
    width = term_args[4]
    offs_m = first + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_n = columns < width
    at = (batch, head, 0, 0, n_q, 0, 0)
    q, grad, lse, delta, k_ptr, v_ptr = _own_rows(
        q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, q_strides, k_strides, v_strides,
        grad_strides, lse_strides, batch, head, offs_m, n_q, D, D0, D1, UNIT,
    )  # fmt: skip
    plane = batch * heads + head
    h_row = (column_tile.to(tl.int64) * batches * heads + plane) * n_q + offs_m
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    end = height
    if CAUSAL:
        end = tl.minimum(height, (first + BLOCK_M - 1) // width + 1)
    for row in tl.range(0, end):
        offs_n = row * width + columns
        t = term_tile(term_args, at, offs_m, offs_n, valid_n, True, 0, decomposed_row_term)
        ds = _score_grad(
            q, grad, lse, delta, t, offs_m, offs_n, valid_n, k_ptr, k_strides[2], v_ptr,
            v_strides[2], scale, CAUSAL, D, D0, D1, UNIT, PRECISION,
        )  # fmt: skip
        acc += ds
        total = tl.sum(ds, 1).to(drel_h_ptr.dtype.element_ty)
        tl.store(drel_h_ptr + h_row * height + row, total, mask=offs_m < n_q)
    w_row = (plane * n_q + offs_m)[:, None] * width
    tl.store(
        drel_w_ptr + w_row + columns[None, :],
        acc.to(drel_w_ptr.dtype.element_ty),
        mask=(offs_m < n_q)[:, None] & valid_n[None, :],
    )


@triton.jit
def attention_dslopes_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dslopes_ptr,
    q_strides, k_strides, v_strides, grad_strides, lse_strides,
    scale,  # times log2(e)
    term_args, n_q, n_k, heads,
    CAUSAL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dslopes [B, H, query tiles]: -sum of ds times distance over the keys of a tile of queries."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(n_q, BLOCK_M)
    first = pid % tiles * BLOCK_M
    head = (pid // tiles % heads).to(tl.int64)
    batch = (pid // tiles // heads).to(tl.int64)
    offs_m = first + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, n_q - 1)[:, None]
    q, grad, lse, delta, k_ptr, v_ptr = _own_rows(
        q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, q_strides, k_strides, v_strides,
        grad_strides, lse_strides, batch, head, offs_m, n_q, D, D0, D1, UNIT,
    )  # fmt: skip
    slope = tl.load(term_args[0] + head)
    acc = tl.zeros([BLOCK_M], tl.float32)
    end = n_k
    if CAUSAL:
        end = tl.minimum(n_k, first + BLOCK_M)
    for start in tl.range(0, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        valid_n = offs_n < n_k
        distance = _distance(term_args, batch, rows, offs_n[None, :], valid_n[None, :])
        ds = _score_grad(
            q, grad, lse, delta, distance * (slope * -LOG2E), offs_m, offs_n, valid_n, k_ptr,
            k_strides[2], v_ptr, v_strides[2], scale, CAUSAL, D, D0, D1, UNIT, PRECISION,
        )  # fmt: skip
        acc -= tl.sum(ds * distance, 1)
    tl.store(dslopes_ptr + pid, tl.sum(acc, 0))


# ---- host side. `call` is a flash_attention._Call


def _no_fold(call: Any) -> dict[str, Any]:
    return {k: v for k, v in call.constants.items() if k not in ("FOLD", "TERM")}


@dataclass
class DenseTerm:
    """A bias or mask [B|1, H|1, Nq|1, Nk|1]."""

    bias: torch.Tensor
    computed = False

    def function(self, block_n: int) -> Any:
        return mask_term if self._mask else bias_term

    @property
    def _mask(self) -> bool:
        return self.bias.dtype == torch.bool

    def args(self, call: Any) -> tuple[Any, ...]:
        full = (call.batch, call.heads, call.n_q, call.n_k)
        strides = (
            None if size == 1 and size != whole else stride
            for size, stride, whole in zip(self.bias.shape, self.bias.stride(), full, strict=True)
        )
        return (self.bias.view(torch.uint8) if self._mask else self.bias, *strides)

    def zeros(self) -> tuple[torch.Tensor, ...]:
        return (self.bias.new_zeros(self.bias.shape),)

    def gradients(self, call, grad, lse, delta) -> tuple[tuple[torch.Tensor, ...], list[Launch]]:
        """(partial sums [chunks, *bias.shape],). One chunk: it is the gradient itself."""
        q, k, v, bias = call.q, call.k, call.v, self.bias
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
        launch = Launch(
            attention_dbias_kernel,
            (chunks * programs,),
            (q, k, v, grad, lse, delta, partial, *strides, call.row_strides(lse), call.scale_log2,
             self.args(call), call.n_q, call.n_k, own, shared, chunk),
            {**_no_fold(call), "TERM": self.function(tile.block_n), "REDUCE_M": reduced[2],
             "REDUCE_N": reduced[3], "UNIT": unit, "BLOCK_M": tile.block_m,
             "BLOCK_N": tile.block_n},
            tile.num_warps,
            tile.num_stages,
        )  # fmt: skip
        return (partial,), [launch]

    def finish(self, partials: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (_sum_chunks(partials[0], self.bias.dtype),)


def _sum_chunks(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return partial[0] if len(partial) == 1 else partial.sum(0).to(dtype)


def _row_owner(kernel, call, tile: Tile, programs, outputs, grad, lse, delta, scalars) -> Launch:
    """A launch of a kernel whose programs own a tile of queries."""
    q, k, v = call.q, call.k, call.v
    unit, strides = token_strides(q, k, v, grad)
    return Launch(
        kernel,
        (programs,),
        (q, k, v, grad, lse, delta, *outputs, *strides, call.row_strides(lse), call.scale_log2,
         call.term.args(call), call.n_q, *scalars, call.heads),
        {**_no_fold(call), "UNIT": unit, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip


@dataclass
class DecomposedTerm:
    """rel_h [B, H, Nq, Kh] and rel_w [B, H, Nq, Kw], rows dense."""

    rel_h: torch.Tensor
    rel_w: torch.Tensor
    computed = False

    def function(self, block_n: int) -> Any:
        return decomposed_term if self.rel_w.shape[3] % block_n else decomposed_row_term

    def args(self, call: Any) -> tuple[Any, ...]:
        strides = (self.rel_h.stride()[:3], self.rel_w.stride()[:3])
        return (self.rel_h, self.rel_w, *strides, self.rel_w.shape[3])

    def zeros(self) -> tuple[torch.Tensor, ...]:
        return tuple(t.new_zeros(t.shape) for t in (self.rel_h, self.rel_w))

    def gradients(self, call, grad, lse, delta) -> tuple[tuple[torch.Tensor, ...], list[Launch]]:
        """(partial sums of drel_h [tiles of columns, *rel_h.shape], drel_w)."""
        height, width = self.rel_h.shape[3], self.rel_w.shape[3]
        tile = call.tile(BACKWARD_DQ, n_k=width)
        columns = cdiv(width, tile.block_n)
        dtype = self.rel_h.dtype if columns == 1 else torch.float32
        # A causal call skips the rows of the grid behind its queries.
        make = torch.zeros if call.causal else torch.empty
        drel_h = make((columns, *self.rel_h.shape), dtype=dtype, device=self.rel_h.device)
        drel_w = torch.empty(self.rel_w.shape, dtype=self.rel_w.dtype, device=self.rel_w.device)
        programs = columns * call.programs(call.n_q, tile.block_m)
        outputs, scalars = (drel_h, drel_w), (height, call.batch)
        launch = _row_owner(
            attention_drel_kernel, call, tile, programs, outputs, grad, lse, delta, scalars
        )
        return outputs, [launch]

    def finish(self, partials: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        drel_h, drel_w = partials
        return _sum_chunks(drel_h, self.rel_h.dtype), drel_w


@dataclass
class DistanceTerm:
    """slopes [H], coords_q [B|1, Nq, 2], coords_k [B|1, Nk, 2], float32."""

    slopes: torch.Tensor
    coords_q: torch.Tensor
    coords_k: torch.Tensor
    computed = True

    def function(self, block_n: int) -> Any:
        return distance_term

    def args(self, call: Any) -> tuple[Any, ...]:
        strides = (
            (None if t.shape[0] == 1 else t.stride(0), *t.stride()[1:])
            for t in (self.coords_q, self.coords_k)
        )
        return (self.slopes.contiguous(), self.coords_q, self.coords_k, *strides)

    def zeros(self) -> tuple[torch.Tensor, ...]:
        return (self.slopes.new_zeros(self.slopes.shape),)

    def gradients(self, call, grad, lse, delta) -> tuple[tuple[torch.Tensor, ...], list[Launch]]:
        """(partial sums [B, H, query tiles],)."""
        tile = call.tile(BACKWARD_DQ)
        shape = (call.batch, call.heads, cdiv(call.n_q, tile.block_m))
        partial = torch.empty(shape, dtype=torch.float32, device=self.slopes.device)
        programs = call.programs(call.n_q, tile.block_m)
        launch = _row_owner(
            attention_dslopes_kernel, call, tile, programs, (partial,), grad, lse, delta,
            (call.n_k,),
        )  # fmt: skip
        return (partial,), [launch]

    def finish(self, partials: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (partials[0].sum((0, 2)),)


Term = DenseTerm | DecomposedTerm | DistanceTerm
