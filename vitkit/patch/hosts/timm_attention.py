"""Rules for timm's self-attention, with and without rotary positions, and attention pooling by
latents; what the rules for its models' own attention share with them."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch

from vitkit import nn
from vitkit.nn.attention import pool_latent, project, self_attention
from vitkit.nn.rope import rotate
from vitkit.patch.rules import Replacement, Rule, swap_class, watched

# What the replacements repeat, in every version whose forward they were compared with.
_ATTENTION = {
    "29e5debcf4": "1.0.20 to 1.0.22",
    "854d39f1a2": "1.0.23 to 1.0.25",
    "97a109ff8d": "1.0.26, 1.0.27",
    "70e266c3de": "1.0.28 to 1.0.31",
}
_ATTENTION_ROPE = {
    "b1e2217596": "1.0.23 to 1.0.25",
    "b1020369be": "1.0.26, 1.0.27",
    "33eec300bb": "1.0.28, 1.0.29",
    "6598aa74ad": "1.0.30, 1.0.31",
}
_POOL = {"9f9cf25c24": "1.0.20 to 1.0.25", "d5fef5d19d": "1.0.26 to 1.0.31"}


def needs_host(m: Any, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> bool:
    """Whether this call must show the attention weights: to dropout, or to a hook on it. With both
    a mask and is_causal, timm lets one win on one of its two paths and refuses on the other."""
    dropping = m.training and m.attn_drop.p > 0
    return dropping or watched(m.attn_drop) or (is_causal and attn_mask is not None)


class Attention(timm.layers.Attention):
    """timm's Attention on flash attention."""

    def forward(self, x, attn_mask=None, is_causal=False):
        if needs_host(self, attn_mask, is_causal):
            causal = {"is_causal": True} if is_causal else {}  # timm before 1.0.26 has no such name
            return super().forward(x, attn_mask=attn_mask, **causal)
        return self_attention(self, x, attn_mask, is_causal)


def is_table(rope: torch.Tensor, positions: int) -> bool:
    """Whether timm's sines and cosines are a table for each of the tokens they turn: [N', 2D],
    [H, N', 2D] or [B, H or 1, N', 2D]. timm takes whatever broadcasts."""
    return rope.dim() in (2, 3, 4) and rope.shape[-2] == positions


def rotated(m: Any, q: torch.Tensor, k: torch.Tensor, rope: torch.Tensor):
    """q and k [B, N, H, D] turned by timm's sines and cosines side by side."""
    if rope.dim() > 2:
        rope = rope.transpose(-2, -3)
    if rope.dim() == 3:
        rope = rope[None]
    sin, cos = rope.chunk(2, -1)
    layout = "half" if getattr(m, "rotate_half", False) else "interleaved"
    return rotate(m, q, k, cos, sin, layout)


def attend_rotated(
    m: Any,
    x: torch.Tensor,  # [B, N, E], what the module was given
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,
    v: torch.Tensor,
    rope: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    groups: int = 1,
) -> torch.Tensor:
    """Norms, rotary positions, attention and what follows it."""
    q, k = m.q_norm(q), m.k_norm(k)
    if rope is not None:
        q, k = (t.type_as(v) for t in rotated(m, q, k, rope))
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    return project(m, x, nn.attend(m, q, k, v, attn_mask, is_causal).reshape(*x.shape[:2], -1))


class AttentionRope(timm.layers.AttentionRope):
    """timm's AttentionRope on rotary positions and flash attention."""

    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        b, n, _ = x.shape
        turned = rope is None or is_table(rope, n - self.num_prefix_tokens)
        if needs_host(self, attn_mask, is_causal) or not turned:
            causal = {"is_causal": True} if is_causal else {}
            return super().forward(x, rope, attn_mask=attn_mask, **causal)
        if self.qkv is not None:
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).unbind(2)
        else:
            shape = (b, n, -1, self.head_dim)
            q, k, v = (proj(x).reshape(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        groups = getattr(self, "num_kv_groups", 1)
        return attend_rotated(self, x, q, k, v, rope, attn_mask, is_causal, groups)


class AttentionPoolLatent(timm.layers.AttentionPoolLatent):
    """timm's AttentionPoolLatent on flash attention."""

    def forward(self, x, attn_mask=None):
        # Without fused attention timm adds a boolean mask to the scores as numbers.
        if attn_mask is not None and not self.fused_attn:
            return super().forward(x, attn_mask)
        return pool_latent(self, x, attn_mask)


def onto(twin: type):
    """The plan of a rule: swap the class if a kernel takes the module's heads."""

    def plan(module: Any) -> Replacement | str:
        reason = _why_not_head(module)
        if reason:
            return reason
        dropout = getattr(getattr(module, "attn_drop", None), "p", 0.0)
        note = "timm's own forward while attention dropout is active" if dropout else ""
        return Replacement("flash_attention", (swap_class(module, twin),), note=note)

    return plan


def _why_not_head(module: Any) -> str | None:
    head_dim = getattr(module, "head_dim", None)
    if head_dim is None:  # timm's BEiT does not keep it
        head_dim = module.proj.in_features // module.num_heads
    if module.scale != head_dim**-0.5:
        return f"its scale is {module.scale}, not head_dim ** -0.5"
    return nn.why_no_kernel("flash_attention", "meta", torch.float32, head_dim)


RULES = [
    Rule(
        timm.layers.Attention,
        "flash_attention",
        onto(Attention),
        ((timm.layers.Attention.forward, _ATTENTION),),
    ),
    Rule(
        timm.layers.AttentionRope,
        "flash_attention",
        onto(AttentionRope),
        ((timm.layers.AttentionRope.forward, _ATTENTION_ROPE),),
    ),
    Rule(
        timm.layers.AttentionPoolLatent,
        "flash_attention",
        onto(AttentionPoolLatent),
        ((timm.layers.AttentionPoolLatent.forward, _POOL),),
    ),
]
