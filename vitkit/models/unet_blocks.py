"""Blocks of U-Nets and autoencoders in diffusers' parameter layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitkit.nn import GEGLU, Conv2d, GroupNorm, GroupNormSiLU, LayerNorm, Linear, attend

GROUPS = 32


class ResnetBlock(torch.nn.Module):
    """Two convolutions behind GroupNorm and SiLU, the time between them."""

    def __init__(self, given: int, made: int, time_dim: int | None, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(GROUPS, given, eps=eps)
        self.conv1 = Conv2d(given, made, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else Linear(time_dim, made)
        self.norm2 = GroupNormSiLU(GROUPS, made, eps=eps)
        self.conv2 = Conv2d(made, made, 3, padding=1)
        self.conv_shortcut = None if given == made else Conv2d(given, made, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        """time [B, time_dim] after its SiLU"""
        add = None if self.time_emb_proj is None else self.time_emb_proj(time)
        h = self.conv2(self.norm2(self.conv1(self.norm1(x)), add=add))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(torch.nn.Module):
    """Attention to a context, or to the queries' own tokens."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim or dim, dim, bias=False)
        self.to_v = Linear(context_dim or dim, dim, bias=False)
        self.to_out = torch.nn.ModuleList([Linear(dim, dim)])

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in projected)
        return self.to_out[0](attend(self, q, k, v).flatten(2))


class MapAttention(torch.nn.Module):
    """Self-attention of the pixels of a map, in U-Nets without text and in autoencoders."""

    def __init__(self, dim: int, eps: float, num_heads: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = GroupNorm(GROUPS, dim, eps=eps)
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = torch.nn.ModuleList([Linear(dim, dim)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        projections = (self.to_q, self.to_k, self.to_v)
        q, k, v = (p(tokens).unflatten(-1, (self.num_heads, -1)) for p in projections)
        out = self.to_out[0](attend(self, q, k, v).flatten(2))
        return x + out.transpose(1, 2).reshape(x.shape)


class FeedForward(torch.nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        # The gap in the numbers is diffusers' dropout.
        layers = [GEGLU(dim, 4 * dim), torch.nn.Identity(), Linear(4 * dim, dim)]
        self.net = torch.nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class TransformerBlock(torch.nn.Module):
    """Self-attention, attention to a text, MLP."""

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads, context_dim)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2d(torch.nn.Module):
    """Transformer blocks over the pixels of a map, between projections."""

    def __init__(
        self, dim: int, num_heads: int, depth: int, context_dim: int, linear: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(GROUPS, dim, eps=1e-6)
        self.proj_in = Linear(dim, dim) if linear else Conv2d(dim, dim, 1)
        self.transformer_blocks = torch.nn.ModuleList(
            TransformerBlock(dim, num_heads, context_dim) for _ in range(depth)
        )
        self.proj_out = Linear(dim, dim) if linear else Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).reshape(x.shape)
        return x + (h if self.linear else self.proj_out(h))


class Downsample(torch.nn.Module):
    """A strided convolution. Symmetric padding is Stable Diffusion's U-Net's; the others pad right
    and bottom."""

    def __init__(self, dim: int, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = Conv2d(dim, dim, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(torch.nn.Module):
    """Twice the size, nearest, and a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: torch.Tensor, size: torch.Size | None = None) -> torch.Tensor:
        if size is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
