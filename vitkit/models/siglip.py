"""The SigLIP vision encoder (Zhai et al. 2023) in transformers' parameter layout, as MedSigLIP and
MedGemma publish it. ``siglip_*`` of :mod:`vitkit.models.vit` is the same network in timm's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vitkit.models.layers import ImageModel, init_weights, narrow_encoder
from vitkit.models.registry import Entry, Family
from vitkit.nn import Conv2d, LayerNorm, Linear, Mlp, MultiheadAttention, attend, patch_embed


@dataclass(frozen=True)
class SigLIPConfig:
    """
    Args:
        image_size, patch_size, dim, depth, num_heads, mlp_hidden, eps: as in ``ViTConfig``.
        head: pool the tokens with attention.
    """

    image_size: int = 448
    patch_size: int = 14
    dim: int = 1152
    depth: int = 27
    num_heads: int = 16
    mlp_hidden: int = 4304
    head: bool = True
    eps: float = 1e-6

    def reduced(self) -> SigLIPConfig:
        return narrow_encoder(self)


class SelfAttention(torch.nn.Module):
    """Attention with separate projections."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.q_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in projections)
        return self.out_proj(attend(self, q, k, v).flatten(2))


class Layer(torch.nn.Module):
    def __init__(self, c: SigLIPConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(c.dim, eps=c.eps)
        self.self_attn = SelfAttention(c.dim, c.num_heads)
        self.layer_norm2 = LayerNorm(c.dim, eps=c.eps)
        self.mlp = Mlp(c.dim, c.mlp_hidden, approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(torch.nn.Module):
    """Patches and their learned positions."""

    def __init__(self, c: SigLIPConfig) -> None:
        super().__init__()
        self.patch_embedding = Conv2d(3, c.dim, c.patch_size, c.patch_size)
        self.position_embedding = torch.nn.Embedding((c.image_size // c.patch_size) ** 2, c.dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        positions = self.position_embedding.weight
        return patch_embed(self, images, self.patch_embedding, pos_embed=positions)


class Encoder(torch.nn.Module):
    def __init__(self, c: SigLIPConfig) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(c) for _ in range(c.depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class PoolingHead(torch.nn.Module):
    """A learned probe attends to the tokens, then an MLP."""

    def __init__(self, c: SigLIPConfig) -> None:
        super().__init__()
        self.probe = torch.nn.Parameter(torch.randn(1, 1, c.dim))
        self.attention = MultiheadAttention(c.dim, c.num_heads)
        self.layernorm = LayerNorm(c.dim, eps=c.eps)
        self.mlp = Mlp(c.dim, c.mlp_hidden, approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(self.probe.expand(len(x), -1, -1), x)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class SigLIP(ImageModel):
    """Images [B, 3, H, W] to features [B, E] with a head, tokens [B, N, E] without."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embeddings = Embeddings(c)
        self.encoder = Encoder(c)
        self.post_layernorm = LayerNorm(c.dim, eps=c.eps)
        self.head = PoolingHead(c) if c.head else None
        init_weights(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.post_layernorm(self.encoder(self.embeddings(images)))
        return x if self.head is None else self.head(x)


FAMILY = Family(
    SigLIP,
    {
        "medsiglip": Entry(SigLIPConfig(), "transformers SiglipVisionModel, MedSigLIP 448"),
        "medgemma_siglip": Entry(
            SigLIPConfig(image_size=896, head=False),
            "transformers SiglipVisionModel, the vision tower of MedGemma 4B",
        ),
    },
)
