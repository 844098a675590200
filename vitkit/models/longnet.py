"""The slide encoder of Prov-GigaPath (Xu et al. 2024): LongNet's dilated attention over tiles, in
the parameter layout of its repository.

Positions come from the tiles' coordinates directly. The published code holds the embedding of every
cell of a 1000 x 1000 grid, 3 GB; here are two tables of 1000 rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from vitkit.models.layers import init_weights, sincos_1d
from vitkit.models.registry import Entry, Family
from vitkit.nn import DilatedAttention, LayerNorm, Linear, project_gelu

DILATION_RATIOS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class LongNetConfig:
    """
    Args:
        tile_dim: width of the tiles' features.
        dim, depth, num_heads: of the encoder.
        grid: cells per side that positions tell apart.
        tile_size: pixels of a tile, what coordinates are divided by.
        max_slide_size: pixels of the largest slide, from which the segment lengths follow.
        min_segment: the shortest segment.
        pool: ``"token"`` for the class token, ``"mean"`` of the tiles.
        alignment: of segments, see ``vitkit.dilated_attention``; ``"torchscale"`` is the published
            code's, which differs on slides of more than 185,363 tiles.
        example_tiles: number of tiles of ``example_inputs``.
    """

    tile_dim: int = 1536
    dim: int = 768
    depth: int = 12
    num_heads: int = 16
    grid: int = 1000
    tile_size: int = 256
    max_slide_size: int = 262144
    min_segment: int = 1024
    pool: str = "token"
    alignment: str = "torchscale"
    example_tiles: int = 10_000

    def reduced(self) -> LongNetConfig:
        return replace(
            self,
            tile_dim=48,
            dim=4 * self.dim // self.num_heads,
            depth=2,
            num_heads=4,
            max_slide_size=4096,
            min_segment=16,
            example_tiles=70,
        )

    @property
    def segment_lengths(self) -> list[int]:
        """From the shortest segment to all tiles of the largest slide, in equal ratios."""
        first = math.log2(self.min_segment)
        last = int(math.log2((self.max_slide_size // self.tile_size) ** 2))
        steps = len(DILATION_RATIOS) - 1
        # Fifth decimals as numpy's linspace has them: 2^10 must not become 1023.
        return [int(2 ** (first + (last - first) / steps * i) + 1e-6) for i in range(steps + 1)]


class FeedForward(torch.nn.Module):
    """Two projections, a GELU in float32 and a LayerNorm before the second.

    Without gradients ``tokens`` at a time: what lies between the projections, four times as wide as
    its input, would otherwise be most of what a slide needs.
    """

    tokens = 2048

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)
        self.ffn_layernorm = LayerNorm(4 * dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.shape[1] <= self.tokens:
            return self._project(x)
        return torch.cat([self._project(part) for part in x.split(self.tokens, 1)], 1)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.ffn_layernorm(project_gelu(self, self.fc1, x)))


class Layer(torch.nn.Module):
    def __init__(self, c: LongNetConfig, eps: float = 1e-5) -> None:
        super().__init__()
        self.self_attn = DilatedAttention(
            c.dim,
            c.num_heads,
            segment_lengths=c.segment_lengths,
            dilation_ratios=DILATION_RATIOS,
            alignment=c.alignment,
            eps=eps,
        )
        self.self_attn_layer_norm = LayerNorm(c.dim, eps=eps)
        self.ffn = FeedForward(c.dim, eps)
        self.final_layer_norm = LayerNorm(c.dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x, self.self_attn_layer_norm)
        return x + self.ffn(self.final_layer_norm(x))


class Encoder(torch.nn.Module):
    def __init__(self, c: LongNetConfig) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(c) for _ in range(c.depth))
        self.layer_norm = LayerNorm(c.dim, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class TileEmbed(torch.nn.Module):
    def __init__(self, tile_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = Linear(tile_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class LongNetViT(torch.nn.Module):
    """Tile features [B, N, tile_dim] and coordinates [B, N, 2] in pixels to a slide's feature
    [B, E]. All slides of a batch must have N tiles."""

    positions: torch.Tensor

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.pool not in ("token", "mean"):
            raise ValueError(f"LongNetViT: pool must be 'token' or 'mean', got {c.pool!r}")
        self.patch_embed = TileEmbed(c.tile_dim, c.dim)
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, c.dim))
        self.encoder = Encoder(c)
        self.norm = LayerNorm(c.dim, eps=1e-6)
        # Of a row or a column: the same table for both.
        table = sincos_1d(torch.arange(c.grid), c.dim // 2)
        self.register_buffer("positions", table, persistent=False)
        init_weights(self)
        torch.nn.init.normal_(self.cls_token, std=0.02)

    def position_embedding(self, coords: torch.Tensor) -> torch.Tensor:
        """[B, N, E] of coordinates [B, N, 2] (x, y): its first half encodes y, its second x."""
        cells = torch.floor(coords / self.config.tile_size).long()
        # Cells outside the grid land where the published code's flat index puts them.
        flat = cells[..., 0] * self.config.grid + cells[..., 1]
        x, y = flat // self.config.grid, flat % self.config.grid
        return torch.cat([self.positions[y], self.positions[x]], -1)

    def forward(self, tiles: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(tiles)
        x = x + self.position_embedding(coords).to(x.dtype)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = self.encoder(x)
        return self.norm(x[:, 1:].mean(1)) if self.config.pool == "mean" else self.norm(x[:, 0])

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random tiles on a square of the slide."""
        n, side = self.config.example_tiles, math.ceil(self.config.example_tiles**0.5)
        cells = torch.stack([torch.arange(n) // side, torch.arange(n) % side], -1)
        coords = (cells * self.config.tile_size).float().expand(batch, -1, -1)
        return torch.randn(batch, n, self.config.tile_dim), coords


FAMILY = Family(
    LongNetViT,
    {
        "gigapath_slide": Entry(
            LongNetConfig(), "prov-gigapath/prov-gigapath gigapath_slide_enc12l768d"
        ),
        "gigapath_slide_24l1024d": Entry(
            LongNetConfig(dim=1024, depth=24), "prov-gigapath gigapath_slide_enc24l1024d"
        ),
        "gigapath_slide_12l1536d": Entry(
            LongNetConfig(dim=1536), "prov-gigapath gigapath_slide_enc12l1536d"
        ),
    },
)
