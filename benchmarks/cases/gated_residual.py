"""Shapes of gated_residual: the gated ends of DiT's branches, LayerScale of DINOv2."""

from __future__ import annotations

import torch

import vitkit

from ..harness import Case
from . import elementwise

OP = "gated_residual"

# (model, shape, shape of the gate, sets)
SHAPES: list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[str, ...]]] = [
    ("DiT-XL/2", (8, 256, 1152), (8, 1152), ("smoke", "fast forward", "full")),
    ("DINOv2 ViT-B/14 LayerScale", (8, 257, 768), (768,), ("full",)),
    ("Wan tokens", (2, 1024, 1536), (2, 1024, 1536), ("full",)),
]


def _eager(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x + (gate[:, None] if gate.dim() == 2 else gate) * y


def make_case(
    name: str,
    shape: tuple[int, ...],
    gate_shape: tuple[int, ...],
    dtype: torch.dtype,
    backward: bool,
    device: str,
    sets: tuple[str, ...] = ("full",),
) -> Case:
    """One case; tensors are made when it is measured."""

    def inputs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        sizes = (shape, shape, gate_shape)
        return [torch.randn(size, device=device).to(dtype) for size in sizes], []

    elements = torch.Size(shape).numel()
    gates = elements if gate_shape == shape else 0
    return elementwise.make_case(
        OP, name, "BNE", "x".join(map(str, shape)) + " gate " + "x".join(map(str, gate_shape)),
        dtype, backward, inputs, lambda *given: [vitkit.gated_residual(*given)],
        lambda *given: [_eager(*given)],
        elements=(3 * elements + gates, 3 * elements + 2 * gates), flops=2.0 * elements,
        terms=elements // torch.Size(gate_shape).numel() if backward else 2, sets=sets,
    )  # fmt: skip


def cases(device: str) -> list[Case]:
    return [
        make_case(name, shape, gate, dtype, backward, device, sets)
        for name, shape, gate, sets in SHAPES
        for backward in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ]
