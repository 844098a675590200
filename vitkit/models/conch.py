"""The vision encoders CONCH and CONCH v1.5 (Lu et al. 2024): a ViT and attention pools over its
tokens, in the parameter layout of their repositories."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitkit.models.layers import ImageModel
from vitkit.models.registry import Entry, Family
from vitkit.models.vit import VisionTransformer, ViTConfig
from vitkit.nn import LayerNorm, Linear, MultiheadAttention, attend

# Both write LayerNorm() without eps, except in the trunk.
POOL_EPS = 1e-5


class AttentionalPooler(torch.nn.Module):
    """Learned queries attend to tokens: the parameters of open_clip's module, also TITAN's."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, queries: int) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(queries, dim))
        self.attn = MultiheadAttention(dim, num_heads, context_dim=context_dim)
        self.ln_q = LayerNorm(dim, eps=POOL_EPS)
        self.ln_k = LayerNorm(context_dim, eps=POOL_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, N, context_dim] -> [B, queries, dim]"""
        return self.attn(self.ln_q(self.query).expand(len(x), -1, -1), self.ln_k(x))


class BiaslessPooler(torch.nn.Module):
    """The same with other projections: the parameters of CONCH v1.5."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, queries: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = torch.nn.Parameter(torch.randn(queries, dim))
        self.ln_k = LayerNorm(context_dim, eps=POOL_EPS)
        self.ln_q = LayerNorm(dim, eps=POOL_EPS)
        self.to_q = Linear(dim, dim, bias=False)
        self.to_kv = Linear(context_dim, 2 * dim, bias=False)
        self.to_out = Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, N, context_dim] -> [B, queries, dim]"""
        q = self.to_q(self.ln_q(self.query)).unflatten(-1, (self.num_heads, -1))
        k, v = self.to_kv(self.ln_k(x)).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.to_out(attend(self, q.expand(len(x), -1, -1, -1), k, v).flatten(2))


@dataclass(frozen=True)
class CONCHConfig:
    """
    Args:
        trunk: the ViT; version 1.5 has the positions of 224 pixels.
        image_size: side of the images.
        dim: width of the pooled features.
        pool_heads: of the attention pools.
        caption_queries: number of tokens for a text decoder, 0 for none.
        version: 1 or 1.5, whose pools have different parameters.
    """

    trunk: ViTConfig
    image_size: int = 448
    dim: int = 512
    pool_heads: int = 8
    caption_queries: int = 256
    version: float = 1

    def reduced(self) -> CONCHConfig:
        dim = 2 * self.dim // self.pool_heads
        queries = min(self.caption_queries, 4)
        trunk = self.trunk.reduced()
        ratio = self.image_size // self.trunk.image_size
        return replace(
            self,
            trunk=trunk,
            image_size=ratio * trunk.image_size,
            dim=dim,
            pool_heads=2,
            caption_queries=queries,
        )


class CONCH(ImageModel):
    """Images [B, 3, H, W] to features [B, dim], before the projection of the contrastive loss."""

    def __init__(self, config: CONCHConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.version not in (1, 1.5):
            raise ValueError(f"CONCH: version must be 1 or 1.5, got {c.version}")
        self.trunk = VisionTransformer(c.trunk)
        pooler = AttentionalPooler if c.version == 1 else BiaslessPooler
        self.attn_pool_contrast = pooler(c.dim, c.trunk.dim, c.pool_heads, 1)
        self.ln_contrast = LayerNorm(c.dim, eps=POOL_EPS)
        if c.version == 1:
            scale = c.trunk.dim**-0.5
            self.proj_contrast = torch.nn.Parameter(torch.randn(c.dim, c.dim) * scale)
        if c.caption_queries:
            width = c.trunk.dim
            self.attn_pool_caption = pooler(width, width, c.pool_heads, c.caption_queries)
            self.ln_caption = LayerNorm(width, eps=POOL_EPS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.trunk.forward_features(images)
        return self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The space of the contrastive loss [B, dim] (version 1)."""
        return features @ self.proj_contrast

    def caption_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [B, caption_queries, trunk.dim] for a text decoder."""
        return self.ln_caption(self.attn_pool_caption(self.trunk.forward_features(images)))


FAMILY = Family(
    CONCH,
    {
        "conch": Entry(
            CONCHConfig(ViTConfig(image_size=448)), "MahmoodLab/CONCH, the keys of `visual.`"
        ),
        "conch_v1_5": Entry(
            CONCHConfig(
                ViTConfig(
                    dim=1024,
                    depth=24,
                    num_heads=16,
                    mlp_hidden=4096,
                    layer_scale=1e-6,
                    resample="dino",
                ),
                dim=768,
                caption_queries=0,
                version=1.5,
            ),
            "CONCH v1.5 of MahmoodLab/TITAN",
        ),
    },
)
