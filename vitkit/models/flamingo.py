"""Flamingo's Perceiver resampler (Alayrac et al. 2022) in open_flamingo's parameter layout: any
number of image features become a fixed number of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitkit.models.layers import init_weights
from vitkit.models.registry import Entry, Family
from vitkit.nn import GELU, LayerNorm, Linear, attend

EPS = 1e-5


@dataclass(frozen=True)
class ResamplerConfig:
    """
    Args:
        dim: width of features and latents.
        depth, num_heads, head_dim: of the attention.
        latents: number of latents, which is that of output tokens.
        example_tokens: number of features of ``example_inputs``.
    """

    dim: int = 1024
    depth: int = 6
    num_heads: int = 8
    head_dim: int = 64
    latents: int = 64
    example_tokens: int = 256

    def reduced(self) -> ResamplerConfig:
        return replace(self, dim=48, depth=2, num_heads=2, latents=5, example_tokens=20)


class ResamplerAttention(torch.nn.Module):
    """Latents attend to the features and to themselves."""

    def __init__(self, c: ResamplerConfig) -> None:
        super().__init__()
        self.num_heads = c.num_heads
        inner = c.num_heads * c.head_dim
        self.norm_media = LayerNorm(c.dim, eps=EPS)
        self.norm_latents = LayerNorm(c.dim, eps=EPS)
        self.to_q = Linear(c.dim, inner, bias=False)
        self.to_kv = Linear(c.dim, 2 * inner, bias=False)
        self.to_out = Linear(inner, c.dim, bias=False)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = self.norm_latents(latents)
        context = torch.cat([self.norm_media(x), latents], 1)
        q = self.to_q(latents).unflatten(-1, (self.num_heads, -1))
        k, v = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.to_out(attend(self, q, k, v).flatten(2))


class Resampler(torch.nn.Module):
    """Features of images [B, T, F, V, E] (T images of F frames) to tokens [B, T, latents, E]."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.latents = torch.nn.Parameter(torch.randn(c.latents, c.dim))

        def feed_forward() -> torch.nn.Sequential:
            wide = Linear(c.dim, 4 * c.dim, bias=False)
            narrow = Linear(4 * c.dim, c.dim, bias=False)
            return torch.nn.Sequential(LayerNorm(c.dim, eps=EPS), wide, GELU(), narrow)

        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList([ResamplerAttention(c), feed_forward()]) for _ in range(c.depth)
        )
        self.norm = LayerNorm(c.dim, eps=EPS)
        init_weights(self)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        b, t = features.shape[:2]
        x = features.flatten(2, 3).flatten(0, 1)
        latents = self.latents.expand(b * t, -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm(latents).unflatten(0, (b, t))

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Random features of two images of one frame."""
        return (torch.randn(batch, 2, 1, self.config.example_tokens, self.config.dim),)


FAMILY = Family(
    Resampler,
    {"flamingo_resampler": Entry(ResamplerConfig(), "open_flamingo PerceiverResampler")},
)
