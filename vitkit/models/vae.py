"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022) in diffusers' parameter
layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitkit.models.registry import Entry, Family
from vitkit.models.unet_blocks import Downsample, MapAttention, ResnetBlock, Upsample
from vitkit.nn import Conv2d, GroupNormSiLU

EPS = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """
    Args:
        image_size: side of the images of ``example_inputs``.
        channels: per level.
        layers: ResNet blocks of a level of the encoder; the decoder has one more.
        latent_chans: channels of the latents.
        scaling_factor: what latents are multiplied by before diffusion.
    """

    image_size: int = 512
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent_chans: int = 4
    scaling_factor: float = 0.18215

    def reduced(self) -> VAEConfig:
        return replace(self, image_size=16, channels=(32, 64), layers=1)


class Level(torch.nn.Module):
    def __init__(self, widths: list[int], dim: int) -> None:
        super().__init__()
        self.resnets = torch.nn.ModuleList(ResnetBlock(w, dim, None, EPS) for w in widths)
        self.downsamplers: torch.nn.ModuleList | None = None
        self.upsamplers: torch.nn.ModuleList | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for samplers in (self.downsamplers, self.upsamplers):
            x = x if samplers is None else samplers[0](x)
        return x


class Middle(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = torch.nn.ModuleList([MapAttention(dim, EPS)])
        self.resnets = torch.nn.ModuleList(ResnetBlock(dim, dim, None, EPS) for _ in "ab")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(torch.nn.Module):
    def __init__(self, c: VAEConfig) -> None:
        super().__init__()
        dim = c.channels[0]
        self.conv_in = Conv2d(3, dim, 3, padding=1)
        self.down_blocks = torch.nn.ModuleList()
        for i, width in enumerate(c.channels):
            level = Level([dim] + [width] * (c.layers - 1), width)
            if i < len(c.channels) - 1:
                level.downsamplers = torch.nn.ModuleList([Downsample(width, symmetric=False)])
            self.down_blocks.append(level)
            dim = width
        self.mid_block = Middle(dim)
        self.conv_norm_out = GroupNormSiLU(32, dim, eps=EPS)
        self.conv_out = Conv2d(dim, 2 * c.latent_chans, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(torch.nn.Module):
    def __init__(self, c: VAEConfig) -> None:
        super().__init__()
        dim = c.channels[-1]
        self.conv_in = Conv2d(c.latent_chans, dim, 3, padding=1)
        self.up_blocks = torch.nn.ModuleList()
        for i, width in reversed(list(enumerate(c.channels))):
            level = Level([dim] + [width] * c.layers, width)
            if i > 0:
                level.upsamplers = torch.nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
            dim = width
        self.mid_block = Middle(c.channels[-1])
        self.conv_norm_out = GroupNormSiLU(32, dim, eps=EPS)
        self.conv_out = Conv2d(dim, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(torch.nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to their reconstruction from the mean of the posterior."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = Conv2d(2 * c.latent_chans, 2 * c.latent_chans, 1)
        self.post_quant_conv = Conv2d(c.latent_chans, c.latent_chans, 1)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the variance of the latents, [B, latent_chans, H / 8, W / 8]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] of latents that are not scaled."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(images)[0])

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random images of the configuration's size."""
        size = self.config.image_size
        return (torch.rand(batch, 3, size, size) * 2 - 1,)


FAMILY = Family(
    AutoencoderKL,
    {
        "kl_vae": Entry(VAEConfig(), "diffusers AutoencoderKL, Stable Diffusion 1 and 2"),
        "kl_vae_sdxl": Entry(
            VAEConfig(image_size=1024, scaling_factor=0.13025),
            "diffusers AutoencoderKL, stable-diffusion-xl-base-1.0",
        ),
    },
)
