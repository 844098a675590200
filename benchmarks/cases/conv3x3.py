"""Shapes of vitkit.nn.Conv2d, 3 x 3: convolutions of the DDPM and Stable Diffusion U-Nets and of
the KL-VAE. Forward only: the gradient of the input is another such convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vitkit.nn import Conv2d
from vitkit.nn.products import products_are_slow

from ..harness import Case, half_on_cpu, in_float32
from .elementwise import DTYPES, make_case

OP = "conv3x3"
# (model, samples, channels, pixels a side, columns, sets)
SHAPES = [
    ("DDPM 32px", 4, 128, 32, 128, ("smoke", "fast", "full")),
    ("DDPM 16px up", 4, 512, 16, 256, ("full",)),
    ("DDPM 4px", 4, 256, 4, 256, ("full",)),
    ("SD1.5 level 1", 2, 320, 32, 320, ("fast", "full")),
    ("SD1.5 level 3", 2, 1280, 8, 1280, ("full",)),
    ("SD1.5 level 4", 2, 1280, 4, 1280, ("full",)),
    ("KL-VAE 64px", 1, 512, 64, 512, ("full",)),
    ("KL-VAE 256px", 1, 256, 256, 256, ("full",)),
]


# Without instructions for bfloat16 torch convolves it at 0.9 GFLOP/s: larger ones take minutes.
MOST_HALF_FLOPS = 1e9


def cases(device: str, shapes: Sequence[tuple] = SHAPES) -> list[Case]:
    made = (
        _case(device, dtype, layout, *shape)
        for shape in shapes
        for dtype in DTYPES
        for layout in ("NCHW", "channels_last")
    )
    return [c for c in made if not products_are_slow(c.dtype, device) or c.flops <= MOST_HALF_FLOPS]


def _case(device, dtype, layout, name, samples, channels, size, columns, sets) -> Case:
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def inputs():
        x = torch.randn(samples, channels, size, size, device=device)
        weight = torch.randn(columns, channels, 3, 3, device=device) / (9 * channels) ** 0.5
        bias = torch.randn(columns, device=device)
        images = [t.to(dtype, memory_format=order) for t in (x, weight)]
        return [*images, bias.to(dtype)], []

    layer = Conv2d(16, 16, 3, padding=1).requires_grad_(False)

    def ours(x, weight, bias):
        layer.weight.data, layer.bias.data = weight, bias
        return [layer(x)]

    def eager(x, weight, bias):
        return [F.conv2d(x, weight, bias, padding=1)]

    rivals = {"eager in float32": in_float32(eager, dtype)} if half_on_cpu(dtype, device) else {}
    pixels = samples * size**2
    return make_case(
        OP, name, layout, f"{samples}x{channels}x{size}x{size}, {columns}", dtype, False,
        inputs, ours, eager, rivals=rivals,
        elements=(pixels * (channels + columns) + 9 * columns * channels, 0),
        # What minimal filtering multiplies, 4 / 9 of the sum as it is written.
        flops=8.0 * pixels * channels * columns, terms=9 * channels, sets=sets,
    )  # fmt: skip
