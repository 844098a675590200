"""Shapes of patch_embed: ViT from floats and bytes, Swin with LayerNorm, DiT latents, tubelets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import vitkit

from ..harness import Case, Outputs, Provider, compiled, half_on_cpu, in_float32

OP = "patch_embed"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Shape(NamedTuple):
    """targets: forward in fp32 and bf16."""

    name: str
    images: tuple[int, ...]
    weight: tuple[int, ...]
    prefixes: int
    norm: bool
    uint8: bool
    targets: tuple[float | None, float | None]
    sets: tuple[str, ...]


VIT = ((8, 3, 224, 224), (768, 3, 16, 16))
SHAPES = (
    Shape("ViT-B/16", *VIT, 1, False, False, (1.15, 2.0), ("smoke", "fast", "full")),
    Shape("ViT-B/16 from bytes", *VIT, 1, False, True, (1.5, 3.0), ("fast forward", "full")),
    Shape(
        "Swin-T", (8, 3, 224, 224), (96, 3, 4, 4), 0, True, False, (2.0, 2.0),
        ("fast forward", "full"),
    ),
    Shape("DiT-XL/2", (8, 4, 32, 32), (1152, 4, 2, 2), 0, False, False, (None, None), ("full",)),
    Shape(
        "VideoMAE-B", (2, 3, 16, 224, 224), (768, 3, 2, 16, 16), 0, False, False, (2.0, 2.0),
        ("full",),
    ),
)  # fmt: skip


def _eager(x, weight, bias, norm_weight, norm_bias, pos, prefix):
    """As the host models compute it; bytes as a loader's transform does."""
    if x.dtype == torch.uint8:
        mean, std = (
            torch.tensor(v, dtype=weight.dtype, device=x.device).view(1, -1, 1, 1)
            for v in (MEAN, STD)
        )
        x = (x.to(weight.dtype) / 255 - mean) / std
    convolution = F.conv2d if weight.dim() == 4 else F.conv3d
    y = convolution(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if norm_weight is not None:
        y = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias)
    if prefix is not None:
        y = torch.cat([prefix.expand(y.shape[0], -1, -1), y], 1)
    return y if pos is None else y + pos


def _channels_last(x, *rest):
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return _eager(x.contiguous(memory_format=layout), *rest)


def make_case(
    shape: Shape, dtype: torch.dtype, backward: bool, device: str, backend: str = "auto"
) -> Case:
    """One case; tensors are made when it is measured."""
    grid = [s // p for s, p in zip(shape.images[2:], shape.weight[2:], strict=True)]
    tokens, embed = math.prod(grid), shape.weight[0]
    depth = math.prod(shape.weight[1:])

    def make() -> tuple[list[Provider], Callable[[], Outputs]]:
        torch.manual_seed(0)
        randn = lambda *size: torch.randn(*size, device=device).to(dtype)  # noqa: E731
        images = randn(*shape.images)
        if shape.uint8:
            images = torch.randint(256, shape.images, dtype=torch.uint8, device=device)
        weight = (torch.randn(shape.weight, device=device) / math.sqrt(depth)).to(dtype)
        parameters = [
            weight,
            randn(embed),
            *((randn(embed), randn(embed)) if shape.norm else (None, None)),
            None if shape.norm else randn(shape.prefixes + tokens, embed),
            randn(shape.prefixes, embed) if shape.prefixes else None,
        ]
        grad = randn(shape.images[0], shape.prefixes + tokens, embed)

        def bind(
            function: Callable[..., torch.Tensor], double: bool = False
        ) -> Callable[[], Outputs]:
            widen = lambda t: t.double() if double and t is not None else t  # noqa: E731
            x = images if shape.uint8 else widen(images)
            given = [widen(p) for p in parameters]
            if not backward:
                return lambda: [function(x, *given)]
            leaves = [None if p is None else p.detach().requires_grad_() for p in given]
            wanted = [p for p in leaves if p is not None]

            def call() -> Outputs:
                y = function(x, *leaves)
                return [y.detach(), *torch.autograd.grad(y, wanted, widen(grad))]

            return call

        def ours(x, weight, bias, norm_weight, norm_bias, pos, prefix):
            return vitkit.patch_embed(
                x, weight, bias, mean=MEAN if shape.uint8 else None,
                std=STD if shape.uint8 else None, norm_weight=norm_weight, norm_bias=norm_bias,
                norm_eps=1e-5, pos_embed=pos, prefix_tokens=prefix, backend=backend,
            )  # fmt: skip

        providers = [
            Provider("vitkit", bind(ours), ours=True),
            Provider("eager", bind(_eager)),
            Provider("eager, channels_last", bind(_channels_last)),
            *(Provider(n, bind(f)) for n, f in compiled(_eager).items()),
        ]
        if half_on_cpu(dtype, device):
            wide = in_float32(_eager, dtype)
            providers += [
                Provider("eager in float32", bind(wide)),
                Provider("torch.compile in float32", bind(torch.compile(wide))),
            ]
        return providers, bind(_eager, double=True)

    out = shape.images[0] * (tokens + shape.prefixes) * embed
    pixels = math.prod(shape.images) * (1 if shape.uint8 else dtype.itemsize)
    products = 2 if backward else 1  # images have no gradient here
    return Case(
        OP,
        shape.name,
        "forward+backward" if backward else "forward",
        dtype,
        "uint8" if shape.uint8 else "NCHW",
        f"{'x'.join(map(str, shape.images))} patch {'x'.join(map(str, shape.weight[2:]))}",
        make,
        2.0 * shape.images[0] * tokens * depth * embed * products,
        products * (pixels + float(out + embed * depth) * dtype.itemsize),
        shape.images[0] * tokens if backward else depth,
        None if backward else shape.targets[int(dtype == torch.bfloat16)],
        shape.sets,
    )


def cases(device: str) -> list[Case]:
    return [
        make_case(shape, dtype, backward, device)
        for shape in SHAPES
        for backward in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    ]
