"""Where the pixels of a patch lie, and what they become: the gathered operand of patch_embed.

`g`, the geometry, is a tuple: (places,) for packed images, otherwise (None, strides of image,
channel, frame, row and column, frames, height, width, grid of frames, rows and columns, tokens
before the patches, first row of the position embedding).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl


def folded(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[list[int], list[float], list[float], float]:
    """(centre, factor, offset, scale) with (x / 255 - mean) / std = (x - centre) * factor * scale
    + offset for bytes x.

    The centre is an integer: x - centre is exact in bfloat16 and small around the mean. Factors are
    at most 1 and scale is applied to sums, so that a weight times its factor stays in the range of
    its dtype, and is the weight itself where all channels have one std.
    """
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    centre = [min(max(round(255 * m), 0), 255) for m in mean]
    scale = max((1 / (255 * s) for s in std), default=1.0)
    factor = [1 / (255 * s) / scale for s in std]
    offset = [(c / 255 - m) / s for c, m, s in zip(centre, mean, std, strict=True)]
    return centre, factor, offset, scale


@triton.jit
def origins(m, g, PACKED: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Of tokens m: (first pixel, stride of channels, stride of rows, frames, rows and columns
    inside the image, row of the position embedding, row of the output)."""
    m = m.to(tl.int64)
    if PACKED:
        at = g[0] + m * 6
        origin, channels, rows = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        found = (
            origin, channels, rows, tl.full(m.shape, 1, tl.int64), tl.load(at + 3),
            tl.load(at + 4), tl.load(at + 5), m,
        )  # fmt: skip
    else:
        _, image, channel, frame, row, column, t, h, w, gt, gh, gw, prefixes, first = g
        n = m % (gt * gh * gw)
        b = m // (gt * gh * gw)
        x, y, z = (n % gw) * PW, (n // gw % gh) * PH, (n // gw // gh) * PT
        origin = b * image + z * frame + y * row + x * column
        found = (
            origin, tl.zeros_like(m) + channel, tl.zeros_like(m) + row, t - z, h - y, w - x,
            n + first, b * (gt * gh * gw + prefixes) + prefixes + n,
        )  # fmt: skip
    return found


@triton.jit
def pixels(
    k, o, g, mask_m, PACKED: tl.constexpr, PAD: tl.constexpr, K: tl.constexpr, PT: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Of elements k of patches with origins o: (offset, whether it lies inside the image)."""
    c, t, y, x = k // (PT * PH * PW), k // (PH * PW) % PT, k // PW % PH, k % PW
    column = 1 if PACKED else g[5]
    frame = 0 if PACKED else g[3]
    offset = (
        o[0][:, None] + o[1][:, None] * c[None, :] + o[2][:, None] * y[None, :]
        + (t * frame + x * column)[None, :]
    )  # fmt: skip
    inside = mask_m[:, None] & (k < K)[None, :]
    if PAD:
        inside &= t[None, :] < o[3][:, None]
        inside &= (y[None, :] < o[4][:, None]) & (x[None, :] < o[5][:, None])
    return offset, inside


@triton.jit
def patches(
    images_ptr, bytes_ptr, k, o, g, mask_m, PACKED: tl.constexpr, PAD: tl.constexpr,
    K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """A tile of the left operand. bytes_ptr: [2, C] centre and padding of uint8 pixels."""
    offset, inside = pixels(k, o, g, mask_m, PACKED, PAD, K, PT, PH, PW)
    a = tl.load(images_ptr + offset, inside, 0)
    if bytes_ptr is not None:
        c = k // (PT * PH * PW)
        channels: tl.constexpr = K // (PT * PH * PW)
        centre = tl.load(bytes_ptr + c, k < K, 0.0)
        padding = tl.load(bytes_ptr + channels + c, k < K, 0.0)
        a = tl.where(inside, a.to(tl.float32) - centre[None, :], padding[None, :])
        a = tl.where(mask_m[:, None] & (k < K)[None, :], a, 0.0)
    return a.to(ELEMENT)
