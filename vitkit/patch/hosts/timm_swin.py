"""Rules for timm's Swin blocks: attention on the map, without roll, padding and windows."""

from __future__ import annotations

from typing import Any

import timm.models.swin_transformer as v1
import timm.models.swin_transformer_v2 as v2
import torch

from vitkit import nn
from vitkit.nn.window import cosine_window_self_attention, window_self_attention
from vitkit.patch.rules import Replacement, Rule, swap_class, watched

# What the replacements repeat, in every version whose code they were compared with.
_V1 = (
    (v1.SwinTransformerBlock._attn, {"ad7d8e0f31": "1.0.20 to 1.0.31"}),
    (
        v1.SwinTransformerBlock.get_attn_mask,
        {"5a78e50e32": "1.0.20", "224d1816c2": "1.0.21 to 1.0.30", "bc48cdb596": "1.0.31"},
    ),
    (v1.WindowAttention.forward, {"0988ef1c5a": "1.0.20 to 1.0.31"}),
)
_V2 = (
    (v2.SwinTransformerV2Block._attn, {"cd1e694f0b": "1.0.20 to 1.0.31"}),
    (
        v2.SwinTransformerV2Block.get_attn_mask,
        {"23d9e1b100": "1.0.20", "00bd57ea0e": "1.0.21 to 1.0.30", "0d6e8d03df": "1.0.31"},
    ),
    (v2.WindowAttention.forward, {"5142542ee3": "1.0.20 to 1.0.31"}),
)


def _needs_host(m: Any) -> bool:
    """Whether windows or attention weights must exist: for dropout, or for a hook on a module that
    is not called with them here."""
    dropping = m.training and (m.attn_drop.p > 0 or m.proj_drop.p > 0)
    return dropping or watched(m, m.softmax, m.attn_drop)


class SwinTransformerBlock(v1.SwinTransformerBlock):
    """timm's Swin block on window attention."""

    def _attn(self, x):
        if _needs_host(self.attn):
            return super()._attn(x)
        return window_self_attention(
            self, self.attn, x, self.window_size, self.shift_size, "roll_then_pad"
        )


class SwinTransformerV2Block(v2.SwinTransformerV2Block):
    """timm's Swin V2 block on cosine window attention."""

    def _attn(self, x):
        m: Any = self.attn
        if _needs_host(m) or watched(m.qkv):
            return super()._attn(x)
        q_bias: Any = m.q_bias
        bias = None if q_bias is None else torch.cat([q_bias, m.k_bias, m.v_bias])
        return cosine_window_self_attention(
            self, m, x, bias, self.window_size, self.shift_size, "roll_then_pad"
        )


def _onto(twin: type, attention: type):
    def plan(module: Any) -> Replacement | str:
        m, exact = module.attn, {attention}
        if type(m) not in exact:
            return f"its attention is a {type(m).__name__}: it may compute something else"
        head_dim = m.proj.in_features // m.num_heads
        reason = nn.why_no_kernel("window_attention", "meta", torch.float32, head_dim)
        if reason:
            return reason
        if getattr(m, "scale", head_dim**-0.5) != head_dim**-0.5:
            return f"its scale is {m.scale}, not head_dim ** -0.5"
        if attention is v2.WindowAttention and type(m.qkv) is not torch.nn.Linear:
            return f"its qkv is a {type(m.qkv).__name__}, of which timm uses the weight only"
        dropout = m.attn_drop.p > 0 or m.proj_drop.p > 0
        note = "timm's own path while dropout is active" if dropout else ""
        return Replacement("window_attention", (swap_class(module, twin),), (m,), note)

    return plan


RULES = [
    Rule(
        v1.SwinTransformerBlock,
        "window_attention",
        _onto(SwinTransformerBlock, v1.WindowAttention),
        _V1,
    ),
    Rule(
        v2.SwinTransformerV2Block,
        "window_attention",
        _onto(SwinTransformerV2Block, v2.WindowAttention),
        _V2,
    ),
]
