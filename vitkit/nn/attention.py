"""Attention modules in timm's parameter layout, computing in [B, N, H, D] without transposing."""

from __future__ import annotations

from typing import Any

import torch

from vitkit.ops.flash_attention import flash_attention


def attend(
    module: torch.nn.Module,
    q: torch.Tensor,  # [B, Nq, H, D]
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """``vitkit.flash_attention`` on the backend chosen for ``module``."""
    backend = getattr(module, "vitkit_backend", "auto")
    out = flash_attention(q, k, v, bias=mask, causal=causal, backend=backend)
    assert isinstance(out, torch.Tensor)
    return out


class Attention(torch.nn.Module):
    """Multi-head self-attention with one ``qkv`` projection: the parameters of timm's Attention.

    Args:
        dim: width of the tokens.
        num_heads: divides dim.
        qkv_bias, proj_bias: biases of the two projections.
        qk_norm: norm_layer(head_dim) on queries and keys.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.Attention(64, num_heads=4)(torch.randn(2, 17, 64)).shape
        torch.Size([2, 17, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        norm_layer: Any = torch.nn.LayerNorm,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Attention: num_heads must divide dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = torch.nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else torch.nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else torch.nn.Identity()
        self.norm = torch.nn.Identity()
        self.gate: torch.nn.Module | None = None
        self.proj = torch.nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = torch.nn.Dropout(0.0)

    def forward(
        self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        b, n, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        x = attend(self, q, k, v, attn_mask, is_causal).reshape(b, n, -1)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


class AttentionPoolLatent(torch.nn.Module):
    """Cross attention of learned latents to the tokens, with the parameters of timm's module of
    that name. It has no constructor of its own: patching gives an existing module this forward."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        m: Any = self
        b, n, c = x.shape
        if m.pos_embed is not None:
            x = x + m.pos_embed.unsqueeze(0).to(x.dtype)
        q = m.q(m.latent.expand(b, -1, -1)).reshape(b, m.latent_len, m.num_heads, m.head_dim)
        k, v = m.kv(x).reshape(b, n, 2, m.num_heads, m.head_dim).unbind(2)
        x = attend(self, m.q_norm(q), m.k_norm(k), v, attn_mask).reshape(b, m.latent_len, c)
        x = m.proj_drop(m.proj(x))
        if m.mlp is not None:
            x = x + m.mlp(m.norm(x))
        if m.pool == "token":
            return x[:, 0]
        return x.mean(1) if m.pool == "avg" else x
