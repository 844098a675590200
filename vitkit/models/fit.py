"""FiT (Lu et al. 2024), a diffusion transformer for images of any size and shape, in the parameter
layout of its repository: rotary positions, a gated MLP, and sequences padded to one length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitkit.models.dit import (
    FinalLayer,
    LabelEmbedder,
    TimestepEmbedder,
    modulation,
    zero_start,
)
from vitkit.models.layers import init_weights
from vitkit.models.registry import Entry, Family
from vitkit.nn import AdaLayerNorm, Linear, SwiGLU, attend, gated_residual, rotate


@dataclass(frozen=True)
class FiTConfig:
    """
    Args:
        patch_size, dim, depth, num_heads, in_chans, num_classes, learn_sigma: as in ``DiTConfig``.
        context_size: number of tokens of ``example_inputs``.
        theta: base of the rotary frequencies.
    """

    patch_size: int = 2
    dim: int = 1152
    depth: int = 28
    num_heads: int = 16
    in_chans: int = 4
    num_classes: int = 1000
    learn_sigma: bool = True
    context_size: int = 256
    theta: float = 10000.0

    def reduced(self) -> FiTConfig:
        dim = 2 * self.dim // self.num_heads
        return replace(self, dim=dim, depth=2, num_heads=2, num_classes=10, context_size=20)


class RotaryAttention(torch.nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = rotate(self, q, k, cos, sin, "interleaved")
        # Tokens of one image, or of the padding, attend to each other: no row is without keys.
        pairs = (mask[:, :, None] == mask[:, None])[:, None]
        out = attend(self, q, k, v, pairs).flatten(2)
        return self.proj(out * (mask != 0)[..., None])


class Block(torch.nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(dim)
        self.norm2 = AdaLayerNorm(dim)
        self.attn = RotaryAttention(dim, num_heads)
        self.mlp = SwiGLU(dim, 4 * dim)
        self.adaLN_modulation = modulation(dim, 6)

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, 1)
        y = self.attn(self.norm1(x, shift1, scale1), mask, cos, sin)
        x = gated_residual(self, x, y, gate1)
        return gated_residual(self, x, self.mlp(self.norm2(x, shift2, scale2)), gate2)


class PatchEmbedder(torch.nn.Module):
    """Patches come as rows already."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.proj = Linear(inputs, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class FiT(torch.nn.Module):
    """Patches [B, p p C, N], times [B], labels [B], their places [B, 2, N] (x, y) and a mask [B, N]
    (0 is padding, other numbers tell packed images apart) to patches [B, p p C', N]."""

    def __init__(self, config: FiTConfig) -> None:
        super().__init__()
        c = self.config = config
        patch = c.patch_size**2 * c.in_chans
        self.x_embedder = PatchEmbedder(patch, c.dim)
        self.t_embedder = TimestepEmbedder(c.dim)
        self.y_embedder = LabelEmbedder(c.num_classes, c.dim)
        self.blocks = torch.nn.ModuleList(Block(c.dim, c.num_heads) for _ in range(c.depth))
        self.final_layer = FinalLayer(c.dim, 2 * patch if c.learn_sigma else patch)
        init_weights(self)
        zero_start(self)

    def tables(self, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [B, N, 1, D / 2] float32: a half of a head turns with the row, the other with
        the column."""
        width = self.config.dim // self.config.num_heads // 2
        steps = torch.arange(0, width, 2, device=grid.device).float()
        freqs = self.config.theta ** -(steps / width)
        angles = torch.cat([grid[:, axis, :, None] * freqs for axis in (1, 0)], -1)[:, :, None]
        return angles.cos(), angles.sin()

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        grid: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        x = self.x_embedder(x.transpose(1, 2))
        condition = self.t_embedder(t) + self.y_embedder(y)
        cos, sin = self.tables(grid)
        for block in self.blocks:
            x = block(x, condition, mask, cos, sin)
        x = self.final_layer(x, condition) * (mask != 0)[..., None]
        return x.transpose(1, 2)

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random patches of an image four patches high, with padding after its last row."""
        c, n = self.config, self.config.context_size
        patches = torch.randn(batch, c.patch_size**2 * c.in_chans, n)
        width = n // 4 - 1
        place = torch.arange(n)
        mask = (place < 4 * width).long().expand(batch, -1)
        grid = torch.stack([place % width, place // width]).expand(batch, -1, -1)
        times = torch.linspace(0, 999, batch)
        return patches, times, torch.arange(batch) % c.num_classes, grid, mask


FAMILY = Family(
    FiT,
    {
        "fit_b2": Entry(
            FiTConfig(dim=768, depth=12, num_heads=12), "whlzy/FiT FiT-B/2 of the paper"
        ),
        "fit_xl2": Entry(FiTConfig(), "whlzy/FiT FiT-XL/2"),
    },
)
