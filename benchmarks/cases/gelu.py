"""Shapes of gelu: MLPs of ViTs, Swin and SigLIP, and a ConvNeXt map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

import vitkit

from ..harness import Case
from .elementwise import DTYPES, make_case

OP = "gelu"
# (model, shape, approximation, channels_last, sets)
SHAPES = [
    ("ViT-B/16", (8, 197, 3072), "none", False, ("smoke", "fast", "full")),
    ("Swin-T stage 1", (4, 3136, 384), "none", False, ("full",)),
    ("SigLIP so400m", (4, 256, 4304), "tanh", False, ("fast forward", "full")),
    ("ConvNeXt-T stage 2", (4, 768, 28, 28), "none", True, ("full",)),
]


def cases(device: str, shapes: Sequence[tuple] = SHAPES) -> list[Case]:
    found = []
    for name, shape, form, channels_last, sets in shapes:
        for backward in (False, True):
            for dtype in DTYPES:

                def inputs(shape=shape, channels_last=channels_last, dtype=dtype):
                    x = torch.randn(shape, device=device).to(dtype)
                    last = torch.channels_last
                    return [x.contiguous(memory_format=last) if channels_last else x], []

                def ours(x, form=form):
                    return [vitkit.gelu(x, approximate=form)]

                def eager(x, form=form):
                    return [F.gelu(x, approximate=form)]

                n = torch.Size(shape).numel()
                found.append(
                    make_case(
                        OP, name, "NHWC" if channels_last else "erf" if form == "none" else form,
                        "x".join(map(str, shape)), dtype, backward, inputs,
                        ours, eager,
                        elements=(2 * n, 3 * n), flops=5.0 * n, target=1.4, sets=sets,
                    )
                )  # fmt: skip
    return found
