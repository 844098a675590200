"""Rules for timm: self-attention of its ViTs and attention pooling."""

from __future__ import annotations

from typing import Any

import timm.layers

from vitkit import nn
from vitkit.patch.rules import Replacement, Rule, swap_class


class Attention(timm.layers.Attention):
    """timm's Attention on flash attention; attention dropout in training runs timm's own
    forward."""

    def forward(self, x, attn_mask=None, is_causal=False):
        # timm lets is_causal win over a mask on one of its two paths and refuses both on the other.
        if (self.training and self.attn_drop.p > 0) or (is_causal and attn_mask is not None):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return nn.Attention.forward(self, x, attn_mask, is_causal)


class AttentionPoolLatent(timm.layers.AttentionPoolLatent):
    """timm's AttentionPoolLatent on flash attention."""

    forward = nn.AttentionPoolLatent.forward


def _standard_scale(module: Any) -> str | None:
    expected = module.head_dim**-0.5
    if abs(module.scale - expected) > 1e-9 * expected:
        return f"its scale is {module.scale}, not head_dim ** -0.5"
    return None


def _attention(module: Any) -> Replacement | str:
    note = "timm's forward while attention dropout is active" if module.attn_drop.p > 0 else ""
    return _standard_scale(module) or Replacement(
        "flash_attention", (swap_class(module, Attention),), note=note
    )


def _pool(module: Any) -> Replacement | str:
    return _standard_scale(module) or Replacement(
        "flash_attention", (swap_class(module, AttentionPoolLatent),)
    )


RULES = [
    Rule(lambda m: type(m) is timm.layers.Attention, _attention),
    Rule(lambda m: type(m) is timm.layers.AttentionPoolLatent, _pool),
]
