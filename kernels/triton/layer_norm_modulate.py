"""LayerNorm with its modulation for GPUs: a program holds whole rows, read once.

x is seen as [segments, rows, width]; a segment is what shares one modulation, a sample or all. The
gradient walks the rows of one part of a segment and keeps the sums that weight, bias, scale and
shift need in registers; parts are added in order afterwards. No atomics; the number of parts
depends on the shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from ._primitives import AotSpec, Device, Launch, cdiv, next_power_of_2, row_stride, run


@dataclass(frozen=True)
class Tile:
    """Rows of a program for rows of up to ``width`` elements."""

    width: int
    rows: int
    warps: int
    reason: str


TILES = (
    Tile(128, 16, 4, "2048 elements, 16 a thread: Swin's 96 needs many rows to fill a program"),
    Tile(512, 4, 4, "2048 elements, 16 a thread: a warp or less a row, sums by shuffles"),
    Tile(2048, 1, 4, "a row of ViT-B, DiT-XL: 16 a thread at most, 16-byte loads of bfloat16"),
    Tile(8192, 1, 8, "32 a thread at most; the sums of a row cross warps either way"),
)
# Of the gradient: x, grad and two sums a column are held at once.
BACKWARD_TILES = (
    Tile(128, 8, 4, "1024 elements of x and of grad, 8 a thread of each"),
    Tile(512, 2, 4, "1024 elements each, as for 128"),
    Tile(2048, 1, 4, "16 a thread of x, grad and of each sum"),
    Tile(4096, 1, 8, "16 a thread of each, as above"),
    Tile(8192, 1, 16, "likewise; at 16384 even 16 warps spill, which is why rows end here"),
)
# Rows of a part of the gradient, and parts of a segment at most: enough programs for every
# multiprocessor from ViT's batches on, while the partial sums stay a few percent of the traffic.
PART_ROWS, MAX_PARTS = 32, 512


def pick_tile(table: tuple[Tile, ...], width: int) -> Tile:
    return next(tile for tile in table if width <= tile.width)


@triton.jit
def _vector(ptr, offs, mask, OTHERWISE: tl.constexpr):
    """Row of a small tensor as float32; OTHERWISE where the tensor is absent."""
    if ptr is None:
        value = tl.full(offs.shape, OTHERWISE, tl.float32)
    else:
        value = tl.load(ptr + offs, mask, 0.0).to(tl.float32)
    return value


@triton.jit
def _affine(shift_ptr, scale_ptr, weight_ptr, bias_ptr, shift_stride, scale_stride, segment, e,
            mask, TOKEN: tl.constexpr):  # fmt: skip
    """(gain, offset) of the columns e for all rows of a segment: without what is per token."""
    gain = _vector(weight_ptr, e, mask, 1.0)
    offset = _vector(bias_ptr, e, mask, 0.0)
    if not TOKEN:
        factor = 1.0 + _vector(scale_ptr, segment * scale_stride + e, mask, 0.0)
        shift = _vector(shift_ptr, segment * shift_stride + e, mask, 0.0)
        gain, offset = gain * factor, offset * factor + shift
    return gain, offset


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr,
    shift_stride, scale_stride, rows, blocks, eps,
    E: tl.constexpr, TOKEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R rows of one segment."""
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_E)
    mask_r, mask_e = r < rows, e < E
    mask = mask_r[:, None] & mask_e[None, :]
    row = segment * rows + r
    offs = row[:, None] * E + e[None, :]
    x = tl.load(x_ptr + offs, mask, 0.0).to(tl.float32)
    mean = tl.sum(x, 1) / E
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / E + eps)
    tl.store(mean_ptr + row, mean, mask_r)
    tl.store(rstd_ptr + row, rstd, mask_r)
    gain, offset = _affine(
        shift_ptr, scale_ptr, weight_ptr, bias_ptr, shift_stride, scale_stride, segment, e, mask_e,
        TOKEN,
    )  # fmt: skip
    y = centred * rstd[:, None] * gain[None, :] + offset[None, :]
    if TOKEN:
        factor = 1.0 + _vector(scale_ptr, row[:, None] * scale_stride + e[None, :], mask, 0.0)
        shift = _vector(shift_ptr, row[:, None] * shift_stride + e[None, :], mask, 0.0)
        y = y * factor + shift
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def layer_norm_bwd_kernel(
    x_ptr, grad_ptr, dx_ptr, dscale_ptr, partial_ptr, mean_ptr, rstd_ptr,
    shift_ptr, scale_ptr, weight_ptr, bias_ptr, shift_stride, scale_stride, rows, part_rows, parts,
    E: tl.constexpr, TOKEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: a part of the rows of one segment; its sums of dz and dz * xhat."""
    part, segment = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    mask_e = e < E
    gain, offset = _affine(
        shift_ptr, scale_ptr, weight_ptr, bias_ptr, shift_stride, scale_stride, segment, e, mask_e,
        TOKEN,
    )  # fmt: skip
    s1 = tl.zeros((BLOCK_E,), tl.float32)
    s2 = tl.zeros((BLOCK_E,), tl.float32)
    end = tl.minimum((part + 1) * part_rows, rows)
    for at in tl.range(part * part_rows, end, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        mask_r = r < end
        mask = mask_r[:, None] & mask_e[None, :]
        row = segment * rows + r
        offs = row[:, None] * E + e[None, :]
        x = tl.load(x_ptr + offs, mask, 0.0).to(tl.float32)
        dz = tl.load(grad_ptr + offs, mask, 0.0).to(tl.float32)
        mean, rstd = tl.load(mean_ptr + row, mask_r, 0.0), tl.load(rstd_ptr + row, mask_r, 0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        if TOKEN:
            if dscale_ptr is not None:
                dscale = dz * (xhat * gain[None, :] + offset[None, :])
                tl.store(dscale_ptr + offs, dscale.to(dscale_ptr.dtype.element_ty), mask)
            dz *= 1.0 + _vector(scale_ptr, row[:, None] * scale_stride + e[None, :], mask, 0.0)
        h = dz * gain[None, :]
        c1 = tl.sum(h, 1) / E
        c2 = tl.sum(h * xhat, 1) / E
        dx = (h - c1[:, None] - xhat * c2[:, None]) * rstd[:, None]
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask)
        s1 += tl.sum(dz, 0)
        s2 += tl.sum(dz * xhat, 0)
    if partial_ptr is not None:
        out = partial_ptr + (segment * parts + part) * 2 * E + e
        tl.store(out, s1, mask_e)
        tl.store(out + E, s2, mask_e)


# ---- launchers ----


class _Call:
    """Sizes, strides and small tensors of one call."""

    def __init__(self, x, shift, scale, weight, bias):
        modulation = scale if scale is not None else shift
        self.token = modulation is not None and modulation.dim() == x.dim()
        self.width = x.shape[-1]
        self.segments = x.shape[0] if modulation is not None and not self.token else 1
        self.rows = x.numel() // self.width // self.segments
        self.smalls = (shift, scale, weight, bias, row_stride(shift), row_stride(scale))

    def constants(self, tile: Tile) -> dict:
        block = next_power_of_2(self.width)
        sizes = {"E": self.width, "TOKEN": self.token}
        return {**sizes, "BLOCK_R": tile.rows, "BLOCK_E": block}


def plan_forward(x, shift, scale, weight, bias, eps):
    """Outputs and launches of :func:`forward`."""
    y = torch.empty_like(x)
    stats = torch.empty((2, *x.shape[:-1]), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, stats, []
    call = _Call(x, shift, scale, weight, bias)
    tile = pick_tile(TILES, call.width)
    blocks = cdiv(call.rows, tile.rows)
    args = (x, y, stats[0], stats[1], *call.smalls, call.rows, blocks, eps)
    grid = (call.segments * blocks,)
    return y, stats, [Launch(layer_norm_fwd_kernel, grid, args, call.constants(tile), tile.warps)]


def forward(
    x: torch.Tensor,  # [*, E] contiguous
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y like x, [mean, rstd] float32 [2, *])."""
    y, stats, launches = plan_forward(x, shift, scale, weight, bias, eps)
    run(launches, x)
    return y, stats


def plan_backward(grad, x, stats, shift, scale, weight, bias):
    """dx, dscale of tokens or None, sums of parts [segments, parts, 2, E] or None, launches."""
    call = _Call(x, shift, scale, weight, bias)
    per_segment = not call.token and (shift is not None or scale is not None)
    part_rows = max(PART_ROWS, cdiv(call.rows, MAX_PARTS))
    parts = cdiv(call.rows, part_rows)
    dx, partial, dscale = torch.empty_like(x), None, None
    if weight is not None or bias is not None or per_segment:
        shape = (call.segments, parts, 2, call.width)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    if call.token and scale is not None:
        dscale = torch.empty(scale.shape, dtype=scale.dtype, device=scale.device)
    args = (x, grad, dx, dscale, partial, stats[0], stats[1], *call.smalls)
    tile = pick_tile(BACKWARD_TILES, call.width)
    launch = Launch(
        layer_norm_bwd_kernel,
        (call.segments * parts,),
        (*args, call.rows, part_rows, parts),
        call.constants(tile),
        tile.warps,
    )
    return dx, dscale, partial, [launch]


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    stats: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(dx, dshift, dscale, dweight, dbias); empty where the tensor is absent."""
    smalls = (shift, scale, weight, bias)
    if x.numel() == 0:
        found = [None if t is None else torch.zeros_like(t) for t in smalls]
        dx = torch.empty_like(x)
    else:
        dx, dscale, partial, launches = plan_backward(grad, x, stats, *smalls)
        run(launches, x)
        found = [None, dscale, None, None]
        if partial is not None:
            found = _small_gradients(partial.sum(1), dscale, *smalls)
    return dx, *(
        x.new_empty(0) if t is None or g is None else g.to(t.dtype)
        for t, g in zip(smalls, found, strict=True)
    )


def _small_gradients(sums, dscale, shift, scale, weight, bias):
    """Of shift, scale, weight and bias, from the sums of dz and dz * xhat [segments, 2, E]."""
    dz, dz_xhat = sums.unbind(1)
    if dscale is None and scale is not None:
        dscale = dz_xhat.clone() if weight is None else weight.float() * dz_xhat
        if bias is not None:
            dscale = dscale + bias.float() * dz
        factor = 1 + scale.float()
        dweight, dbias = (factor * dz_xhat).sum(0), (factor * dz).sum(0)
    else:
        dweight, dbias = dz_xhat.sum(0), dz.sum(0)
    return [dz.clone(), dscale, dweight, dbias]  # outputs of an operator share no memory


def aot_specs() -> list[AotSpec]:
    """Calls worth compiling without a GPU: plain rows of Swin and ViT, DiT's modulation, tokens."""

    def spec(name: str, shape: tuple[int, ...], modulation: str, affine: bool) -> AotSpec:
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        small = {"none": None, "sample": (shape[0], shape[-1]), "token": shape}[modulation]
        m = None if small is None else torch.empty(small, dtype=torch.bfloat16, device="meta")
        w = torch.empty(shape[-1], dtype=torch.bfloat16, device="meta") if affine else None

        def launches(device: Device) -> list[Launch]:
            _, stats, forward_launches = plan_forward(x, m, m, w, w, 1e-6)
            shift = None if modulation == "token" else m
            return forward_launches + plan_backward(x, x, stats, shift, m, w, w)[3]

        return AotSpec(name, launches)

    return [
        spec("swin_t_norm", (4, 3136, 96), "none", True),
        spec("vit_b_norm", (8, 197, 768), "none", True),
        spec("dit_xl_norm", (8, 256, 1152), "sample", False),
        spec("wan_token_norm", (1, 1024, 1536), "token", False),
        spec("widest_norm", (2, 64, 8192), "none", True),
    ]
