"""The Perceiver (Jaegle et al. 2021) that classifies images from their pixels, in transformers'
parameter layout: latents attend to all pixels once, then to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from vitkit.models.layers import ImageModel, init_weights
from vitkit.models.registry import Entry, Family
from vitkit.nn import LayerNorm, Linear, attend, project_gelu

EPS = 1e-5


@dataclass(frozen=True)
class PerceiverConfig:
    """
    Args:
        image_size: side of the images.
        bands: frequencies per axis of a pixel's position.
        latents, dim: number and width of the latents.
        blocks, layers: the ``layers`` self-attentions run ``blocks`` times.
        num_heads: of self-attention; attention to the pixels has one, as wide as a pixel.
        num_classes: of the head.
    """

    image_size: int = 224
    bands: int = 64
    latents: int = 512
    dim: int = 1024
    blocks: int = 8
    layers: int = 6
    num_heads: int = 8
    num_classes: int = 1000

    @property
    def pixel_dim(self) -> int:
        """Colours, the two coordinates, and their sines and cosines."""
        return 3 + 2 + 4 * self.bands

    def reduced(self) -> PerceiverConfig:
        # 43 channels a pixel: one head of an odd width, as the full model's 261 is.
        dim = 2 * self.dim // self.num_heads
        return replace(
            self, image_size=6, bands=4, latents=5, dim=dim, blocks=2, layers=2, num_heads=2
        )


class _Core(torch.nn.Module):
    def __init__(self, q_dim: int, kv_dim: int, head_dims: int, crosses: bool) -> None:
        super().__init__()
        self.layernorm1 = LayerNorm(q_dim, eps=EPS)
        self.layernorm2 = LayerNorm(kv_dim, eps=EPS) if crosses else torch.nn.Identity()
        self.query = Linear(q_dim, head_dims)
        self.key = Linear(kv_dim, head_dims)
        self.value = Linear(kv_dim, head_dims)


class _Dense(torch.nn.Module):
    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.dense = Linear(given, made)


class PerceiverAttention(torch.nn.Module):
    """Attention as wide as its context, or to the latents themselves."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        width = context_dim or dim
        self.self = _Core(dim, width, width, context_dim is not None)
        self.output = _Dense(width, dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        core = self.self
        h = core.layernorm1(x)
        context = h if context is None else core.layernorm2(context)
        projected = (core.query(h), core.key(context), core.value(context))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in projected)
        return x + self.output.dense(attend(self, q, k, v).flatten(2))


class PerceiverMLP(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense1 = Linear(dim, dim)
        self.dense2 = Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense2(project_gelu(self, self.dense1, x))


class PerceiverLayer(torch.nn.Module):
    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.attention = PerceiverAttention(dim, num_heads, context_dim)
        self.layernorm = LayerNorm(dim, eps=EPS)
        self.mlp = PerceiverMLP(dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = self.attention(x, context)
        return x + self.mlp(self.layernorm(x))


class _Encoder(torch.nn.Module):
    def __init__(self, c: PerceiverConfig) -> None:
        super().__init__()
        self.blocks = c.blocks
        self.cross_attention = PerceiverLayer(c.dim, 1, c.pixel_dim)
        self.self_attends = torch.nn.ModuleList(
            PerceiverLayer(c.dim, c.num_heads) for _ in range(c.layers)
        )

    def forward(self, latents: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        x = self.cross_attention(latents, pixels)
        for _ in range(self.blocks):
            for layer in self.self_attends:
                x = layer(x)
        return x


class _Query(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.position_embeddings = torch.nn.Parameter(torch.randn(1, dim) * 0.02)


class _Decoder(torch.nn.Module):
    def __init__(self, c: PerceiverConfig) -> None:
        super().__init__()
        self.output_position_encodings = _Query(c.dim)
        self.decoding_cross_attention = PerceiverLayer(c.dim, 1, c.dim)
        self.final_layer = Linear(c.dim, c.num_classes)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        learned = self.output_position_encodings.position_embeddings
        query = learned.expand(len(latents), -1, -1)
        return self.final_layer(self.decoding_cross_attention(query, latents))[:, 0]


class _Latents(torch.nn.Module):
    def __init__(self, c: PerceiverConfig) -> None:
        super().__init__()
        self.latents = torch.nn.Parameter(torch.randn(c.latents, c.dim))


class _Model(torch.nn.Module):
    def __init__(self, c: PerceiverConfig) -> None:
        super().__init__()
        self.embeddings = _Latents(c)
        self.encoder = _Encoder(c)
        self.decoder = torch.nn.ModuleDict({"decoder": _Decoder(c)})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = self.embeddings.latents.expand(len(pixels), -1, -1)
        return self.decoder["decoder"](self.encoder(latents, pixels))


class Perceiver(ImageModel):
    """Images [B, 3, H, W] to logits [B, num_classes]."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.perceiver = _Model(config)
        init_weights(self)

    def positions(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """[H * W, 2 + 4 bands]: coordinates in [-1, 1] and their sines and cosines, with
        frequencies up to that of the pixels the model was trained on."""
        axes = (torch.linspace(-1, 1, n, device=like.device) for n in (height, width))
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        highest = self.config.image_size / 2
        bands = torch.linspace(1, highest, self.config.bands, device=like.device)
        angles = math.pi * (places[:, :, None] * bands).flatten(1)
        return torch.cat([places, angles.sin(), angles.cos()], -1).to(like.dtype)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        b, _, height, width = images.shape
        positions = self.positions(height, width, images).expand(b, -1, -1)
        return self.perceiver(torch.cat([images.flatten(2).transpose(1, 2), positions], -1))


FAMILY = Family(
    Perceiver,
    {
        "perceiver": Entry(
            PerceiverConfig(),
            "transformers PerceiverForImageClassificationFourier,"
            " deepmind/vision-perceiver-fourier",
        ),
    },
)
