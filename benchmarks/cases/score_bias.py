"""flash_attention with a structured bias, against rivals that make a tensor of it on every call, as
its hosts do, and (a row of its own) against rivals that are given the finished tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import flex_attention

import vitkit

from ..harness import Case, Outputs, Provider, compiled, half_on_cpu, in_float32
from .flash_attention import OP, eager, sdpa


class Shape(NamedTuple):
    name: str
    batch: int
    grid: tuple[int, int]
    heads: int
    head_dim: int
    kind: str  # decomposed or distance
    targets: tuple[float | None, ...]  # of fp32 and bf16 forward and forward+backward
    given: bool = False  # rivals get the finished tensor
    sets: tuple[str, ...] = ("full",)


NONE = (None,) * 4
SHAPES = [
    Shape("SAM-B global", 1, (64, 64), 12, 64, "decomposed", (1.5, 1.5, None, None)),
    Shape("SAM-B global, bias given", 1, (64, 64), 12, 64, "decomposed", NONE, given=True),
    Shape("SAM-B windows", 25, (14, 14), 12, 64, "decomposed", NONE),
    Shape("TITAN 2048 tiles", 1, (64, 32), 12, 64, "distance", (1.5, 1.5, None, None)),
    Shape("TITAN 2048 tiles, bias given", 1, (64, 32), 12, 64, "distance", NONE, given=True),
]  # fmt: skip

Bias = vitkit.DecomposedBias | vitkit.DistanceBias


def _materialise(bias: Bias) -> torch.Tensor:
    """The quickest way in plain PyTorch to the tensor that ``bias`` stands for."""
    if isinstance(bias, vitkit.DecomposedBias):
        return bias.dense()
    distance = torch.cdist(bias.coords_q.to(bias.slopes.dtype), bias.coords_k.to(bias.slopes.dtype))
    return -bias.slopes[:, None, None] * distance[:, None]


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Bias) -> torch.Tensor:
    """FlexAttention with the bias computed in its kernel."""
    if isinstance(bias, vitkit.DecomposedBias):
        rel_h, rel_w = bias.rel_h, bias.rel_w
        width = rel_w.shape[3]

        def score(s, b, h, i, j):
            return s + rel_h[b, h, i, j // width] + rel_w[b, h, i, j % width]
    else:
        slopes, at_q, at_k = bias.slopes, bias.coords_q[0], bias.coords_k[0]

        def score(s, b, h, i, j):
            dx, dy = at_q[i, 0] - at_k[j, 0], at_q[i, 1] - at_k[j, 1]
            return s - slopes[h] * (dx * dx + dy * dy).sqrt()

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flex_attention(q, k, v, score_mod=score).transpose(1, 2)


def _parts(shape: Shape, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], Any]:
    """(the differentiable tensors of the bias, the bias as a function of them)."""
    height, width = shape.grid
    if shape.kind == "decomposed":
        rows = (shape.batch, shape.heads, height * width)
        rel = [torch.randn(*rows, n, device=device).to(dtype) for n in shape.grid]
        return rel, vitkit.DecomposedBias
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape.grid]
    places = torch.cartesian_prod(*axes)[None]
    # ALiBi's slopes for 12 heads: those for 8, and every second one of those for 16.
    powers = [-i for i in range(1, 9)] + [-(i + 0.5) for i in range(shape.heads - 8)]
    slopes = 2.0 ** torch.tensor(powers, device=device)
    return [slopes.to(dtype)], lambda slopes: vitkit.DistanceBias(slopes, places, places)


def _rivals(shape: Shape, bias_of: Any) -> dict[str, Callable[..., torch.Tensor]]:
    def with_tensor(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda q, k, v, *parts: attention(
            q, k, v, parts[0] if shape.given else _materialise(bias_of(*parts)).to(q.dtype)
        )

    rivals = {
        "eager": with_tensor(eager),
        **compiled(with_tensor(eager)),
        "sdpa": with_tensor(sdpa),
    }
    if not shape.given:
        rivals["FlexAttention"] = torch.compile(
            lambda q, k, v, *parts: _flex(q, k, v, bias_of(*parts))
        )
    return rivals


def make_case(shape: Shape, dtype: torch.dtype, backward: bool, device: str) -> Case:
    b, (height, width), h, d = shape.batch, shape.grid, shape.heads, shape.head_dim
    n = height * width

    def make() -> tuple[list[Provider], Callable[[], Outputs]]:
        torch.manual_seed(0)
        qkv = torch.randn(b, n, 3, h, d, device=device).to(dtype).unbind(2)
        grad = torch.randn(b, n, h, d, device=device).to(dtype)
        parts, bias_of = _parts(shape, dtype, device)
        tensor = [_materialise(bias_of(*parts)).to(dtype)] if shape.given else parts

        def bind(
            function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], double: bool = False
        ) -> Callable[[], Outputs]:
            given = [t.double() if double else t for t in (*qkv, *tensors)]
            if not backward:
                return lambda: [function(*given)]
            leaves = [t.detach().requires_grad_() for t in given]
            cotangent = grad.double() if double else grad

            def call() -> Outputs:
                out = function(*leaves)
                return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]

            return call

        def ours(q, k, v, *parts):
            return vitkit.flash_attention(q, k, v, bias=bias_of(*parts))

        def exact(q, k, v, *parts):
            return eager(q, k, v, bias_of(*parts).dense(q.dtype))

        providers = [Provider("vitkit", bind(ours, parts), ours=True)]
        rivals = _rivals(shape, bias_of)
        if half_on_cpu(dtype, device):
            rivals["sdpa in float32"] = in_float32(rivals["sdpa"], dtype)
        providers += [Provider(name, bind(f, tensor)) for name, f in rivals.items()]
        return providers, bind(exact, parts, double=True)

    element = dtype.itemsize
    compact = b * h * n * (height + width) * element if shape.kind == "decomposed" else n * 2 * 4
    return Case(
        OP,
        shape.name,
        "forward+backward" if backward else "forward",
        dtype,
        "BNHD",
        f"{b}x{n}x{h}x{d} {shape.kind} {height}x{width}",
        make,
        4.0 * b * h * n * n * d * (3.5 if backward else 1),
        (4.0 * b * h * n * d * element + compact) * (2.5 if backward else 1),
        n * d * (b if backward else 1),
        shape.targets[2 * backward + (dtype == torch.bfloat16)],
        ("full",) if backward else shape.sets,
    )


def cases(device: str) -> list[Case]:
    return [
        make_case(shape, dtype, backward, device)
        for shape in SHAPES
        # With the tensor given, rivals have the gradient of another tensor.
        for backward in ((False,) if shape.given else (False, True))
        for dtype in (torch.float32, torch.bfloat16)
    ]
