"""Shapes of geglu: feed-forward blocks of diffusion U-Nets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

import vitkit

from ..harness import Case
from .elementwise import DTYPES, make_case

OP = "geglu"
# (model, batch, tokens, width of the result, sets)
SHAPES = [
    ("SD1.5 64px", 2, 4096, 1280, ("fast forward", "full")),
    ("SD1.5 16px", 2, 256, 5120, ("smoke", "full")),
    ("SDXL 32px", 2, 1024, 5120, ("full",)),
]


def _eager(x: torch.Tensor) -> list[torch.Tensor]:
    value, gate = x.chunk(2, dim=-1)
    return [value * F.gelu(gate)]


def cases(device: str, shapes: Sequence[tuple] = SHAPES) -> list[Case]:
    found = []
    for name, batch, tokens, width, sets in shapes:
        shape = (batch, tokens, 2 * width)
        for backward in (False, True):
            for dtype in DTYPES:

                def inputs(shape=shape, dtype=dtype):
                    return [torch.randn(shape, device=device).to(dtype)], []

                n = batch * tokens * width
                found.append(
                    make_case(
                        OP, name, "packed", "x".join(map(str, shape)), dtype, backward, inputs,
                        lambda x: [vitkit.geglu(x)], _eager,
                        elements=(3 * n, 5 * n), flops=6.0 * n, target=1.4, sets=sets,
                    )
                )  # fmt: skip
    return found
