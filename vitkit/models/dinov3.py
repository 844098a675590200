"""DINOv3 (Simeoni et al. 2025) in timm's parameter layout: rotary positions, no learned ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitkit.models.layers import ImageModel, init_weights, make_mlp, narrow_encoder, token_parameter
from vitkit.models.registry import Entry, Family
from vitkit.nn import (
    LayerNorm,
    Linear,
    PatchEmbed,
    RotaryEmbedding2d,
    SwiGLU,
    attend,
    gated_residual,
    rotate,
)


@dataclass(frozen=True)
class DINOv3Config:
    """
    Args:
        image_size: side of the images of ``example_inputs``; any multiple of the patch works.
        patch_size, dim, depth, num_heads: as in ``ViTConfig``.
        mlp: ``"gelu"`` or ``"swiglu"`` (two projections).
        mlp_hidden: width between the MLP's projections.
        layer_scale: initial value.
        registers: number of register tokens, after the class token.
        theta: base of the rotary frequencies.
        eps: of the LayerNorms.
    """

    image_size: int = 256
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp: str = "gelu"
    mlp_hidden: int = 3072
    layer_scale: float = 1e-5
    registers: int = 4
    theta: float = 100.0
    eps: float = 1e-5

    def reduced(self) -> DINOv3Config:
        return narrow_encoder(self)


class RotaryAttention(torch.nn.Module):
    """Attention whose queries and keys of patches are rotated."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = rotate(self, q, k, cos, sin, "half")
        return self.proj(attend(self, q, k, v).flatten(2))


class Block(torch.nn.Module):
    """timm's EvaBlock as DINOv3 configures it."""

    def __init__(self, c: DINOv3Config) -> None:
        super().__init__()
        self.norm1 = LayerNorm(c.dim, eps=c.eps)
        self.attn = RotaryAttention(c.dim, c.num_heads)
        self.gamma_1 = torch.nn.Parameter(torch.full((c.dim,), c.layer_scale))
        self.norm2 = LayerNorm(c.dim, eps=c.eps)
        gated = c.mlp == "swiglu"
        self.mlp = SwiGLU(c.dim, c.mlp_hidden) if gated else make_mlp(c.mlp, c.dim, c.mlp_hidden)
        self.gamma_2 = torch.nn.Parameter(torch.full((c.dim,), c.layer_scale))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = gated_residual(self, x, self.attn(self.norm1(x), cos, sin), self.gamma_1)
        return gated_residual(self, x, self.mlp(self.norm2(x)), self.gamma_2)


class DINOv3(ImageModel):
    """Images [B, 3, H, W] to the class token [B, E]."""

    def __init__(self, config: DINOv3Config) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = PatchEmbed(c.patch_size, embed_dim=c.dim)
        self.cls_token = token_parameter(1, 1, c.dim)
        self.reg_token = token_parameter(1, c.registers, c.dim)
        self.rope = RotaryEmbedding2d(c.dim // c.num_heads, theta=c.theta)
        self.blocks = torch.nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = LayerNorm(c.dim, eps=c.eps)
        init_weights(self)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [B, 1 + registers + N, E] after the last block."""
        size = self.config.patch_size
        prefix = torch.cat([self.cls_token[0], self.reg_token[0]])
        x = self.patch_embed(images, prefix_tokens=prefix)
        cos, sin = self.rope.tables(images.shape[-2] // size, images.shape[-1] // size)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_features(images)[:, 0]


S = DINOv3Config(dim=384, num_heads=6, mlp_hidden=1536)
L = DINOv3Config(dim=1024, depth=24, num_heads=16, mlp_hidden=4096)

FAMILY = Family(
    DINOv3,
    {
        "dinov3_s16": Entry(S, "timm vit_small_patch16_dinov3"),
        "dinov3_s16_plus": Entry(replace(S, mlp="swiglu"), "timm vit_small_plus_patch16_dinov3"),
        "dinov3_b16": Entry(DINOv3Config(), "timm vit_base_patch16_dinov3"),
        "dinov3_l16": Entry(L, "timm vit_large_patch16_dinov3"),
        "dinov3_h16_plus": Entry(
            DINOv3Config(dim=1280, depth=32, num_heads=20, mlp="swiglu", mlp_hidden=5120),
            "timm vit_huge_plus_patch16_dinov3",
        ),
        "dinov3_7b16": Entry(
            DINOv3Config(dim=4096, depth=40, num_heads=32, mlp="swiglu", mlp_hidden=8192),
            "timm vit_7b_patch16_dinov3",
        ),
    },
)
