"""Attention modules in timm's parameter layout, computing in [B, N, H, D] without transposing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitkit.nn.functional import attend
from vitkit.nn.products import Linear

Norm = Callable[[int], torch.nn.Module]


def _head_dim(name: str, dim: int, num_heads: int) -> int:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{name}: num_heads must divide dim = {dim}, got {num_heads}")
    return dim // num_heads


class Attention(torch.nn.Module):
    """Multi-head self-attention with one ``qkv`` projection: the parameters of timm's Attention.

    Args:
        dim: width of the tokens.
        num_heads: divides dim.
        qkv_bias, proj_bias: whether the two projections have a bias.
        qk_norm: ``norm_layer(head_dim)`` on queries and keys.
        scale_norm: ``norm_layer(dim)`` before the output projection.
        gated: the output is multiplied by the sigmoid of a projection of the input.
        proj_drop: dropout probability of the output.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.Attention(64, num_heads=4)(torch.randn(2, 17, 64)).shape
        torch.Size([2, 17, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        gated: bool = False,
        proj_drop: float = 0.0,
        norm_layer: Norm = torch.nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = _head_dim("Attention", dim, num_heads)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else torch.nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else torch.nn.Identity()
        self.norm = norm_layer(dim) if scale_norm else torch.nn.Identity()
        self.gate = Linear(dim, dim, bias=qkv_bias) if gated else None
        self.proj = Linear(dim, dim, bias=proj_bias)
        self.proj_drop = torch.nn.Dropout(proj_drop)

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        return self_attention(self, x, attn_mask, is_causal)


def self_attention(
    m: Any,  # anything with the attributes of Attention, which timm's is too
    x: torch.Tensor,  # [B, N, E]
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """The forward of :class:`Attention`."""
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, m.num_heads, m.head_dim).unbind(2)
    out = attend(m, m.q_norm(q), m.k_norm(k), v, attn_mask, is_causal).reshape(b, n, -1)
    return project(m, x, out)


def project(m: Any, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What timm's attention modules do with the attended values: norm, gate (of the module's input
    x), projection, dropout."""
    out = m.norm(out)
    gate = getattr(m, "gate", None)  # timm before 1.0.28 has none
    if gate is not None:
        out = out * gate(x).sigmoid()
    return m.proj_drop(m.proj(out))


class AttentionPoolLatent(torch.nn.Module):
    """Learned latents attend to the tokens, then an MLP: the parameters of timm's module of that
    name, which SigLIP pools with.

    Args:
        dim: width of the tokens and of the output.
        num_heads: divides dim.
        latent_len: number of latents.
        mlp_ratio: width of the MLP over dim.
        qkv_bias: whether the ``q`` and ``kv`` projections have a bias.
        qk_norm: ``norm_layer(head_dim)`` on queries and keys.
        pool: ``"token"`` returns the first latent, ``"avg"`` their mean, ``""`` all of them.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.AttentionPoolLatent(64, num_heads=4)(torch.randn(2, 17, 64)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        latent_len: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        pool: str = "token",
        norm_layer: Norm = torch.nn.LayerNorm,
    ) -> None:
        super().__init__()
        if pool not in ("token", "avg", ""):
            raise ValueError(
                f"AttentionPoolLatent: pool must be 'token', 'avg' or '', got {pool!r}"
            )
        self.num_heads = num_heads
        self.head_dim = _head_dim("AttentionPoolLatent", dim, num_heads)
        self.latent_len = latent_len
        self.pool = pool
        self.pos_embed: torch.nn.Parameter | None = None
        self.latent = torch.nn.Parameter(torch.randn(1, latent_len, dim) * dim**-0.5)
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else torch.nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else torch.nn.Identity()
        self.proj = Linear(dim, dim)
        self.proj_drop = torch.nn.Dropout(0.0)
        self.norm = norm_layer(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = torch.nn.Sequential()
        self.mlp.add_module("fc1", Linear(dim, hidden))
        self.mlp.add_module("act", torch.nn.GELU())
        self.mlp.add_module("fc2", Linear(hidden, dim))

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        return pool_latent(self, x, attn_mask)


def pool_latent(m: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The forward of :class:`AttentionPoolLatent`; ``m`` is anything with its attributes."""
    b, n, _ = x.shape
    if m.pos_embed is not None:
        x = x + m.pos_embed.unsqueeze(0).to(x.dtype)
    q = m.q(m.latent.expand(b, -1, -1)).reshape(b, m.latent_len, m.num_heads, m.head_dim)
    k, v = m.kv(x).reshape(b, n, 2, m.num_heads, m.head_dim).unbind(2)
    x = attend(m, m.q_norm(q), m.k_norm(k), v, attn_mask).reshape(b, m.latent_len, -1)
    x = m.proj_drop(m.proj(x))
    if m.mlp is not None:
        x = x + m.mlp(m.norm(x))
    if m.pool == "token":
        return x[:, 0]
    return x.mean(1) if m.pool == "avg" else x
