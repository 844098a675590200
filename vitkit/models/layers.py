"""What several families share: the pre-norm transformer block, fixed positions, initial weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from vitkit.nn import Attention, LayerNorm, LayerScale, Mlp, SwiGLUPacked

Config = TypeVar("Config")


class ImageModel(torch.nn.Module):
    """A model of images of ``config.image_size``."""

    config: Any

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random images of the configuration's size."""
        size = self.config.image_size
        return (torch.randn(batch, 3, size, size),)


class Add(torch.nn.Module):
    """``x + y``: where a LayerScale may be and is not."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def residual(dim: int, layer_scale: float | None) -> torch.nn.Module:
    """The end of a residual branch."""
    return Add() if layer_scale is None else LayerScale(dim, layer_scale)


def make_mlp(kind: str, dim: int, hidden: int) -> torch.nn.Module:
    """``"gelu"``, ``"gelu_tanh"`` or ``"swiglu"``; hidden is the width after the first
    projection."""
    if kind == "swiglu":
        return SwiGLUPacked(dim, hidden)
    if kind not in ("gelu", "gelu_tanh"):
        raise ValueError(f"models: mlp must be 'gelu', 'gelu_tanh' or 'swiglu', got {kind!r}")
    return Mlp(dim, hidden, approximate="tanh" if kind == "gelu_tanh" else "none")


class Block(torch.nn.Module):
    """Attention and MLP, each after a LayerNorm: the parameters of timm's ViT block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        *,
        mlp: str = "gelu",
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.ls1 = residual(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = make_mlp(mlp, dim, mlp_hidden)
        self.ls2 = residual(dim, layer_scale)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.ls1(x, self.attn(self.norm1(x), attn_mask))
        return self.ls2(x, self.mlp(self.norm2(x)))


def init_weights(model: torch.nn.Module, std: float = 0.02) -> None:
    """Truncated normal weights and zero biases for every Linear and embedding table."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.zeros_(module.bias)


def token_parameter(*shape: int) -> torch.nn.Parameter:
    """Learned tokens or positions."""
    return torch.nn.Parameter(torch.nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def resample_positions(
    positions: torch.Tensor,  # [P + old, E] of a square grid
    prefix: int,
    grid: tuple[int, int],
    method: str,
) -> torch.Tensor:
    """Learned positions of a grid of another size, bicubic: ``"antialias"`` as timm, ``"dino"`` as
    DINO and HIPT, whose scale is a tenth of a cell too large."""
    side = math.isqrt(len(positions) - prefix)
    if (side, side) == grid:
        return positions
    old = positions[prefix:].unflatten(0, (side, side)).permute(2, 0, 1)[None].float()
    if method == "dino":
        scale = tuple((n + 0.1) / side for n in grid)
        new = F.interpolate(old, scale_factor=scale, mode="bicubic")
    else:
        new = F.interpolate(old, size=grid, mode="bicubic", antialias=True)
    new = new[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)
    return torch.cat([positions[:prefix], new])


def sincos_1d(places: torch.Tensor, dim: int) -> torch.Tensor:
    """[..., dim] float32 for places [...]: sines, then cosines, of 10000^(-k / (dim / 2)) places,
    computed in float64."""
    steps = torch.arange(dim // 2, dtype=torch.float64, device=places.device)
    angles = places.double()[..., None] * 10000 ** (-steps / (dim / 2))
    return torch.cat([angles.sin(), angles.cos()], -1).float()


def sincos_2d(height: int, width: int, dim: int) -> torch.Tensor:
    """[height * width, dim] row by row: the first half encodes the column, the second the row, as
    MAE and DiT have it."""
    columns = sincos_1d(torch.arange(width), dim // 2).expand(height, -1, -1)
    rows = sincos_1d(torch.arange(height), dim // 2)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)


def timestep_embedding(
    t: torch.Tensor,  # [B]
    dim: int,
    *,
    shift: int = 0,
) -> torch.Tensor:
    """[B, dim] float32: cosines, then sines, of t * 10000^(-k / (dim / 2 - shift)); the shift is 1
    in the DDPM of Ho et al., sines come first there."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * steps / (half - shift))
    angles = t[:, None].float() * frequencies
    parts = (angles.sin(), angles.cos()) if shift else (angles.cos(), angles.sin())
    return torch.cat(parts, -1)


def narrow(hidden: int, dim: int, new_dim: int) -> int:
    """The width of an MLP of a model made narrower: the same ratio, a multiple of 16."""
    return max(16, hidden * new_dim // dim // 16 * 16)


def narrow_encoder(config: Config) -> Config:
    """``config`` of a transformer with two layers of two heads on nine patches: its heads, patches
    and the ratio of its MLP stay."""
    c: Any = config
    dim = 2 * c.dim // c.num_heads
    hidden = narrow(c.mlp_hidden, c.dim, dim)
    return replace(c, image_size=3 * c.patch_size, dim=dim, depth=2, num_heads=2, mlp_hidden=hidden)
