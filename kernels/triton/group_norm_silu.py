"""GroupNorm with its neighbours for GPUs, in both layouts.

A tensor is seen as [N, C, P] with strides, so that one set of kernels serves contiguous and
channels_last tensors: only the tile differs, long in positions or long in channels. Contiguous
groups that fit a program are read once. Otherwise one group is split over several programs: moments
of every channel in every part of the positions, a merge per group in a fixed order, and an
elementwise pass. No atomics; the number of parts depends on the shape alone.
"""

from __future__ import annotations

from typing import Any

import torch

import triton
import triton.language as tl

from ._primitives import (
    AotSpec,
    Device,
    Launch,
    cdiv,
    merge_moments,
    next_power_of_2,
    run,
    sigmoid,
    unite_moments,
)

# Elements of a group that one program holds in registers: 64 a thread at 8 warps.
ONE_PROGRAM = 16384
# Positions times channels of one part: long enough to hide its bookkeeping, short enough that the
# 32 groups of a VAE's [1, 128, 512, 512] become 2048 programs.
PART_ELEMENTS = 16384
# (positions, channels) of a tile, 2048 elements either way: 8 a thread, 16-byte loads for bfloat16.
ROWS = (2048, 1)  # [N, C, P]: one channel's positions
COLUMNS = (32, 64)  # [N, P, C]: 64 channels are 128 bytes of bfloat16, one line
MERGE = 1024
WARPS = 8


@triton.jit
def _small(ptr, n, c, C: tl.constexpr, PER_SAMPLE: tl.constexpr, mask, OTHERWISE: tl.constexpr):
    """Element of a [C] or [N, C] tensor as float32; OTHERWISE where the tensor is absent."""
    if ptr is None:
        value = tl.full(c.shape, OTHERWISE, tl.float32)
    else:
        offset = n * C + c if PER_SAMPLE else c
        value = tl.load(ptr + offset, mask, 0.0).to(tl.float32)
    return value


@triton.jit
def _channel(smalls, n, c, C: tl.constexpr, mask, mean, rstd):
    """(factor, term, centre, gain) of channels c: z = x * factor + term, xhat = x * rstd +
    centre."""
    weight, bias, add, scale, shift = smalls
    factor = 1.0 + _small(scale, n, c, C, True, mask, 0.0)
    gain = _small(weight, n, c, C, False, mask, 1.0) * factor
    offset = _small(bias, n, c, C, False, mask, 0.0) * factor + _small(
        shift, n, c, C, True, mask, 0.0
    )
    centre = (_small(add, n, c, C, True, mask, 0.0) - mean) * rstd
    return rstd * gain, gain * centre + offset, centre, gain


@triton.jit
def _activate(z, SILU: tl.constexpr):
    if SILU:
        z = z * sigmoid(z)
    return z


@triton.jit
def _slope(z, SILU: tl.constexpr):
    if SILU:
        s = sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope


