"""Shapes of layer_norm_modulate: LayerNorms of ViTs and Swin, the modulated ones of DiT, per sample
and per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vitkit

from ..harness import Case
from . import elementwise

OP = "layer_norm_modulate"
EPS = 1e-6

# (model, shape, modulation, targets of (fp32, bf16) forward and of forward+backward, sets)
SHAPES: list[tuple[str, tuple[int, ...], str, tuple[float | None, ...], tuple[str, ...]]] = [
    ("Swin-T stage 1", (4, 3136, 96), "none", (None, 2.0, None), ("smoke", "fast", "full")),
    ("ViT-B/16", (8, 197, 768), "none", (None, None, None), ("fast forward", "full")),
    ("DiT-XL/2", (8, 256, 1152), "sample", (2.0, 2.5, 1.5), ("fast", "full")),
    ("Wan tokens", (2, 1024, 1536), "token", (None, None, None), ("full",)),
    ("DiT-XL/2 without", (8, 256, 1152), "none", (None, None, None), ("full",)),
    ("Swin-T stage 3", (4, 196, 384), "none", (None, None, None), ("full",)),
    ("ViT-S/16, one image", (1, 197, 384), "none", (None, None, None), ("full",)),
]


def _plain(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _per_sample(x, shift, scale):
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


def _per_token(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


EAGER = {"none": _plain, "sample": _per_sample, "token": _per_token}


def make_case(
    name: str,
    shape: tuple[int, ...],
    modulation: str,
    dtype: torch.dtype,
    backward: bool,
    device: str,
    target: float | None = None,
    sets: tuple[str, ...] = ("full",),
) -> Case:
    """One case; tensors are made when it is measured. ``modulation``: none (weight and bias
    instead), sample or token."""
    width = shape[-1]
    small = {"none": (width,), "sample": (shape[0], width), "token": shape}[modulation]
    eager = EAGER[modulation]

    def ours(x, a, b):
        if modulation == "none":
            return vitkit.layer_norm_modulate(x, weight=a, bias=b, eps=EPS)
        return vitkit.layer_norm_modulate(x, shift=a, scale=b, eps=EPS)

    def inputs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [torch.randn(size, device=device).to(dtype) for size in (shape, small, small)], []

    elements = torch.Size(shape).numel()
    extra = 2 * elements if modulation == "token" else 0
    return elementwise.make_case(
        OP, name, "BNE",
        "x".join(map(str, shape)) + (f" per {modulation}" if modulation != "none" else ""),
        dtype, backward, inputs, lambda *given: [ours(*given)], lambda *given: [eager(*given)],
        elements=(2 * elements + extra, 3 * elements + 3 * extra // 2), flops=8.0 * elements,
        terms=elements // width if backward else width, target=target, sets=sets,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    found = []
    for name, shape, modulation, targets, sets in SHAPES:
        for backward in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                target = targets[2 if backward else int(dtype == torch.bfloat16)]
                case = make_case(name, shape, modulation, dtype, backward, device, target, sets)
                found.append(case)
    return found
