"""The hierarchical image pyramid transformer HIPT (Chen et al. 2022), and iSTAR's use of it (Zhang
et al. 2024): a ViT over 16-pixel patches of 256-pixel tiles, a second ViT over the tiles of a
region of 4096 pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitkit.models import vit
from vitkit.models.layers import Block, init_weights, resample_positions, token_parameter
from vitkit.models.registry import Entry, Family
from vitkit.models.vit import VisionTransformer, ViTConfig
from vitkit.nn import GELU, LayerNorm, Linear


@dataclass(frozen=True)
class HIPTConfig:
    """
    Args:
        tile: the first ViT.
        tile_size: pixels of a tile, which may differ from those of the ViT's positions.
        grid: tiles per side of a region.
        dim, depth, num_heads: of the second ViT.
        position_grid: cells per side of its learned positions.
        maps: return features of patches and tiles too, as iSTAR does.
    """

    tile: ViTConfig
    tile_size: int = 256
    grid: int = 16
    dim: int = 192
    depth: int = 6
    num_heads: int = 6
    position_grid: int = 14
    maps: bool = False

    def reduced(self) -> HIPTConfig:
        return replace(
            self,
            tile=self.tile.reduced(),
            tile_size=4 * self.tile.patch_size,
            grid=3,
            dim=2 * self.dim // self.num_heads,
            depth=2,
            num_heads=2,
            position_grid=2,
        )


class RegionTransformer(torch.nn.Module):
    """ViT-4K: features of tiles on a grid [B, E, h, w] to tokens [B, 1 + h w, dim]."""

    def __init__(self, given: int, c: HIPTConfig) -> None:
        super().__init__()
        self.phi = torch.nn.Sequential(Linear(given, c.dim), GELU())
        self.cls_token = token_parameter(1, 1, c.dim)
        self.pos_embed = token_parameter(1, c.position_grid**2 + 1, c.dim)
        self.blocks = torch.nn.ModuleList(
            Block(c.dim, c.num_heads, 4 * c.dim) for _ in range(c.depth)
        )
        self.norm = LayerNorm(c.dim, eps=1e-6)
        init_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = (x.shape[-2], x.shape[-1])
        x = self.phi(x.flatten(2).transpose(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + resample_positions(self.pos_embed[0], 1, grid, "dino")
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class HIPT(torch.nn.Module):
    """A region [B, 3, H, W], sides multiples of ``tile_size``, to its feature [B, dim]. With
    ``maps`` also the tiles' [B, dim, h, w] and, of the first ViT, the patches'
    [B, E, H / 16, W / 16]."""

    def __init__(self, config: HIPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model256 = VisionTransformer(config.tile)
        self.model4k = RegionTransformer(config.tile.dim, config)

    def forward(
        self, images: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        size, (b, _, height, width) = self.config.tile_size, images.shape
        if height % size or width % size:
            raise ValueError(
                f"HIPT: images must have sides that are multiples of {size}, got {height}, {width}"
            )
        h, w = height // size, width // size
        tiles = images.unflatten(3, (w, size)).unflatten(2, (h, size))  # [B, 3, h, s, w, s]
        tokens = self.model256.forward_features(tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))
        grid = tokens[:, 0].unflatten(0, (b, h, w)).permute(0, 3, 1, 2)
        region = self.model4k(grid)
        if not self.config.maps:
            return region[:, 0]
        coarse = region[:, 1:].transpose(1, 2).unflatten(2, (h, w))
        n = size // self.config.tile.patch_size
        fine = tokens[:, 1:].unflatten(1, (n, n)).unflatten(0, (b, h, w))  # [B, h, w, n, n, E]
        fine = fine.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return region[:, 0], coarse, fine

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random regions of the configuration's size."""
        side = self.config.grid * self.config.tile_size
        return (torch.randn(batch, 3, side, side),)


TILE = replace(vit.S, resample="dino")

FAMILY = Family(
    HIPT,
    {
        "hipt": Entry(HIPTConfig(TILE), "mahmoodlab/HIPT HIPT_4K, model256 and model4k"),
        "istar": Entry(HIPTConfig(TILE, maps=True), "daviddaiweizhang/istar, the weights of HIPT"),
    },
)
