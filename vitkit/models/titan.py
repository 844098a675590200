"""TITAN's slide encoder (Ding et al. 2024) in the parameter layout of its weights: a transformer
over tiles whose scores fall with the tiles' distance (ALiBi in two dimensions).

The published code holds that bias for every pair of tiles and head. Here it is computed from the
tiles' coordinates where it is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from vitkit.models.conch import AttentionalPooler
from vitkit.models.layers import init_weights
from vitkit.models.registry import Entry, Family
from vitkit.nn import GELU, DistanceBias, LayerNorm, Linear, Mlp, attend


@dataclass(frozen=True)
class TITANConfig:
    """
    Args:
        tile_dim: width of the tiles' features (CONCH v1.5's).
        dim, depth, num_heads: of the transformer.
        pool_heads: of the attention pools.
        queries: tokens for a text decoder.
        example_tiles: number of tiles of ``example_inputs``.
    """

    tile_dim: int = 768
    dim: int = 768
    depth: int = 6
    num_heads: int = 12
    pool_heads: int = 8
    queries: int = 128
    example_tiles: int = 4000

    def reduced(self) -> TITANConfig:
        # Three heads, for their slopes are those of a number that is no power of two.
        dim = 3 * self.dim // self.num_heads
        return replace(
            self,
            tile_dim=40,
            dim=dim,
            depth=2,
            num_heads=3,
            pool_heads=2,
            queries=4,
            example_tiles=30,
        )


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8 i / n) for a power of two; otherwise those of the next smaller one, then every second
    of the next larger one (Press et al. 2022)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[::2][: num_heads - power]
    return slopes


class DistanceAttention(torch.nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, bias: DistanceBias) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(attend(self, q, k, v, bias).flatten(2))


class Block(torch.nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = DistanceAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: torch.Tensor, bias: DistanceBias) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class TITAN(torch.nn.Module):
    """Features [N, tile_dim] of one slide's tiles, their coordinates [N, 2] in pixels, and the
    pixels between neighbours, to the slide's embedding [1, E]."""

    log_slopes: torch.Tensor

    def __init__(self, config: TITANConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = torch.nn.Sequential(Linear(c.tile_dim, c.dim), GELU())
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, c.dim))
        blocks = torch.nn.ModuleList(Block(c.dim, c.num_heads) for _ in range(c.depth))
        self.blocks = torch.nn.ModuleDict({"modules_list": blocks})
        self.norm = LayerNorm(c.dim, eps=1e-6)
        self.attn_pool = AttentionalPooler(c.dim, c.dim, c.pool_heads, c.queries)
        self.attn_pool_contrastive = AttentionalPooler(c.dim, c.dim, c.pool_heads, 1)
        self.proj = torch.nn.Parameter(torch.randn(c.dim, c.dim) * c.dim**-0.5)
        # Their logarithms, which are halves, survive a conversion of the model to bfloat16.
        exponents = torch.tensor([math.log2(s) for s in alibi_slopes(c.num_heads)])
        self.register_buffer("log_slopes", exponents, persistent=False)
        init_weights(self)

    def cells(
        self, features: torch.Tensor, coords: torch.Tensor, tile_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [M, tile_dim] and places [M, 2] of the cells that have any; tiles that share
        one are added."""
        grid = torch.div(coords - coords.amin(0), tile_size, rounding_mode="floor").long()
        places, cell = torch.unique(grid, dim=0, return_inverse=True)
        summed = features.new_zeros(len(places), features.shape[1]).index_add(0, cell, features)
        there = (summed != 0).any(1)
        return summed[there], places[there]

    def forward_features(
        self, features: torch.Tensor, coords: torch.Tensor, tile_size: int | torch.Tensor
    ) -> torch.Tensor:
        """Tokens [1, 1 + M, E] after the last block."""
        if features.dim() != 2 or coords.shape != (len(features), 2):
            raise ValueError(
                "TITAN: features and coords must have shape [N, E] and [N, 2] of one slide, got"
                f" {tuple(features.shape)} and {tuple(coords.shape)}"
            )
        features, places = self.cells(features, coords, int(tile_size))
        x = torch.cat([self.cls_token, self.patch_embed(features[None])], 1)
        # The class token has no place: its distance to every tile is 0.
        nowhere = places.new_full((1, 2), math.nan, dtype=torch.float32)
        points = torch.cat([nowhere, places.float()])[None]
        bias = DistanceBias(self.log_slopes.float().exp2(), points, points)
        for block in self.blocks["modules_list"].children():
            x = block(x, bias)
        return self.norm(x)

    def forward(
        self, features: torch.Tensor, coords: torch.Tensor, tile_size: int | torch.Tensor
    ) -> torch.Tensor:
        x = self.forward_features(features, coords, tile_size)
        return self.attn_pool_contrastive(x)[:, 0] @ self.proj

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random tiles on every cell of a square of a slide whose coordinates do not start at 0."""
        if batch != 1:
            raise ValueError(f"TITAN: batch must be 1, one slide a call, got {batch}")
        n, side = self.config.example_tiles, math.ceil(self.config.example_tiles**0.5)
        coords = torch.stack([torch.arange(n) // side, torch.arange(n) % side], -1) * 1024 + 512
        return torch.randn(n, self.config.tile_dim), coords, torch.tensor(1024)


FAMILY = Family(
    TITAN, {"titan": Entry(TITANConfig(), "MahmoodLab/TITAN, the keys of `vision_encoder.`")}
)
