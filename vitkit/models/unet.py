"""Diffusion U-Nets in diffusers' parameter layout: DDPM (Ho et al. 2020) and the text-conditioned
latent U-Nets of Stable Diffusion (Rombach et al. 2022) and SDXL (Podell et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vitkit.models.layers import timestep_embedding
from vitkit.models.registry import Entry, Family
from vitkit.models.unet_blocks import (
    Downsample,
    MapAttention,
    ResnetBlock,
    Transformer2d,
    Upsample,
)
from vitkit.nn import Conv2d, GroupNormSiLU, Linear


@dataclass(frozen=True)
class UNetConfig:
    """
    Args:
        sample_size: side of the images or latents of ``example_inputs``.
        in_chans, out_chans: of the images or latents.
        channels: per level.
        attention: transformer blocks per level, 0 for no attention; without a text, 1 is attention
            of the pixels.
        num_heads: per level.
        layers: ResNet blocks of a level on the way down; one more on the way up.
        context_dim: width of the text's tokens, None for no text.
        linear: projections of the transformers are Linear, not 1x1 convolutions.
        added_dim: width of pooled text and sizes beside the time (SDXL), None for none.
        eps: of the GroupNorms of ResNet blocks.
    """

    sample_size: int
    in_chans: int
    out_chans: int
    channels: tuple[int, ...]
    attention: tuple[int, ...]
    num_heads: tuple[int, ...]
    layers: int = 2
    context_dim: int | None = None
    linear: bool = False
    added_dim: int | None = None
    eps: float = 1e-5

    def reduced(self) -> UNetConfig:
        heads = tuple(min(h, 1 if self.context_dim is None else 2) for h in self.num_heads[:2])
        return replace(
            self,
            sample_size=8,
            channels=(32, 64),
            attention=(0, 1) if self.attention[0] == 0 else (1, 0),
            num_heads=heads,
            layers=1,
            context_dim=None if self.context_dim is None else 48,
            added_dim=None if self.added_dim is None else 6 * 256 + 32,
        )


class TimeEmbedding(torch.nn.Module):
    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.linear_1 = Linear(given, made)
        self.linear_2 = Linear(made, made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class Level(torch.nn.Module):
    """ResNet blocks, attention after each one, and what leads to the next level."""

    def __init__(self, c: UNetConfig, index: int, widths: list[int], time_dim: int) -> None:
        super().__init__()
        dim = c.channels[index]
        self.resnets = torch.nn.ModuleList(ResnetBlock(w, dim, time_dim, c.eps) for w in widths)
        self.attentions = None
        if c.attention[index]:
            self.attentions = torch.nn.ModuleList(_attention(c, index) for _ in widths)
        self.downsamplers: torch.nn.ModuleList | None = None
        self.upsamplers: torch.nn.ModuleList | None = None

    def step(
        self, i: int, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor | None
    ) -> torch.Tensor:
        """The i-th ResNet block and its attention."""
        x = self.resnets[i](x, time)
        return x if self.attentions is None else _attend(self.attentions[i], x, context)


class Middle(torch.nn.Module):
    def __init__(self, c: UNetConfig, time_dim: int) -> None:
        super().__init__()
        dim = c.channels[-1]
        self.resnets = torch.nn.ModuleList(ResnetBlock(dim, dim, time_dim, c.eps) for _ in "ab")
        self.attentions = torch.nn.ModuleList([_attention(c, len(c.channels) - 1)])

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor | None
    ) -> torch.Tensor:
        x = _attend(self.attentions[0], self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


def _attention(c: UNetConfig, index: int) -> torch.nn.Module:
    dim, heads = c.channels[index], c.num_heads[index]
    if c.context_dim is None:
        return MapAttention(dim, c.eps, heads)
    # The middle has as many blocks as the last level with attention would have.
    depth = max(c.attention[index], 1)
    return Transformer2d(dim, heads, depth, c.context_dim, c.linear)


def _attend(
    attention: torch.nn.Module, x: torch.Tensor, context: torch.Tensor | None
) -> torch.Tensor:
    return attention(x) if isinstance(attention, MapAttention) else attention(x, context)


class UNet(torch.nn.Module):
    """Images or latents [B, C, H, W] and times [B] (and a text's tokens [B, T, context_dim]; and
    for SDXL its pooled embedding and six sizes [B, 6]) to the predicted noise [B, C', H, W]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c = self.config = config
        time_dim, skips, dim = 4 * c.channels[0], [c.channels[0]], c.channels[0]
        last = len(c.channels) - 1
        self.conv_in = Conv2d(c.in_chans, dim, 3, padding=1)
        self.time_embedding = TimeEmbedding(dim, time_dim)
        if c.added_dim is not None:
            self.add_embedding = TimeEmbedding(c.added_dim, time_dim)
        self.down_blocks = torch.nn.ModuleList()
        for i, width in enumerate(c.channels):
            level = Level(c, i, [dim] + [width] * (c.layers - 1), time_dim)
            skips += [width] * c.layers
            if i < last:
                down = Downsample(width, symmetric=c.context_dim is not None)
                level.downsamplers = torch.nn.ModuleList([down])
                skips.append(width)
            self.down_blocks.append(level)
            dim = width
        self.mid_block = Middle(c, time_dim)
        self.up_blocks = torch.nn.ModuleList()
        for i, width in reversed(list(enumerate(c.channels))):
            widths = []
            for _ in range(c.layers + 1):
                widths.append(dim + skips.pop())
                dim = width
            level = Level(c, i, widths, time_dim)
            if i > 0:
                level.upsamplers = torch.nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = GroupNormSiLU(32, c.channels[0], eps=c.eps)
        self.conv_out = Conv2d(c.channels[0], c.out_chans, 3, padding=1)

    def embed_time(
        self,
        t: torch.Tensor,
        pooled_text: torch.Tensor | None,
        sizes: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, time_dim] after its SiLU, which every ResNet block would compute again."""
        c = self.config
        x = timestep_embedding(t, c.channels[0], shift=int(c.context_dim is None))
        x = self.time_embedding(x)
        if c.added_dim is not None:
            if pooled_text is None or sizes is None:
                raise ValueError("UNet: pooled_text and sizes must be given, got None")
            sizes = timestep_embedding(sizes.flatten(), 256).view(len(pooled_text), -1)
            x = x + self.add_embedding(torch.cat([pooled_text, sizes.to(pooled_text.dtype)], -1))
        return F.silu(x)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor | None = None,
        pooled_text: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        time = self.embed_time(t, pooled_text, sizes)
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            assert isinstance(level, Level)
            for i in range(len(level.resnets)):
                x = level.step(i, x, time, context)
                skips.append(x)
            if level.downsamplers is not None:
                x = level.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, time, context)
        for level in self.up_blocks:
            assert isinstance(level, Level)
            for i in range(len(level.resnets)):
                x = level.step(i, torch.cat([x, skips.pop()], 1), time, context)
            if level.upsamplers is not None:
                x = level.upsamplers[0](x, skips[-1].shape[-2:])
        return self.conv_out(self.conv_norm_out(x))

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random images or latents, times, and texts of 77 tokens."""
        c = self.config
        inputs = [
            torch.randn(batch, c.in_chans, c.sample_size, c.sample_size),
            torch.linspace(1, 999, batch),
        ]
        if c.context_dim is not None:
            inputs.append(torch.randn(batch, 77, c.context_dim))
        if c.added_dim is not None:
            size = 8.0 * c.sample_size
            inputs.append(torch.randn(batch, c.added_dim - 6 * 256))
            inputs.append(torch.tensor([size, size, 0, 0, size, size]).expand(batch, -1))
        return tuple(inputs)


SD = UNetConfig(
    sample_size=64,
    in_chans=4,
    out_chans=4,
    channels=(320, 640, 1280, 1280),
    attention=(1, 1, 1, 0),
    num_heads=(8, 8, 8, 8),
    context_dim=768,
)

FAMILY = Family(
    UNet,
    {
        "ddpm_cifar10": Entry(
            UNetConfig(32, 3, 3, (128, 256, 256, 256), (0, 1, 0, 0), (1, 1, 1, 1), eps=1e-6),
            "diffusers UNet2DModel, google/ddpm-cifar10-32",
        ),
        "ddpm_256": Entry(
            UNetConfig(
                256,
                3,
                3,
                (128, 128, 256, 256, 512, 512),
                (0, 0, 0, 0, 1, 0),
                (1, 1, 1, 1, 1, 1),
                eps=1e-6,
            ),
            "diffusers UNet2DModel, google/ddpm-celebahq-256",
        ),
        "sd15_unet": Entry(SD, "diffusers UNet2DConditionModel, stable-diffusion-v1-5"),
        "sd21_unet": Entry(
            replace(SD, sample_size=96, num_heads=(5, 10, 20, 20), context_dim=1024, linear=True),
            "diffusers UNet2DConditionModel, stable-diffusion-2-1",
        ),
        "sdxl_unet": Entry(
            replace(
                SD,
                sample_size=128,
                channels=(320, 640, 1280),
                attention=(0, 2, 10),
                num_heads=(5, 10, 20),
                context_dim=2048,
                linear=True,
                added_dim=2816,
            ),
            "diffusers UNet2DConditionModel, stable-diffusion-xl-base-1.0",
        ),
    },
)
