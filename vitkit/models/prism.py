"""PRISM's slide aggregator (Shaikovski et al. 2024), a Perceiver over the tiles of a slide whose
blocks share weights, in the parameter layout of its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitkit.models.layers import init_weights
from vitkit.models.registry import Entry, Family
from vitkit.nn import LayerNorm, Linear, MultiheadAttention, attend, geglu

EPS = 1e-5


@dataclass(frozen=True)
class PRISMConfig:
    """
    Args:
        tile_dim: width of the tiles' features (Virchow's).
        dim: width of the latents.
        latents: number of latents beside the one that becomes the slide's embedding.
        blocks: attentions to the tiles; from the second on they share weights.
        layers: self-attentions after each one; all blocks share them.
        num_heads: of self-attention; attention to the tiles has one.
        example_tiles: number of tiles of ``example_inputs``.
    """

    tile_dim: int = 2560
    dim: int = 1280
    latents: int = 512
    blocks: int = 8
    layers: int = 6
    num_heads: int = 8
    example_tiles: int = 1000

    def reduced(self) -> PRISMConfig:
        dim = 2 * self.dim // self.num_heads
        return replace(
            self,
            tile_dim=40,
            dim=dim,
            latents=5,
            blocks=3,
            layers=2,
            num_heads=2,
            example_tiles=30,
        )


class TileAttention(torch.nn.Module):
    """Latents attend to the tiles with one head. Keys and values of the tiles, which have no norm
    before them, are the same for all blocks that share weights."""

    def __init__(self, c: PRISMConfig) -> None:
        super().__init__()
        self.x_norm = LayerNorm(c.dim, eps=EPS)
        self.to_q = Linear(c.dim, c.dim, bias=False)
        self.to_kv = Linear(c.tile_dim, 2 * c.dim, bias=False)
        self.to_out = Linear(c.dim, c.dim, bias=False)

    def forward(self, x: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        k, v = kv.unflatten(-1, (2, 1, -1)).unbind(2)
        q = self.to_q(self.x_norm(x))[:, :, None]
        return self.to_out(attend(self, q, k, v, mask).flatten(2))


class NormedAttention(torch.nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=EPS)
        self.mha = MultiheadAttention(dim, num_heads, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mha(self.norm(x))


class _Geglu(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return geglu(self, x)


class GatedFeedForward(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=EPS)
        wide = Linear(dim, 2 * dim)
        self.net = torch.nn.Sequential(wide, _Geglu(), Linear(dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.norm(x))


class _SharedPerceiver(torch.nn.Module):
    def __init__(self, c: PRISMConfig) -> None:
        super().__init__()
        self.latents = torch.nn.Parameter(torch.randn(1 + c.latents, c.dim))

        def cross() -> torch.nn.ModuleDict:
            return torch.nn.ModuleDict({"xattn": TileAttention(c), "ff": GatedFeedForward(c.dim)})

        first, rest = cross(), cross()
        shared = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {"mhsa": NormedAttention(c.dim, c.num_heads), "ff": GatedFeedForward(c.dim)}
            )
            for _ in range(c.layers)
        )
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"xattn": rest if i else first, "tf": shared})
            for i in range(c.blocks)
        )

    def forward(self, tiles: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.latents.expand(len(tiles), -1, -1)
        kv = None
        for i, layer in enumerate(self.layers):
            cross, transformer = layer["xattn"], layer["tf"]  # type: ignore[index]
            if i < 2:
                kv = cross["xattn"].to_kv(tiles)
            x = x + cross["xattn"](x, kv, mask)
            x = x + cross["ff"](x)
            for block in transformer:
                x = x + block["mhsa"](x)
                x = x + block["ff"](x)
        return x


class PRISM(torch.nn.Module):
    """Tile features [B, N, tile_dim], and a mask [B, N] that is True where there is a tile, to the
    slide's embedding [B, E]."""

    def __init__(self, config: PRISMConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_norm = LayerNorm(config.dim, eps=EPS)
        self.img_norm = LayerNorm(config.dim, eps=EPS)
        self.perceiver = _SharedPerceiver(config)
        init_weights(self)

    def encode(
        self, tiles: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedding [B, E], and the latents [B, latents, E] for a text decoder."""
        keys = None if mask is None else mask.bool()[:, None, None]
        x = self.perceiver(tiles, keys)
        return self.cls_norm(x[:, 0]), self.img_norm(x[:, 1:])

    def forward(self, tiles: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.encode(tiles, mask)[0]

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random tiles; every slide after the first lacks one more."""
        n = self.config.example_tiles
        mask = torch.arange(n) < n - torch.arange(batch)[:, None]
        return torch.randn(batch, n, self.config.tile_dim), mask


FAMILY = Family(
    PRISM, {"prism": Entry(PRISMConfig(), "paige-ai/Prism, the keys of `image_resampler.`")}
)
