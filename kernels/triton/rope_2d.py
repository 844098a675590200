"""Rotary positions for GPUs: one program turns all pairs of a few heads of a few tokens.

A tile is tokens times heads rows of head dim columns. Its partner elements are loaded by a second,
permuted load, which the first-level cache serves: exchanging them between threads would need shared
memory and a barrier. Tables are read once per tile of heads they are shared by.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from ._primitives import AotSpec, Device, Launch, cdiv, next_power_of_2, run

# Elements of a program's tile: 16 a thread of 4 warps, in two loads of 16 bytes of bfloat16.
TILE = 2048


@triton.jit
def rope_2d_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, tokens, heads, prefix, rows,
    stride_b, stride_n, stride_h, table_b, table_n, table_h,
    sin_b, sin_n, sin_h,
    D: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows are (batch, token, head), heads innermost, as the output lies."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    h, token = row % heads, row // heads
    n, b = token % tokens, token // tokens
    at = n - prefix
    d = tl.arange(0, BLOCK_D)
    half = D // 2
    if INTERLEAVED:
        partner = d ^ 1
        first = d % 2 == 0
    else:
        first = d < half
        partner = tl.where(first, d + half, d - half)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    turned = mask & (at >= 0)[:, None]
    source = x_ptr + (b * stride_b + n * stride_n + h * stride_h)[:, None]
    x = tl.load(source + d[None, :], mask, 0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask, 0.0).to(tl.float32)
    cos_row = cos_ptr + (b * table_b + at * table_n + h * table_h)[:, None]
    sin_row = sin_ptr + (b * sin_b + at * sin_n + h * sin_h)[:, None]
    cos = tl.load(cos_row + d[None, :], turned, 1.0)
    if INVERSE:
        # The transposed rotation: the sine that turned the partner.
        sin = tl.load(sin_row + partner[None, :], turned, 0.0)
        sin = tl.where(first[None, :], sin, -sin)
    else:
        sin = tl.load(sin_row + d[None, :], turned, 0.0)
        sin = tl.where(first[None, :], -sin, sin)
    # A prefix token is copied: 0 times an infinity would not be.
    y = tl.where(turned, x * cos + other * sin, x)
    tl.store(y_ptr + row[:, None] * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask)


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
    block_d = next_power_of_2(d)
    block_r = max(1, TILE // block_d)
    rows = b * n * h
    args = (
        x, y, cos, sin, n, h, n - cos.shape[1], rows, *x.stride()[:3],
        *_table_strides(cos), *_table_strides(sin),
    )  # fmt: skip
    constants = {
        "D": d, "INTERLEAVED": interleaved, "INVERSE": inverse, "BLOCK_R": block_r,
        "BLOCK_D": block_d,
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
