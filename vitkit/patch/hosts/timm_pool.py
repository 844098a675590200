"""Rules for timm's pooling of maps and of tokens by self-attention, of which a class token's row is
all that is kept: only that row is computed."""

from __future__ import annotations

from typing import Any

import timm.layers
import timm.layers.attention_pool2d as pool2d
import torch
from timm.layers import resample_abs_pos_embed

from vitkit import nn
from vitkit.patch.hosts.timm_attention import onto, rotated
from vitkit.patch.rules import Rule, watched

# What the replacements repeat, in every version whose forward they were compared with.
_POOL = ((pool2d.AttentionPool2d.forward, {"f25c6339d4": "1.0.31"}),)
_ROTARY = ((pool2d.RotAttentionPool2d.forward, {"1d17fea1d3": "1.0.31"}),)
_PRR = {"c75e91eab0": "1.0.26 to 1.0.31"}


def _tokens(m: Any, x: torch.Tensor) -> torch.Tensor:
    """[B, 1 + H * W, C]: the class token, or the mean, and the map x [B, C, H, W]."""
    x = x.flatten(2).transpose(1, 2)
    first = x.mean(1, keepdim=True) if m.cls_token is None else m.cls_token.expand(len(x), -1, -1)
    return torch.cat([first, x], dim=1)


def _heads(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v [B, N, H, D]"""
    if m.qkv is not None:
        return m.qkv(x).unflatten(-1, (3, m.num_heads, -1)).unbind(2)
    return tuple(p(x).unflatten(-1, (m.num_heads, -1)) for p in (m.q, m.k, m.v))


def _needs_all(m: Any) -> bool:
    """Whether every row must exist: for dropout, which draws for each, or for a hook or adapter."""
    plain = type(m.proj) in (torch.nn.Linear, torch.nn.Identity)
    return (m.training and m.drop.p > 0) or not plain or watched(m.drop, m.proj)


def _pooled(
    m: Any,
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,
    v: torch.Tensor,
    size: torch.Size,  # (H, W) of the map
    pre_logits: bool,
) -> torch.Tensor:
    first = m.pool_type == "token" and not _needs_all(m)
    out = m.drop(nn.attend(m, q[:, :1] if first else q, k, v).flatten(2))
    return m._pool(out if pre_logits else m.proj(out), *size)


class AttentionPool2d(pool2d.AttentionPool2d):
    """timm's AttentionPool2d on flash attention."""

    def forward(self, x, pre_logits=False):
        size = x.shape[2:]
        x = _tokens(self, x)
        x = x + resample_abs_pos_embed(
            self.pos_embed.unsqueeze(0), tuple(size), old_size=self.feat_size, num_prefix_tokens=1
        )
        q, k, v = _heads(self, x)
        return _pooled(self, q, k, v, size, pre_logits)


class RotAttentionPool2d(pool2d.RotAttentionPool2d):
    """timm's RotAttentionPool2d on rotary positions and flash attention."""

    def forward(self, x, pre_logits=False):
        size = x.shape[2:]
        q, k, v = _heads(self, _tokens(self, x))
        positions: Any = self.pos_embed
        rope = positions.get_embed(tuple(size))
        if isinstance(rope, tuple):
            rope = torch.cat(rope, dim=-1)
        q, k = (t.type_as(v) for t in rotated(self, q, k, rope))
        return _pooled(self, q, k, v, size, pre_logits)


RULES = [
    Rule(pool2d.AttentionPool2d, "flash_attention", onto(AttentionPool2d), _POOL),
    Rule(pool2d.RotAttentionPool2d, "flash_attention", onto(RotAttentionPool2d), _ROTARY),
]

if hasattr(timm.layers, "AttentionPoolPrr"):  # timm 1.0.26

    class AttentionPoolPrr(timm.layers.AttentionPoolPrr):
        """timm's AttentionPoolPrr on flash attention."""

        def forward(self, x):
            x = self.pre_norm(x).unflatten(-1, (self.num_heads, -1))
            first = self.pool == "token" and not watched(self.post_norm)
            x = self.post_norm(nn.attend(self, x[:, :1] if first else x, x, x).flatten(2))
            return x[:, 0] if self.pool == "token" else x.mean(1)

    RULES.append(
        Rule(
            timm.layers.AttentionPoolPrr,
            "flash_attention",
            onto(AttentionPoolPrr),
            ((timm.layers.AttentionPoolPrr.forward, _PRR),),
        )
    )
