"""Shapes of gated_residual: the gated ends of DiT's branches, LayerScale of DINOv2."""

from __future__ import annotations

from collections.abc import Callable

import torch

import vitkit

from ..harness import Case, Outputs, Provider, compiled

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
    backend: str = "auto",
) -> Case:
    """One case; tensors are made when it is measured."""

    def make() -> tuple[list[Provider], Callable[[], Outputs]]:
        torch.manual_seed(0)
        x, y, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        gate = torch.randn(gate_shape, device=device).to(dtype)

        def bind(
            function: Callable[..., torch.Tensor], wide: bool = False
        ) -> Callable[[], Outputs]:
            given = [t.double() if wide else t for t in (x, y, gate)]
            if not backward:
                return lambda: [function(*given)]
            leaves = [t.detach().requires_grad_() for t in given]
            cotangent = grad.double() if wide else grad

            def call() -> Outputs:
                out = function(*leaves)
                return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]

            return call

        def ours(x, y, gate):
            return vitkit.gated_residual(x, y, gate, backend=backend)

        providers = [
            Provider("vitkit", bind(ours), ours=True),
            Provider("eager", bind(_eager)),
            *(Provider(n, bind(f)) for n, f in compiled(_eager).items()),
        ]
        return providers, bind(_eager, wide=True)

    elements = torch.Size(shape).numel()
    gates = elements if gate_shape == shape else 0
    moved = 3 * elements + gates + (3 * elements + 2 * gates if backward else 0)
    return Case(
        OP,
        name,
        "forward+backward" if backward else "forward",
        dtype,
        "BNE",
        "x".join(map(str, shape)) + " gate " + "x".join(map(str, gate_shape)),
        make,
        2.0 * elements * (3 if backward else 1),
        1.0 * moved * dtype.itemsize,
        elements // torch.Size(gate_shape).numel() if backward else 2,
        None,
        sets,
    )


def cases(device: str) -> list[Case]:
    return [
        make_case(name, shape, gate, dtype, backward, device, sets)
        for name, shape, gate, sets in SHAPES
        for backward in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ]