@triton.jit
def group_norm_group_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, smalls, eps, P,
    C: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a contiguous group, read once."""
    group = tl.program_id(0).to(tl.int64)
    n = group // GROUPS
    first = (group % GROUPS) * (C // GROUPS)
    size = (C // GROUPS) * P
    offs = tl.arange(0, BLOCK)
    mask = offs < size
    c = first + offs // P
    start = (n * C + first) * P
    x = tl.load(x_ptr + start + offs, mask, 0.0).to(tl.float32)
    h = x + _small(smalls[2], n, c, C, True, mask, 0.0)
    mean = tl.sum(tl.where(mask, h, 0.0), 0) / size
    centred = tl.where(mask, h - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / size + eps)
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, rstd)
    factor, term, _, _ = _channel(smalls, n, c, C, mask, mean, rstd)
    y = _activate(x * factor + term, SILU)
    tl.store(y_ptr + start + offs, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def group_norm_statistics_kernel(
    x_ptr, partial_ptr, P, parts, stride_c, stride_p,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the channels of a tile over one part of the positions of one sample."""
    part, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = P.to(tl.int64) * part // parts
    end = P.to(tl.int64) * (part + 1) // parts
    mask_c = c < C
    row = x_ptr + n * C * P + c.to(tl.int64)[None, :] * stride_c
    count = tl.zeros((BLOCK_C,), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for at in tl.range(begin, end, BLOCK_P):
        p = at + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & mask_c[None, :]
        x = tl.load(row + p[:, None] * stride_p, mask, 0.0).to(tl.float32)
        here = tl.minimum(end - at, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(x, 0) / here
        d = tl.where(mask, x - tile_mean[None, :], 0.0)
        count, mean, m2 = merge_moments(count, mean, m2, here, tile_mean, tl.sum(d * d, 0))
    out = partial_ptr + ((n * parts + part) * C + c) * 2
    tl.store(out, mean, mask_c)
    tl.store(out + 1, m2, mask_c)


@triton.jit
def group_norm_merge_kernel(
    partial_ptr, mean_ptr, rstd_ptr, smalls, eps, P, parts,
    C: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: moments of a group from those of its channels and parts, add included."""
    group = tl.program_id(0).to(tl.int64)
    n = group // GROUPS
    first = (group % GROUPS) * (C // GROUPS)
    items = (C // GROUPS) * parts
    count, mean, m2 = 0.0, 0.0, 0.0
    for at in tl.range(0, items, BLOCK):
        i = at + tl.arange(0, BLOCK)
        mask = i < items
        c = first + i % (C // GROUPS)
        part = (i // (C // GROUPS)).to(tl.int64)
        size = P * (part + 1) // parts - P * part // parts
        out = partial_ptr + ((n * parts + part) * C + c) * 2
        part_mean = tl.load(out, mask, 0.0) + _small(smalls[2], n, c, C, True, mask, 0.0)
        here = tl.where(mask, size.to(tl.float32), 0.0)
        block = unite_moments(here, part_mean, tl.load(out + 1, mask, 0.0), 0)
        count, mean, m2 = merge_moments(count, mean, m2, block[0], block[1], block[2])
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, tl.rsqrt(m2 / count + eps))


@triton.jit
def group_norm_apply_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, smalls, P, stride_c, stride_p,
    C: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the output."""
    p = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    mask = (p < P)[:, None] & mask_c[None, :]
    offset = n * C * P + c.to(tl.int64)[None, :] * stride_c + p[:, None] * stride_p
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
    group = n * GROUPS + c // (C // GROUPS)
    mean, rstd = tl.load(mean_ptr + group, mask_c, 0.0), tl.load(rstd_ptr + group, mask_c, 0.0)
    factor, term, _, _ = _channel(smalls, n, c, C, mask_c, mean, rstd)
    y = _activate(x * factor[None, :] + term[None, :], SILU)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def group_norm_sums_kernel(
    x_ptr, grad_ptr, partial_ptr, mean_ptr, rstd_ptr, smalls, P, parts, stride_c, stride_p,
    C: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz, dz * xhat and xhat for the channels of a tile over one part of the positions."""
    part, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = P.to(tl.int64) * part // parts
    end = P.to(tl.int64) * (part + 1) // parts
    mask_c = c < C
    group = n * GROUPS + c // (C // GROUPS)
    mean, rstd = tl.load(mean_ptr + group, mask_c, 0.0), tl.load(rstd_ptr + group, mask_c, 0.0)
    factor, term, centre, _ = _channel(smalls, n, c, C, mask_c, mean, rstd)
    row = n * C * P + c.to(tl.int64)[None, :] * stride_c
    s1 = tl.zeros((BLOCK_C,), tl.float32)
    s2 = tl.zeros((BLOCK_C,), tl.float32)
    s3 = tl.zeros((BLOCK_C,), tl.float32)
    for at in tl.range(begin, end, BLOCK_P):
        p = at + tl.arange(0, BLOCK_P)
        mask = (p < end)[:, None] & mask_c[None, :]
        offset = row + p[:, None] * stride_p
        x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask, 0.0).to(tl.float32)
        xhat = tl.where(mask, x * rstd[None, :] + centre[None, :], 0.0)
        dz = grad * _slope(x * factor[None, :] + term[None, :], SILU)
        s1 += tl.sum(dz, 0)
        s2 += tl.sum(dz * xhat, 0)
        s3 += tl.sum(xhat, 0)
    out = partial_ptr + ((n * parts + part) * C + c) * 3
    tl.store(out, s1, mask_c)
    tl.store(out + 1, s2, mask_c)
    tl.store(out + 2, s3, mask_c)


@triton.jit
def group_norm_merge_sums_kernel(
    partial_ptr, group_ptr, rstd_ptr, dadd_ptr, dscale_ptr, dshift_ptr, dweight_ptr, smalls,
    P, parts, C: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a group. Writes its two sums and the gradients of the small tensors, that of
    weight and bias still per sample: dweight_ptr is [2, N, C]."""
    group = tl.program_id(0).to(tl.int64)
    n, samples = group // GROUPS, tl.num_programs(0) // GROUPS
    i = tl.arange(0, BLOCK)
    mask = i < C // GROUPS
    c = (group % GROUPS) * (C // GROUPS) + i
    s1 = tl.zeros((BLOCK,), tl.float32)
    s2 = tl.zeros((BLOCK,), tl.float32)
    s3 = tl.zeros((BLOCK,), tl.float32)
    for part in tl.range(0, parts):
        source = partial_ptr + ((n * parts + part) * C + c) * 3
        s1 += tl.load(source, mask, 0.0)
        s2 += tl.load(source + 1, mask, 0.0)
        s3 += tl.load(source + 2, mask, 0.0)
    weight, bias, _, scale, _ = smalls
    factor = 1.0 + _small(scale, n, c, C, True, mask, 0.0)
    w = _small(weight, n, c, C, False, mask, 1.0)
    gain = w * factor
    g1, g2 = tl.sum(gain * s1, 0), tl.sum(gain * s2, 0)
    tl.store(group_ptr + group * 2, g1)
    tl.store(group_ptr + group * 2 + 1, g2)
    size = ((C // GROUPS) * P).to(tl.float32)
    rstd, at = tl.load(rstd_ptr + group), n * C + c
    tl.store(dadd_ptr + at, rstd * (gain * s1 - P * (g1 / size) - s3 * (g2 / size)), mask)
    tl.store(dscale_ptr + at, w * s2 + _small(bias, n, c, C, False, mask, 0.0) * s1, mask)
    tl.store(dshift_ptr + at, s1, mask)
    tl.store(dweight_ptr + at, factor * s2, mask)
    tl.store(dweight_ptr + samples * C + at, factor * s1, mask)


@triton.jit
def group_norm_apply_bwd_kernel(
    x_ptr, grad_ptr, dx_ptr, group_ptr, mean_ptr, rstd_ptr, smalls, P, stride_c, stride_p,
    C: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gain * dz - G1 / m - xhat * G2 / m)"""
    p = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    mask = (p < P)[:, None] & mask_c[None, :]
    offset = n * C * P + c.to(tl.int64)[None, :] * stride_c + p[:, None] * stride_p
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask, 0.0).to(tl.float32)
    group = n * GROUPS + c // (C // GROUPS)
    mean, rstd = tl.load(mean_ptr + group, mask_c, 0.0), tl.load(rstd_ptr + group, mask_c, 0.0)
    factor, term, centre, _ = _channel(smalls, n, c, C, mask_c, mean, rstd)
    size = ((C // GROUPS) * P).to(tl.float32)
    g1 = tl.load(group_ptr + group * 2, mask_c, 0.0) / size
    g2 = tl.load(group_ptr + group * 2 + 1, mask_c, 0.0) / size
    dz = grad * _slope(x * factor[None, :] + term[None, :], SILU)
    xhat = x * rstd[None, :] + centre[None, :]
    dx = factor[None, :] * dz - rstd[None, :] * (g1[None, :] + xhat * g2[None, :])
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)


# ---- launchers ----


class _Call:
    """Sizes, strides and tiles of one call."""

    def __init__(self, x: torch.Tensor, groups: int, smalls: tuple[torch.Tensor | None, ...]):
        self.n, self.c = x.shape[:2]
        self.positions = x.numel() // (self.n * self.c)
        self.columns = not x.is_contiguous()
        self.stride_c, self.stride_p = (1, self.c) if self.columns else (self.positions, 1)
        self.block_p, self.block_c = COLUMNS if self.columns else ROWS
        self.block_c = min(self.block_c, next_power_of_2(self.c))
        self.block_p = min(self.block_p, next_power_of_2(self.positions))
        per_part = max(self.block_p, PART_ELEMENTS // (self.block_c if self.columns else 1))
        self.parts = min(cdiv(self.positions, per_part), 4096)
        self.groups = groups
        self.smalls = tuple(t if t is None else t.contiguous() for t in smalls)
        self.sizes = {"C": self.c, "GROUPS": groups}
        self.tile = {"BLOCK_P": self.block_p, "BLOCK_C": self.block_c}

    def grid(self, middle: int) -> tuple[int, int, int]:
        return cdiv(self.c, self.block_c), middle, self.n

    @property
    def strides(self) -> tuple[int, int]:
        return self.stride_c, self.stride_p


def plan_forward(x, num_groups, smalls, eps, silu):
    """Outputs and launches of :func:`forward`."""
    y = torch.empty_like(x)
    mean = torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.zero_(), []
    call = _Call(x, num_groups, smalls)
    group = call.c // num_groups * call.positions
    if not call.columns and group <= ONE_PROGRAM:
        constants = {**call.sizes, "SILU": silu, "BLOCK": next_power_of_2(group)}
        args = (x, y, mean, rstd, call.smalls, eps, call.positions)
        return (
            y,
            mean,
            rstd,
            [Launch(group_norm_group_kernel, (call.n * num_groups,), args, constants, WARPS)],
        )
    partial = torch.empty((call.n, call.parts, call.c, 2), dtype=torch.float32, device=x.device)
    merged = (partial, mean, rstd, call.smalls, eps, call.positions, call.parts)
    applied = (x, y, mean, rstd, call.smalls, call.positions, *call.strides)
    return y, mean, rstd, [
        Launch(
            group_norm_statistics_kernel,
            call.grid(call.parts),
            (x, partial, call.positions, call.parts, *call.strides),
            {"C": call.c, **call.tile},
            WARPS,
        ),
        Launch(
            group_norm_merge_kernel,
            (call.n * num_groups,),
            merged,
            {**call.sizes, "BLOCK": MERGE},
        ),
        Launch(
            group_norm_apply_kernel,
            call.grid(cdiv(call.positions, call.block_p)),
            applied,
            {**call.sizes, "SILU": silu, **call.tile},
            WARPS,
        ),
    ]  # fmt: skip


def forward(
    x: torch.Tensor,  # [N, C, *], contiguous or channels_last
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y like x, mean [N, num_groups] float32, rstd likewise)."""
    smalls = (weight, bias, add, scale, shift)
    y, mean, rstd, launches = plan_forward(x, num_groups, smalls, eps, silu)
    run(launches, x)
    return y, mean, rstd


def plan_backward(grad, x, mean, rstd, num_groups, smalls, silu):
    """dx, float32 gradients of the small tensors, and launches of :func:`backward`."""
    call = _Call(x, num_groups, smalls)
    n, c = call.n, call.c

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    dx, partial, groups = torch.empty_like(x), floats(n, call.parts, c, 3), floats(n, num_groups, 2)
    dadd, dscale, dshift, daffine = floats(n, c), floats(n, c), floats(n, c), floats(2, n, c)
    constants = {**call.sizes, "SILU": silu, **call.tile}
    sums = (x, grad, partial, mean, rstd, call.smalls, call.positions, call.parts, *call.strides)
    outputs = (groups, rstd, dadd, dscale, dshift, daffine)
    merged = (partial, *outputs, call.smalls, call.positions, call.parts)
    applied = (x, grad, dx, groups, mean, rstd, call.smalls, call.positions, *call.strides)
    launches = [
        Launch(group_norm_sums_kernel, call.grid(call.parts), sums, constants, WARPS),
        Launch(
            group_norm_merge_sums_kernel,
            (n * num_groups,),
            merged,
            {**call.sizes, "BLOCK": next_power_of_2(c // num_groups)},
        ),
        Launch(
            group_norm_apply_bwd_kernel,
            call.grid(cdiv(call.positions, call.block_p)),
            applied,
            constants,
            WARPS,
        ),
    ]
    return dx, (daffine, dadd, dscale, dshift), launches


def backward(
    grad: torch.Tensor,  # the layout of x
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    silu: bool,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(dx, dweight, dbias, dadd, dscale, dshift); empty where the tensor is absent."""
    smalls = (weight, bias, add, scale, shift)
    if x.numel() == 0:
        found: list[Any] = [None if t is None else torch.zeros_like(t) for t in smalls]
        dx = torch.empty_like(x)
    else:
        dx, (daffine, dadd, dscale, dshift), launches = plan_backward(
            grad, x, mean, rstd, num_groups, smalls, silu
        )
        run(launches, x)
        dweight, dbias = daffine[0].sum(0), daffine[1].sum(0)
        found = [dweight, dbias, dadd, dscale, dshift]
    return dx, *(
        x.new_empty(0) if t is None else g.to(t.dtype) for t, g in zip(smalls, found, strict=True)
    )


def aot_specs() -> list[AotSpec]:
    """Calls worth compiling without a GPU: a group in one program, split groups in both layouts."""
    specs = []
    shapes = {
        "unet_16px": (2, 1280, 16, 16, False),
        "unet_64px_nhwc": (2, 320, 64, 64, True),
        "vae_512px": (1, 128, 512, 512, False),
    }
    for name, (n, c, h, w, columns) in shapes.items():
        x = torch.empty(n, c, h, w, dtype=torch.bfloat16, device="meta")
        if columns:
            x = x.contiguous(memory_format=torch.channels_last)
        shapes_of_smalls = [(c,), (c,), (n, c)]
        given = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes_of_smalls]
        smalls = (*given, None, None)

        def launches(device: Device, x=x, smalls=smalls) -> list[Launch]:
            _, mean, rstd, forward_launches = plan_forward(x, 32, smalls, 1e-5, True)
            return forward_launches + plan_backward(x, x, mean, rstd, 32, smalls, True)[2]

        specs.append(AotSpec(name, launches))
    return specs
