"""Cosine attention (Swin V2) for the attention core: s = gain * q . k / (|q| |k|).

Rows are multiplied as they are, and the score by the gain and both inverse norms: tiles go from
memory to the matrix units untouched, and no rounded direction is ever formed. Norms are taken of
the rows a program has loaded anyway. Blocks of rows are pairs as in ``_attention.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._primitives import LN2, LOG2E

MAX_LOG_GAIN = tl.constexpr(4.605170185988092)  # ln 100
MIN_NORM_SQUARED = tl.constexpr(1e-24)


@triton.jit
def sum_products(a, b, D1: tl.constexpr):
    """Row sums of a * b, in float32."""
    y = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if D1 > 0:
        y += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return y


@triton.jit
def inverse_norms(x, D1: tl.constexpr):
    return tl.rsqrt(tl.maximum(sum_products(x, x, D1), MIN_NORM_SQUARED))


@triton.jit
def row_scale(x, head, scale, log_gain_ptr, D1: tl.constexpr):
    """What turns products with the rows x into scores of the exp2 domain: ``scale``, or with a gain
    a factor per row, which :func:`pair_scale` completes."""
    if log_gain_ptr is None:
        return scale
    else:
        log_gain = tl.load(log_gain_ptr + head)
        log_gain = tl.where(log_gain > MAX_LOG_GAIN, MAX_LOG_GAIN, log_gain)  # NaN stays one
        return tl.exp(log_gain) * LOG2E * inverse_norms(x, D1)


@triton.jit
def pair_scale(scale, x, D1: tl.constexpr, COSINE: tl.constexpr):
    """(factor of the scores of a tile whose columns are the rows x, 1 / |x| of its columns)"""
    if COSINE:
        inverse = inverse_norms(x, D1)[None, :]
        return scale[:, None] * inverse, inverse
    else:
        return scale, None


@triton.jit
def weigh_score_grad(ds, inverse, DTYPE: tl.constexpr):
    """What the rows x of :func:`pair_scale` are weighted by: ds / |x|. float16 cannot hold it for
    the shortest x; infinity times the zeros among them would be NaN."""
    if inverse is None:
        return ds
    elif tl.float16 == DTYPE:
        return tl.clamp(ds * inverse, -65504.0, 65504.0)
    else:
        return ds * inverse


@triton.jit
def row_grad(dx, x, scale, D1: tl.constexpr):
    """(gradient of the rows x from dx, the weighted rows summed; x . gradient of their lengths as
    if the scores were not divided by them, which is how much the gain matters). ``scale`` is that
    of :func:`row_scale`."""
    factor = (scale * LN2)[:, None]
    y = (dx[0] * factor,)
    if D1 > 0:
        y = y + (dx[1] * factor,)
    along = sum_products(x, y, D1)
    squared = sum_products(x, x, D1)
    # A norm that was clamped is a constant.
    share = along / tl.maximum(squared, MIN_NORM_SQUARED)
    share = tl.where(squared > MIN_NORM_SQUARED, share, 0.0)[:, None]
    z = (y[0] - x[0].to(tl.float32) * share,)
    if D1 > 0:
        z = z + (y[1] - x[1].to(tl.float32) * share,)
    return z, along
