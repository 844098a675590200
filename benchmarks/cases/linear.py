"""Shapes of vitkit.nn.Linear, alone and with the GELU behind it: projections of ViTs, Swin and the
GigaPath slide encoder. Forward only: with gradients the layer is torch's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vitkit.nn import GELU, Linear
from vitkit.nn.products import linear_gelu

from ..harness import Case, half_on_cpu, in_float32
from .elementwise import DTYPES, make_case

OP = "linear"
# (model, rows, depth, columns, gelu, sets)
SHAPES = [
    ("ViT-B/16 qkv", 8 * 197, 768, 2304, False, ("fast", "full")),
    ("ViT-B/16 fc1", 8 * 197, 768, 3072, True, ("full",)),
    ("ViT-B/16 fc2", 8 * 197, 3072, 768, False, ("full",)),
    ("Swin-T stage 1 fc1", 4 * 3136, 96, 384, True, ("smoke", "fast", "full")),
    ("Swin-T stage 1 fc2", 4 * 3136, 384, 96, False, ("full",)),
    ("Swin-T stage 4 fc2", 4 * 49, 3072, 768, False, ("fast", "full")),
    ("GigaPath slide fc1", 2048, 768, 3072, True, ("full",)),
]


def cases(device: str, shapes: Sequence[tuple] = SHAPES) -> list[Case]:
    found = []
    for name, rows, depth, columns, gelu, sets in shapes:
        for dtype in DTYPES:

            def inputs(rows=rows, depth=depth, columns=columns, dtype=dtype):
                x = torch.randn(rows, depth, device=device)
                weight = torch.randn(columns, depth, device=device) / depth**0.5
                bias = torch.randn(columns, device=device)
                return [t.to(dtype) for t in (x, weight, bias)], []

            layer = Linear(1, 1).requires_grad_(False)
            act = GELU()

            def ours(x, weight, bias, gelu=gelu, layer=layer, act=act):
                layer.weight.data, layer.bias.data = weight, bias
                return [linear_gelu(layer, act, x) if gelu else layer(x)]

            def eager(x, weight, bias, gelu=gelu):
                y = F.linear(x, weight, bias)
                return [F.gelu(y) if gelu else y]

            rivals = (
                {"eager in float32": in_float32(eager, dtype)} if half_on_cpu(dtype, device) else {}
            )
            found.append(
                make_case(
                    OP, name, "gelu" if gelu else "", f"{rows}x{depth}, {columns}", dtype, False,
                    inputs, ours, eager, rivals=rivals,
                    elements=(rows * (depth + columns) + columns * depth, 0),
                    flops=2.0 * rows * depth * columns, terms=depth, sets=sets,
                )
            )  # fmt: skip
    return found
