"""Rotary positions for GPUs: one program turns all pairs of some heads of some tokens.

A tile is tokens times heads rows of head_dim / 2 pairs. Halves are two runs of memory; neighbours
are one, taken apart in registers: every element is loaded once, in runs. Tables come through the
first-level cache, whose lines the heads of a token share.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from ._primitives import AotSpec, Device, Launch, cdiv, next_power_of_2, run

# Elements of a program's tile: 16 a thread of 4 warps, in two loads of 16 bytes of bfloat16.
TILE = 2048


@triton.jit
def _load_pairs(
    row, mask, D: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """First and second elements [BLOCK_R, BLOCK_P] of the pairs of rows, in float32."""
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_P)
        x = tl.load(row[:, None] + d[None, :], mask[:, None] & (d < D)[None, :], 0.0)
        a, b = tl.split(tl.reshape(x.to(tl.float32), [BLOCK_R, BLOCK_P, 2]))
    else:
        p = tl.arange(0, BLOCK_P)
        inside = mask[:, None] & (p < D // 2)[None, :]
        a = tl.load(row[:, None] + p[None, :], inside, 0.0).to(tl.float32)
        b = tl.load(row[:, None] + (p + D // 2)[None, :], inside, 0.0).to(tl.float32)
    return a, b


@triton.jit
def rope_2d_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, tokens, heads, prefix, rows,
    stride_b, stride_n, stride_h, cos_b, cos_n, cos_h, sin_b, sin_n, sin_h,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rows are (batch, token, head), heads innermost, as the output lies."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    h, token = row % heads, row // heads
    n, b = token % tokens, token // tokens
    at = n - prefix
    mask = row < rows
    turned = mask & (at >= 0)
    source = x_ptr + b * stride_b + n * stride_n + h * stride_h
    x_a, x_b = _load_pairs(source, mask, D, INTERLEAVED, BLOCK_R, BLOCK_P)
    angles = cos_ptr + b * cos_b + at * cos_n + h * cos_h
    cos_1, cos_2 = _load_pairs(angles, turned, D, INTERLEAVED, BLOCK_R, BLOCK_P)
    angles = sin_ptr + b * sin_b + at * sin_n + h * sin_h
    sin_1, sin_2 = _load_pairs(angles, turned, D, INTERLEAVED, BLOCK_R, BLOCK_P)
    if INVERSE:
        y_a, y_b = x_a * cos_1 + x_b * sin_2, x_b * cos_2 - x_a * sin_1
    else:
        y_a, y_b = x_a * cos_1 - x_b * sin_1, x_b * cos_2 + x_a * sin_2
    y_a = tl.where(turned[:, None], y_a, x_a).to(y_ptr.dtype.element_ty)
    y_b = tl.where(turned[:, None], y_b, x_b).to(y_ptr.dtype.element_ty)
    out = y_ptr + row[:, None] * D
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK_P)
        y = tl.reshape(tl.join(y_a, y_b), [BLOCK_R, 2 * BLOCK_P])
        tl.store(out + d[None, :], y, mask[:, None] & (d < D)[None, :])
    else:
        p = tl.arange(0, BLOCK_P)
        inside = mask[:, None] & (p < D // 2)[None, :]
        tl.store(out + p[None, :], y_a, inside)
        tl.store(out + (p + D // 2)[None, :], y_b, inside)


def _table_strides(table: torch.Tensor) -> tuple[int, int, int]:
    """(batch, token, head) strides of [B or 1, N', H or 1, D], 0 where it is shared."""
    b, n, h = (0 if table.shape[d] == 1 else table.stride(d) for d in range(3))
    return b, n, h


def plan(x, cos, sin, interleaved, inverse):
    """Output and launch of one tensor [B, N, H, D]."""
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y, []
    b, n, h, d = x.shape
    block_p = next_power_of_2(d // 2)
    block_r = max(1, TILE // (2 * block_p))
    rows = b * n * h
    args = (
        x, y, cos, sin, n, h, n - cos.shape[1], rows, *x.stride()[:3],
        *_table_strides(cos), *_table_strides(sin),
    )  # fmt: skip
    constants = {
        "D": d, "INTERLEAVED": interleaved, "INVERSE": inverse, "BLOCK_R": block_r,
        "BLOCK_P": block_p,
    }  # fmt: skip
    return y, [Launch(rope_2d_kernel, (cdiv(rows, block_r),), args, constants)]


def rotate(
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor | None,  # [B, N, Hk, D]
    cos: torch.Tensor,  # [B or 1, N', H or 1, D] float32
    sin: torch.Tensor,
    interleaved: bool,
    *,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned, or turned back; k empty if it is None."""
    turned_q, launches = plan(q, cos, sin, interleaved, inverse)
    turned_k = q.new_empty(0)
    if k is not None:
        turned_k, more = plan(k, cos, sin, interleaved, inverse)
        launches = launches + more
    run(launches, q)
    return turned_q, turned_k


def aot_specs() -> list[AotSpec]:
    """Thirds of a qkv with a class token and registers; FLUX."""

    def specs(shape, heads_stride, positions, interleaved):
        def launches(device: Device) -> list[Launch]:
            b, n, h, d = shape
            qkv = torch.empty(b, n, heads_stride, h, d, dtype=torch.bfloat16, device="meta")
            x = qkv[:, :, 0]
            cos = torch.empty(1, positions, 1, d, device="meta")
            forward = plan(x, cos, cos, interleaved, False)[1]
            return forward + plan(torch.empty_like(x), cos, cos, interleaved, True)[1]

        return launches

    return [
        AotSpec("dinov3_rope", specs((8, 201, 12, 64), 3, 196, False)),
        AotSpec("flux_rope", specs((1, 4608, 24, 128), 1, 4608, True)),
    ]
