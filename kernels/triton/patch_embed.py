"""Patch embedding for GPUs: a product whose left operand is gathered from the images.

Element (m, k) of that operand is pixel origin(m) + offset(k): neither the images nor their patches
are copied, whatever the strides. A token's origin is computed (a batch of equal images) or read
from its row of places (packed images). LayerNorm joins the product where one tile holds a whole
row, and is a pass of its own over float32 sums where it does not. The weight's gradient is summed
in splits of the tokens whose number depends on the shape alone, added in order: no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import triton
import triton.language as tl

from ._pixels import folded, origins, patches, pixels
from ._primitives import AotSpec, Device, Launch, cdiv, device_of, next_power_of_2, run


class Tile(NamedTuple):
    block_m: int  # tokens
    block_n: int  # elements of a token (of a patch for the images' gradient)
    block_k: int
    num_warps: int
    num_stages: int
    reason: str


# By class of device and element size; patches of fewer elements take a smaller block_k.
NVIDIA = ("sm80", "sm86", "sm90", "sm100")
TILES: tuple[tuple[tuple[str, ...], int, Tile], ...] = (
    (("cpu",), 4, Tile(32, 32, 32, 4, 1, "interpreter: several tiles at test sizes")),
    (NVIDIA, 2, Tile(128, 64, 64, 4, 3, "64 sums a thread leave registers for gathered addresses")),
    (NVIDIA, 4, Tile(64, 64, 32, 8, 1, "exact float32 products: 16 sums a thread, no spills")),
    (("hip",), 2, Tile(128, 64, 32, 4, 1, "64 sums a lane in two waves a SIMD")),
    (("hip",), 4, Tile(64, 64, 16, 4, 1, "64 KB of LDS for both operands")),
)
# A row of so many elements fits one tile, and LayerNorm joins the product.
NORM_IN_TILE = 256
# Tokens of one split of the weight's gradient, of one program of the passes over rows.
SPLIT_TOKENS, NORM_ROWS = 2048, 16


@triton.jit
def _small(ptr, e, mask, OTHERWISE: tl.constexpr):
    if ptr is None:
        value = tl.full(e.shape, OTHERWISE, tl.float32)
    else:
        value = tl.load(ptr + e, mask, 0.0).to(tl.float32)
    return value


@triton.jit
def _normalise(z, norm_ptr, norm_bias_ptr, e, E: tl.constexpr, eps):
    """(LN(z), xhat, rstd) of whole rows [rows, columns e]."""
    mask = (e < E)[None, :]
    mean = tl.sum(tl.where(mask, z, 0.0), 1) / E
    centred = tl.where(mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / E + eps)
    xhat = centred * rstd[:, None]
    y = xhat * _small(norm_ptr, e, e < E, 1.0)[None, :]
    return y + _small(norm_bias_ptr, e, e < E, 0.0)[None, :], xhat, rstd


@triton.jit
def patch_project_kernel(
    images_ptr, weight_ptr, shift_ptr, bytes_ptr, norm_ptr, norm_bias_ptr, pos_ptr, out_ptr,
    g, scale, eps, M, E: tl.constexpr, K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, PACKED: tl.constexpr, PAD: tl.constexpr, FINISH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of tokens. FINISH: of the output; otherwise float32 sums [M, E]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_e = m < M, e < E
    o = origins(tl.minimum(m, M - 1), g, PACKED, PT, PH, PW)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = patches(
            images_ptr, bytes_ptr, k, o, g, mask_m, PACKED, PAD, K, PT, PH, PW,
            weight_ptr.dtype.element_ty,
        )  # fmt: skip
        inside = (k < K)[:, None] & mask_e[None, :]
        w = tl.load(weight_ptr + e.to(tl.int64)[None, :] * K + k[:, None], inside, 0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    z = acc * scale + _small(shift_ptr, e, mask_e, 0.0)[None, :]
    mask = mask_m[:, None] & mask_e[None, :]
    if FINISH:
        if norm_ptr is not None:
            z, _, _ = _normalise(z, norm_ptr, norm_bias_ptr, e, E, eps)
        if pos_ptr is not None:
            z += tl.load(pos_ptr + o[6][:, None] * E + e[None, :], mask, 0.0).to(tl.float32)
        to = out_ptr + o[7][:, None] * E + e[None, :]
    else:
        to = out_ptr + m.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(to, z.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def patch_norm_kernel(
    z_ptr, norm_ptr, norm_bias_ptr, pos_ptr, out_ptr, g, eps, M, E: tl.constexpr, PT: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: ROWS finished tokens from their sums."""
    e = tl.arange(0, BLOCK_E)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (m < M)[:, None] & (e < E)[None, :]
    o = origins(tl.minimum(m, M - 1), g, PACKED, PT, PH, PW)
    z = tl.load(z_ptr + m.to(tl.int64)[:, None] * E + e[None, :], mask, 0.0)
    y, _, _ = _normalise(z, norm_ptr, norm_bias_ptr, e, E, eps)
    if pos_ptr is not None:
        y += tl.load(pos_ptr + o[6][:, None] * E + e[None, :], mask, 0.0).to(tl.float32)
    tl.store(out_ptr + o[7][:, None] * E + e[None, :], y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def patch_norm_bwd_kernel(
    z_ptr, grad_ptr, norm_ptr, dz_ptr, partial_ptr, g, eps, M, E: tl.constexpr, PT: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS rows of the gradient before LayerNorm, and their share of the gradients
    of gain and offset: partial_ptr is [programs, 2, E]."""
    e = tl.arange(0, BLOCK_E)
    gain = _small(norm_ptr, e, e < E, 1.0)
    dgain = tl.zeros((BLOCK_E,), tl.float32)
    doffset = tl.zeros((BLOCK_E,), tl.float32)
    for start in tl.range(0, TOKENS, ROWS):
        m = tl.program_id(0) * TOKENS + start + tl.arange(0, ROWS)
        mask = (m < M)[:, None] & (e < E)[None, :]
        o = origins(tl.minimum(m, M - 1), g, PACKED, PT, PH, PW)
        at = m.to(tl.int64)[:, None] * E + e[None, :]
        _, xhat, rstd = _normalise(tl.load(z_ptr + at, mask, 0.0), None, None, e, E, eps)
        grad = tl.load(grad_ptr + o[7][:, None] * E + e[None, :], mask, 0.0).to(tl.float32)
        dgain += tl.sum(grad * xhat, 0)
        doffset += tl.sum(grad, 0)
        dx = grad * gain[None, :]
        dz = dx - (tl.sum(dx, 1) / E)[:, None] - xhat * (tl.sum(dx * xhat, 1) / E)[:, None]
        tl.store(dz_ptr + at, (dz * rstd[:, None]).to(dz_ptr.dtype.element_ty), mask)
    to = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * E + e
    tl.store(to, dgain, e < E)
    tl.store(to + E, doffset, e < E)


@triton.jit
def patch_dweight_kernel(
    images_ptr, dz_ptr, bytes_ptr, dweight_ptr, dbias_ptr, g, M, tokens, E: tl.constexpr,
    K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, PACKED: tl.constexpr,
    PAD: tl.constexpr, ROWS_OF_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile [BLOCK_N of E, BLOCK_M of K] of the weight's gradient over one split of
    the tokens. ROWS_OF_OUT: dz lies as the output does, otherwise as [M, E]."""
    e = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, tokens, BLOCK_K):
        m = split * tokens + start + tl.arange(0, BLOCK_K)
        mask_m = m < M
        o = origins(tl.minimum(m, M - 1), g, PACKED, PT, PH, PW)
        row = o[7] if ROWS_OF_OUT else m
        d = tl.load(dz_ptr + row[None, :] * E + e[:, None], mask_m[None, :] & (e < E)[:, None], 0.0)
        a = patches(
            images_ptr, bytes_ptr, k, o, g, mask_m, PACKED, PAD, K, PT, PH, PW,
            dz_ptr.dtype.element_ty,
        )  # fmt: skip
        acc = tl.dot(d, a, acc, input_precision=PRECISION)
        bias += tl.sum(d.to(tl.float32), 1)
    to = dweight_ptr + (split * E + e[:, None]) * K + k[None, :]
    tl.store(to, acc, (e < E)[:, None] & (k < K)[None, :])
    if tl.program_id(1) == 0:
        tl.store(dbias_ptr + split * E + e, bias, e < E)


@triton.jit
def patch_dimages_kernel(
    dz_ptr, weight_ptr, dimages_ptr, g, M, E: tl.constexpr, K: tl.constexpr, PT: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, PACKED: tl.constexpr, PAD: tl.constexpr,
    ROWS_OF_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N elements of BLOCK_M patches. g describes the gradient's own strides."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = m < M
    o = origins(tl.minimum(m, M - 1), g, PACKED, PT, PH, PW)
    row = o[7] if ROWS_OF_OUT else m.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, E, BLOCK_K):
        e = start + tl.arange(0, BLOCK_K)
        d = tl.load(dz_ptr + row[:, None] * E + e[None, :], mask_m[:, None] & (e < E)[None, :], 0.0)
        inside = (e < E)[:, None] & (k < K)[None, :]
        w = tl.load(weight_ptr + e.to(tl.int64)[:, None] * K + k[None, :], inside, 0.0)
        acc = tl.dot(d, w, acc, input_precision=PRECISION)
    offset, inside = pixels(k, o, g, mask_m, PACKED, PAD, K, PT, PH, PW)
    tl.store(dimages_ptr + offset, acc.to(dimages_ptr.dtype.element_ty), inside)


# ---- launchers ----


class _Call:
    """Sizes, tiles and folded normalisation of one call. places: packed, otherwise a batch."""

    def __init__(self, images, places, weight, mean, std, norm, norm_bias, eps, pos, prefix, pad):
        self.images, self.weight, self.places = images, weight, places
        self.embed, self.channels = weight.shape[:2]
        self.depth = math.prod(weight.shape[1:])
        patch = weight.shape[2:] if weight.dim() == 5 else (1, *weight.shape[2:])
        self.prefixes = 0 if prefix is None else prefix.shape[0]
        self.pad = pad
        if places is None:
            grid = [cdiv(s, p) for s, p in zip(images.shape[2:], weight.shape[2:], strict=True)]
            self.patches = math.prod(grid)
            self.tokens = images.shape[0] * self.patches
            self.grid = grid if len(grid) == 3 else [1, *grid]
        else:
            self.patches = self.tokens = places.shape[0]
        self.norm, self.norm_bias, self.eps, self.pos = norm, norm_bias, float(eps), pos
        self.late = pos is not None and pos.shape[0] == self.patches  # no rows for the prefix
        self.scale, self.bytes, self.folds = 1.0, None, None
        if images.dtype == torch.uint8:
            self._fold(mean, std)
        self.sizes = {
            "PT": patch[0], "PH": patch[1], "PW": patch[2], "PACKED": places is not None,
        }  # fmt: skip

    def _fold(self, mean, std):
        centre, factor, offset, self.scale = folded(mean, std, self.channels)
        padding = [255 * m - c for m, c in zip(mean or [0.0] * self.channels, centre, strict=True)]
        tensor = lambda v: torch.tensor(v, dtype=torch.float32, device=self.weight.device)  # noqa: E731
        self.bytes = tensor([float(c) for c in centre] + padding)
        per_channel = (1, -1, *(1,) * (self.weight.dim() - 2))
        self.folds = tensor(factor).view(per_channel), tensor(offset).view(per_channel)

    def geometry(self, images: torch.Tensor) -> tuple[Any, ...]:
        """What a kernel knows about where pixels lie."""
        if self.places is not None:
            return (self.places,)
        strides, shape = images.stride(), images.shape
        frame, frames = (strides[2], shape[2]) if images.dim() == 5 else (0, 1)
        first = 0 if self.late else self.prefixes
        return (
            None, strides[0], strides[1], frame, strides[-2], strides[-1], frames, shape[-2],
            shape[-1], *self.grid, self.prefixes, first,
        )  # fmt: skip

    def operands(self, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias with the normalisation of bytes in them."""
        if self.folds is None:
            return self.weight, bias
        factor, offset = self.folds
        wide = self.weight.float()
        shift = (wide * offset).flatten(1).sum(1)
        return (wide * factor).to(self.weight.dtype), shift if bias is None else shift + bias

    def tile(self, depth: int, device: Device) -> tuple[Tile, str]:
        """The tile for a product of that depth, and its precision."""
        size = 4 if device.arch == "cpu" else self.weight.element_size()
        tile = next(t for archs, itemsize, t in TILES if device.arch in archs and itemsize == size)
        tf32 = torch.backends.cuda.matmul.allow_tf32 and device.arch.startswith("sm")
        block_k = min(tile.block_k, max(16, next_power_of_2(depth)))
        return tile._replace(block_k=block_k), "tf32" if size == 4 and tf32 else "ieee"

    def project(self, out: torch.Tensor, bias, finish: bool, device: Device) -> Launch:
        """The product, into the output or into float32 sums."""
        tile, precision = self.tile(self.depth, device)
        block_n, block_m, warps = tile.block_n, tile.block_m, tile.num_warps
        if finish and self.norm is not None:
            block_n = next_power_of_2(self.embed)
            block_m = max(16, tile.block_m * tile.block_n // block_n)
        weight, shift = self.operands(bias)
        norm = (self.norm, self.norm_bias) if finish else (None, None)
        return Launch(
            patch_project_kernel,
            (cdiv(self.tokens, block_m), cdiv(self.embed, block_n)),
            (
                self.images, weight, shift, self.bytes, *norm, self.pos if finish else None, out,
                self.geometry(self.images), self.scale, self.eps, self.tokens,
            ),
            {
                "E": self.embed, "K": self.depth, **self.sizes, "PAD": self.pad, "FINISH": finish,
                "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": tile.block_k,
                "PRECISION": precision,
            },
            warps,
            tile.num_stages,
        )  # fmt: skip

    @property
    def norm_in_tile(self) -> bool:
        return self.norm is None or next_power_of_2(self.embed) <= NORM_IN_TILE

    def rows(self) -> dict[str, int]:
        """Tile of the passes over whole rows: about 8192 elements."""
        block = next_power_of_2(self.embed)
        return {"ROWS": max(1, min(NORM_ROWS, 8192 // block)), "BLOCK_E": block}

    def sums(self) -> torch.Tensor:
        shape = (self.tokens, self.embed)
        return torch.empty(shape, dtype=torch.float32, device=self.weight.device)


def plan_forward(call: _Call, bias, out: torch.Tensor, device: Device) -> list[Launch]:
    """Launches that fill all of ``out`` but its prefix."""
    if call.norm_in_tile:
        return [call.project(out, bias, True, device)]
    z, rows = call.sums(), call.rows()
    finish = Launch(
        patch_norm_kernel,
        (cdiv(call.tokens, rows["ROWS"]),),
        (
            z, call.norm, call.norm_bias, call.pos, out, call.geometry(call.images), call.eps,
            call.tokens,
        ),
        {"E": call.embed, **call.sizes, **rows},
    )  # fmt: skip
    return [call.project(z, bias, False, device), finish]


def forward(
    images, weight, bias, mean, std, norm, norm_bias, eps, pos, prefix, pad
) -> torch.Tensor:
    """``vitkit::patch_embed_fwd`` (see vitkit/ops/patch_embed.py)."""
    call = _Call(images, None, weight, mean, std, norm, norm_bias, eps, pos, prefix, pad)
    shape = (images.shape[0], call.prefixes + call.patches, call.embed)
    out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    if call.tokens == 0:
        return out
    run(plan_forward(call, bias, out, device_of(images)), images)
    if prefix is not None and call.prefixes:
        first = prefix.float()
        if pos is not None and not call.late:
            first = first + pos[: call.prefixes].float()
        out[:, : call.prefixes] = first.to(out.dtype)
    return out


def forward_packed(
    pixels, places, weight, bias, mean, std, norm, norm_bias, eps, pos
) -> torch.Tensor:
    """``vitkit::patch_embed_packed_fwd`` (see vitkit/ops/patch_embed_packed.py)."""
    call = _Call(pixels, places, weight, mean, std, norm, norm_bias, eps, pos, None, True)
    shape = (call.tokens, call.embed)
    out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    if call.tokens:
        run(plan_forward(call, bias, out, device_of(pixels)), pixels)
    return out


class _Gradients(NamedTuple):
    launches: list[Launch]
    norm: torch.Tensor | None  # [programs, 2, E]
    weight: torch.Tensor | None  # [splits, E, K]
    bias: torch.Tensor | None  # [splits, E]


def plan_backward(
    call: _Call, grad, bias, dimages: torch.Tensor | None, need_weight: bool, device: Device
) -> _Gradients:
    """Launches for the gradients of norm, weight and bias in parts, and of the images."""
    launches, partial, dweight, dbias = [], None, None, None
    dz, of_out = grad, call.places is None
    common = {"E": call.embed, **call.sizes}
    new = {"dtype": torch.float32, "device": call.weight.device}
    geometry = call.geometry(call.images)
    if call.norm is not None:
        z, rows = call.sums(), call.rows()
        dz, of_out = torch.empty(z.shape, dtype=grad.dtype, device=grad.device), False
        tokens = cdiv(cdiv(call.tokens, 512), rows["ROWS"]) * rows["ROWS"]
        programs = cdiv(call.tokens, tokens)
        partial = torch.empty((programs, 2, call.embed), **new)
        args = (z, grad, call.norm, dz, partial, geometry, call.eps, call.tokens)
        launches += [
            call.project(z, bias, False, device),
            Launch(patch_norm_bwd_kernel, (programs,), args, {**common, "TOKENS": tokens, **rows}),
        ]
    if need_weight:
        tile, precision = call.tile(call.tokens, device)
        splits = min(cdiv(call.tokens, SPLIT_TOKENS), 64)
        tokens = cdiv(cdiv(call.tokens, splits), tile.block_k) * tile.block_k
        splits = cdiv(call.tokens, tokens)
        dweight = torch.empty((splits, call.embed, call.depth), **new)
        dbias = torch.empty((splits, call.embed), **new)
        block_k = max(16, min(tile.block_m, next_power_of_2(call.depth)))
        launches.append(
            Launch(
                patch_dweight_kernel,
                (cdiv(call.embed, tile.block_n), cdiv(call.depth, block_k), splits),
                (call.images, dz, call.bytes, dweight, dbias, geometry, call.tokens, tokens),
                {
                    **common, "K": call.depth, "PAD": call.pad, "ROWS_OF_OUT": of_out,
                    "BLOCK_M": block_k, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                    "PRECISION": precision,
                },
                tile.num_warps,
                tile.num_stages,
            )
        )  # fmt: skip
    if dimages is not None:
        tile, precision = call.tile(call.embed, device)
        block_n = max(16, min(tile.block_n, next_power_of_2(call.depth)))
        launches.append(
            Launch(
                patch_dimages_kernel,
                (cdiv(call.tokens, tile.block_m), cdiv(call.depth, block_n)),
                (dz, call.weight, dimages, call.geometry(dimages), call.tokens),
                {
                    **common, "K": call.depth, "PAD": call.pad, "ROWS_OF_OUT": of_out,
                    "BLOCK_M": tile.block_m, "BLOCK_N": block_n, "BLOCK_K": tile.block_k,
                    "PRECISION": precision,
                },
                tile.num_warps,
                tile.num_stages,
            )
        )  # fmt: skip
    return _Gradients(launches, partial, dweight, dbias)


def _gradients(call: _Call, grad, bias, dimages, need_weight) -> list[torch.Tensor | None]:
    """[dweight, dbias, dnorm_weight, dnorm_bias] in float32."""
    if call.tokens == 0:
        shapes = (call.weight.shape, *[(call.embed,)] * 3)
        return [torch.zeros(shape, device=grad.device) for shape in shapes]
    plan = plan_backward(call, grad, bias, dimages, need_weight, device_of(grad))
    run(plan.launches, grad)
    found: list[torch.Tensor | None] = [None] * 4
    if plan.weight is not None and plan.bias is not None:
        dweight, dbias = plan.weight.sum(0).view(call.weight.shape), plan.bias.sum(0)
        if call.folds is not None:
            # Pixels entered as x - centre: their value is (x - centre) * factor * scale + offset.
            factor, offset = call.folds
            per_row = dbias.view(-1, *(1,) * (call.weight.dim() - 1))
            dweight = dweight * (factor * call.scale) + offset * per_row
        found[:2] = dweight, dbias
    if plan.norm is not None:
        found[2:] = [row.clone() for row in plan.norm.sum(0)]  # outputs share no memory
    return found


def _given(found: Sequence[Any], tensors: Sequence[Any], like: torch.Tensor) -> list[torch.Tensor]:
    """Gradients in the dtypes of their tensors, nothing for tensors that are absent."""
    pairs = zip(found, tensors, strict=True)
    return [
        like.new_empty(0) if t is None else torch.zeros_like(t) if g is None else g.to(t.dtype)
        for g, t in pairs
    ]


def backward(
    grad, images, weight, bias, mean, std, norm, norm_bias, eps, pos, prefix, pad, need_images,
    need_weight,
):  # fmt: skip
    """``vitkit::patch_embed_bwd`` (see vitkit/ops/patch_embed.py)."""
    call = _Call(images, None, weight, mean, std, norm, norm_bias, eps, pos, prefix, pad)
    dimages = torch.empty_like(images) if need_images else None
    found = _gradients(call, grad, bias, dimages, need_weight)
    rows = None
    if pos is not None or prefix is not None:
        rows = grad.sum(0, dtype=torch.float32)
    late = call.prefixes if call.late else 0
    parts = (slice(late, None), slice(call.prefixes))
    sums = [None if rows is None else rows[part].clone() for part in parts]
    weights = found[0] if need_weight else None
    return (
        weight.new_empty(0) if dimages is None else dimages,
        *_given([weights], [weight if need_weight else None], weight),
        *_given([*found[1:], *sums], [bias, norm, norm_bias, pos, prefix], weight),
    )


def backward_packed(
    grad, pixels, places, weight, bias, mean, std, norm, norm_bias, eps, pos, need_pixels,
    need_weight,
):  # fmt: skip
    """``vitkit::patch_embed_packed_bwd`` (see vitkit/ops/patch_embed_packed.py)."""
    call = _Call(pixels, places, weight, mean, std, norm, norm_bias, eps, pos, None, True)
    dpixels = torch.zeros_like(pixels) if need_pixels else None
    found = _gradients(call, grad, bias, dpixels, need_weight)
    dpos = None
    if pos is not None:
        dpos = torch.zeros(pos.shape, dtype=torch.float32, device=pos.device)
        # Sorted and added in order: deterministic, unlike index_add_.
        dpos.index_put_((places[:, 5],), grad.float(), accumulate=True)
    weights = found[0] if need_weight else None
    return (
        weight.new_empty(0) if dpixels is None else dpixels,
        *_given([weights], [weight if need_weight else None], weight),
        *_given([*found[1:], dpos], [bias, norm, norm_bias, pos], weight),
    )


def aot_specs() -> list[AotSpec]:
    """Calls worth compiling without a GPU: a ViT, LayerNorm in the tile, bytes, packed images."""
    shapes = {
        "vit_b_16": ((8, 3, 224, 224), (768, 3, 16, 16), torch.bfloat16, False),
        "vit_b_16_bytes": ((8, 3, 224, 224), (768, 3, 16, 16), torch.uint8, False),
        "swin_t_patch_4": ((8, 3, 224, 224), (96, 3, 4, 4), torch.bfloat16, True),
        "dit_xl_patch_2_fp32": ((8, 4, 32, 32), (1152, 4, 2, 2), torch.float32, False),
    }
    specs = []
    for name, (image, weight_shape, dtype, norm) in shapes.items():
        element = torch.float32 if dtype == torch.float32 else torch.bfloat16
        images = torch.empty(image, dtype=dtype, device="meta")
        weight = torch.empty(weight_shape, dtype=element, device="meta")
        row = torch.empty(weight_shape[0], dtype=element, device="meta")

        def launches(device: Device, images=images, weight=weight, row=row, norm=norm):
            gain = row if norm else None
            call = _Call(images, None, weight, None, None, gain, gain, 1e-6, None, None, False)
            out = torch.empty(
                (images.shape[0], call.patches, call.embed), dtype=weight.dtype, device="meta"
            )
            dimages = torch.empty_like(images) if images.is_floating_point() else None
            backward_launches = plan_backward(call, out, row, dimages, True, device).launches
            return plan_forward(call, row, out, device) + backward_launches

        specs.append(AotSpec(name, launches, matmul=element != torch.float32))
    return specs
