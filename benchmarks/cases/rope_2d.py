"""Shapes of rope_2d: thirds of a qkv, turned as the models' own code turns them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import vitkit

from ..harness import Case
from .elementwise import DTYPES, make_case

OP = "rope_2d"
# (model, batch, tokens, heads, head dim, positions, layout, sets)
SHAPES = [
    ("DINOv3 ViT-B/16", 8, 201, 12, 64, 196, "half", ("smoke", "fast", "full")),
    ("EVA-02 L/14", 4, 257, 16, 64, 256, "interleaved", ("full",)),
    ("FLUX.1 512px", 1, 1536, 24, 128, 1536, "interleaved", ("full",)),
]


def _dinov3(q, k, cos, sin):
    def turned(x):
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    prefix = q.shape[1] - cos.shape[0]
    cos, sin = cos[:, None], sin[:, None]
    parts = [(t[:, :prefix], t[:, prefix:]) for t in (q, k)]
    return [torch.cat((p, (t * cos + turned(t) * sin).to(t.dtype)), 1) for p, t in parts]


def _neighbours(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def _flux(q, k, cos, sin):
    prefix = q.shape[1] - cos.shape[0]
    cos, sin = cos[:, None], sin[:, None]
    if prefix == 0:
        return [_neighbours(t, cos, sin) for t in (q, k)]
    return [torch.cat((t[:, :prefix], _neighbours(t[:, prefix:], cos, sin)), 1) for t in (q, k)]


def cases(device: str, shapes: Sequence[tuple] = SHAPES) -> list[Case]:
    found = []
    for name, b, n, h, d, positions, layout, sets in shapes:
        for backward in (False, True):
            for dtype in DTYPES:

                def inputs(b=b, n=n, h=h, d=d, positions=positions, layout=layout, dtype=dtype):
                    q, k, _ = torch.randn(b, n, 3, h, d, device=device).to(dtype).unbind(2)
                    angles = 10 * torch.rand(positions, d // 2, device=device)
                    angles = (
                        angles.repeat(1, 2) if layout == "half" else angles.repeat_interleave(2, 1)
                    )
                    return [q, k], [angles.cos(), angles.sin()]

                def ours(q, k, cos, sin, layout=layout):
                    return list(vitkit.rope_2d(q, k, cos, sin, layout=layout))

                elements = 2 * 2 * b * n * h * d
                found.append(
                    make_case(
                        OP, name, layout, f"{b}x{n}x{h}x{d} x2, {positions} positions", dtype,
                        backward, inputs, ours, _dinov3 if layout == "half" else _flux,
                        elements=(elements, elements), flops=1.5 * elements, terms=2, target=1.4,
                        sets=sets,
                    )
                )  # fmt: skip
    return found
