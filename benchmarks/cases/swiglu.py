"""Shapes of swiglu: MLPs of DINOv2, UNI2-h, LightningDiT (one projection) and EVA-02 (two)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

import vitkit

from ..harness import Case
from .elementwise import DTYPES, make_case

OP = "swiglu"
# (model, batch, tokens, width of the result, one projection, sets)
SHAPES = [
    ("DINOv2 ViT-g/14", 4, 257, 4096, True, ("smoke", "fast", "full")),
    ("UNI2-h", 4, 265, 4096, True, ("full",)),
    ("LightningDiT-XL/1", 8, 256, 3072, True, ("full",)),
    ("EVA-02 L/14", 4, 257, 2730, False, ("full",)),
]


def _packed(x: torch.Tensor) -> list[torch.Tensor]:
    gate, value = x.chunk(2, dim=-1)
    return [F.silu(gate) * value]


def _separate(value: torch.Tensor, gate: torch.Tensor) -> list[torch.Tensor]:
    return [F.silu(gate) * value]


def cases(device: str, shapes: Sequence[tuple] = SHAPES) -> list[Case]:
    found = []
    for name, batch, tokens, width, packed, sets in shapes:
        shape = (batch, tokens, 2 * width if packed else width)
        for backward in (False, True):
            for dtype in DTYPES:

                def inputs(shape=shape, packed=packed, dtype=dtype):
                    count = 1 if packed else 2
                    drawn = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
                    return drawn, []

                n = batch * tokens * width
                found.append(
                    make_case(
                        OP, name, "packed" if packed else "separate",
                        "x".join(map(str, shape)), dtype, backward, inputs,
                        lambda *t: [vitkit.swiglu(*t)], _packed if packed else _separate,
                        elements=(3 * n, 5 * n), flops=6.0 * n, target=1.4, sets=sets,
                    )
                )  # fmt: skip
    return found
