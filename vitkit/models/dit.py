"""Diffusion transformers: DiT (Peebles and Xie 2023) and SiT (Ma et al. 2024), in the parameter
layout of their repositories, which is one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vitkit.models.layers import init_weights, sincos_2d, timestep_embedding
from vitkit.models.registry import Entry, Family
from vitkit.nn import AdaLayerNorm, Attention, Linear, Mlp, PatchEmbed, gated_residual


@dataclass(frozen=True)
class DiTConfig:
    """
    Args:
        input_size: side of the latents.
        patch_size, dim, depth, num_heads: of the transformer.
        in_chans: channels of the latents.
        num_classes: classes; index ``num_classes`` is "no class", for classifier-free guidance.
        learn_sigma: the last layer has channels for a variance too.
        return_sigma: and the model returns them (DiT does, SiT does not).
    """

    input_size: int = 32
    patch_size: int = 2
    dim: int = 1152
    depth: int = 28
    num_heads: int = 16
    in_chans: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    return_sigma: bool = True

    def reduced(self) -> DiTConfig:
        dim = 2 * self.dim // self.num_heads
        return replace(
            self, input_size=4 * self.patch_size, dim=dim, depth=2, num_heads=2, num_classes=10
        )


class TimestepEmbedder(torch.nn.Module):
    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = torch.nn.Sequential(Linear(frequencies, dim), torch.nn.SiLU(), Linear(dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(timestep_embedding(t, self.frequencies).to(dtype))


class LabelEmbedder(torch.nn.Module):
    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = torch.nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)


def modulation(dim: int, parts: int) -> torch.nn.Sequential:
    """From the condition to shifts, scales and gates; zero at first, so that a block starts as the
    identity."""
    linear = Linear(dim, parts * dim)
    return torch.nn.Sequential(torch.nn.SiLU(), linear)


class Block(torch.nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = AdaLayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, approximate="tanh")
        self.adaLN_modulation = modulation(dim, 6)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, 1)
        x = gated_residual(self, x, self.attn(self.norm1(x, shift1, scale1)), gate1)
        return gated_residual(self, x, self.mlp(self.norm2(x, shift2, scale2)), gate2)


class FinalLayer(torch.nn.Module):
    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = AdaLayerNorm(dim)
        self.linear = Linear(dim, outputs)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, 1)
        return self.linear(self.norm_final(x, shift, scale))


def zero_start(model: torch.nn.Module) -> None:
    """adaLN-zero: modulations and the last layer start at zero."""
    for name, module in model.named_modules():
        if name.endswith(("adaLN_modulation.1", "final_layer.linear")):
            for p in module.parameters():
                torch.nn.init.zeros_(p)


class DiT(torch.nn.Module):
    """Latents [B, C, H, W], times [B] and labels [B] to the predicted noise (or velocity), with
    ``return_sigma`` [B, 2 C, H, W]."""

    pos_embed: torch.Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.out_chans = 2 * c.in_chans if c.learn_sigma else c.in_chans
        side = c.input_size // c.patch_size
        self.x_embedder = PatchEmbed(c.patch_size, c.in_chans, c.dim)
        self.t_embedder = TimestepEmbedder(c.dim)
        self.y_embedder = LabelEmbedder(c.num_classes, c.dim)
        self.register_buffer("pos_embed", sincos_2d(side, side, c.dim)[None])
        self.blocks = torch.nn.ModuleList(Block(c.dim, c.num_heads) for _ in range(c.depth))
        self.final_layer = FinalLayer(c.dim, c.patch_size**2 * self.out_chans)
        init_weights(self)
        zero_start(self)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        p, (height, width) = self.config.patch_size, x.shape[-2:]
        condition = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x, self.pos_embed[0])
        for block in self.blocks:
            x = block(x, condition)
        x = self.final_layer(x, condition)
        # [B, N, p p C] -> [B, C, H, W]
        x = x.unflatten(2, (p * p, self.out_chans)).permute(0, 3, 2, 1).flatten(1, 2)
        x = F.fold(x, (height, width), p, stride=p)
        return x if self.config.return_sigma else x[:, : self.config.in_chans]

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random latents, times and labels."""
        c = self.config
        latents = torch.randn(batch, c.in_chans, c.input_size, c.input_size)
        times = torch.linspace(0, 999, batch) if c.return_sigma else torch.linspace(0, 1, batch)
        return latents, times, torch.arange(batch) % c.num_classes


SIZES = {
    "s": DiTConfig(dim=384, depth=12, num_heads=6),
    "b": DiTConfig(dim=768, depth=12, num_heads=12),
    "l": DiTConfig(dim=1024, depth=24, num_heads=16),
    "xl": DiTConfig(),
}

FAMILY = Family(
    DiT,
    {
        f"{family}_{size}{patch}": Entry(
            replace(config, patch_size=patch, return_sigma=family == "dit"),
            f"{source}-{size.upper()}/{patch}",
        )
        for family, source in (("dit", "facebookresearch/DiT DiT"), ("sit", "willisma/SiT SiT"))
        for size, config in SIZES.items()
        for patch in (2, 4, 8)
    },
)
