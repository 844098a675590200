"""BEiT (Bao et al. 2022) in timm's parameter layout: a table of relative positions per layer, no
absolute ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vitkit.models.layers import ImageModel, init_weights, narrow_encoder, token_parameter
from vitkit.models.registry import Entry, Family
from vitkit.nn import LayerNorm, Linear, Mlp, PatchEmbed, attend, gated_residual
from vitkit.nn.products import linear


@dataclass(frozen=True)
class BEiTConfig:
    """
    Args:
        image_size, patch_size, dim, depth, num_heads, mlp_hidden, num_classes, eps: as in
            ``ViTConfig``.
        layer_scale: initial value.
    """

    image_size: int = 224
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_hidden: int = 3072
    layer_scale: float = 0.1
    num_classes: int = 1000
    eps: float = 1e-6

    def reduced(self) -> BEiTConfig:
        return narrow_encoder(self)


def relative_index(side: int) -> torch.Tensor:
    """[1 + N, 1 + N] rows of a bias table: offsets of the patches of a square grid, then three
    rows for class token to patch, patch to class token, and the class token itself."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x, span = y.flatten(), x.flatten(), 2 * side - 1
    offsets = (y[:, None] - y + side - 1) * span + x[:, None] - x + side - 1
    index = F.pad(offsets, (1, 0, 1, 0), value=span**2)
    index[1:, 0] = span**2 + 1
    index[0, 0] = span**2 + 2
    return index


class BiasedAttention(torch.nn.Module):
    """Attention with a learned bias per head and relative position; keys have no bias."""

    def __init__(self, dim: int, num_heads: int, grid: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = torch.nn.Parameter(torch.zeros(dim))
        self.v_bias = torch.nn.Parameter(torch.zeros(dim))
        self.relative_position_bias_table = token_parameter((2 * grid - 1) ** 2 + 3, num_heads)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = linear(self, x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        scores = self.relative_position_bias_table[index].permute(2, 0, 1)  # [H, N, N]
        return self.proj(attend(self, q, k, v, scores[None].to(q.dtype)).flatten(2))


class Block(torch.nn.Module):
    """timm's BEiT block."""

    def __init__(self, c: BEiTConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(c.dim, eps=c.eps)
        self.attn = BiasedAttention(c.dim, c.num_heads, c.image_size // c.patch_size)
        self.gamma_1 = torch.nn.Parameter(torch.full((c.dim,), c.layer_scale))
        self.norm2 = LayerNorm(c.dim, eps=c.eps)
        self.mlp = Mlp(c.dim, c.mlp_hidden)
        self.gamma_2 = torch.nn.Parameter(torch.full((c.dim,), c.layer_scale))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        x = gated_residual(self, x, self.attn(self.norm1(x), index), self.gamma_1)
        return gated_residual(self, x, self.mlp(self.norm2(x)), self.gamma_2)


class BEiT(ImageModel):
    """Images [B, 3, H, W] to logits [B, num_classes], or the mean of the patches [B, E]."""

    relative_position_index: torch.Tensor

    def __init__(self, config: BEiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = PatchEmbed(c.patch_size, embed_dim=c.dim)
        self.cls_token = token_parameter(1, 1, c.dim)
        index = relative_index(c.image_size // c.patch_size)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.blocks = torch.nn.ModuleList(Block(c) for _ in range(c.depth))
        self.fc_norm = LayerNorm(c.dim, eps=c.eps)
        self.head = Linear(c.dim, c.num_classes) if c.num_classes else torch.nn.Identity()
        init_weights(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images, prefix_tokens=self.cls_token[0])
        for block in self.blocks:
            x = block(x, self.relative_position_index)
        return self.head(self.fc_norm(x[:, 1:].mean(1)))


LARGE = BEiTConfig(dim=1024, depth=24, num_heads=16, mlp_hidden=4096, layer_scale=1e-5)

FAMILY = Family(
    BEiT,
    {
        "beit_b16": Entry(BEiTConfig(), "timm beit_base_patch16_224"),
        "beit_l16": Entry(LARGE, "timm beit_large_patch16_224"),
    },
)
