"""Rules for torchvision's Swin: attention on the map, without roll, padding and windows."""

from __future__ import annotations

from typing import Any

import torch
import torchvision.models.swin_transformer as swin

from vitkit import nn
from vitkit.nn.products import linear
from vitkit.nn.window import attend_windows, is_ragged, swin_v2_table
from vitkit.patch.rules import Replacement, Rule, swap_class

# What the replacements repeat, in every version whose code they were compared with.
_FUNCTION = (swin.shifted_window_attention, {"194cf465c6": "0.26.0 to 0.29.2"})
_V1 = (swin.ShiftedWindowAttention.forward, {"797081d076": "0.26.0 to 0.29.2"})
_V2 = (swin.ShiftedWindowAttentionV2.forward, {"f3550b8614": "0.26.0 to 0.29.2"})
_TABLE = (
    swin.ShiftedWindowAttentionV2.get_relative_position_bias,
    {"634b259cfb": "0.26.0 to 0.29.2"},
)


def _needs_host(m: Any) -> bool:
    """Whether windows or attention weights must exist, for dropout. (torchvision calls no submodule
    here that a hook could be on.)"""
    return m.training and (m.attention_dropout > 0 or m.dropout > 0)


def _attend(
    m: Any,
    x: torch.Tensor,  # [B, H, W, C]
    table: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    window = (m.window_size[0], m.window_size[1])
    # An axis that is a single window is not shifted.
    shift = (
        0 if x.shape[1] <= window[0] else m.shift_size[0],
        0 if x.shape[2] <= window[1] else m.shift_size[1],
    )
    pad = None if bias is None or not is_ragged(x, window) else bias.view(3, m.num_heads, -1)
    qkv = linear(m, x, m.qkv.weight, bias)
    out = attend_windows(
        m,
        qkv,
        m.num_heads,
        window,
        shift,
        bias_table=table,
        logit_scale=logit_scale,
        pad_value=pad,
    )
    return linear(m, out, m.proj.weight, m.proj.bias)


class ShiftedWindowAttention(swin.ShiftedWindowAttention):
    """torchvision's attention of Swin on window attention."""

    def forward(self, x):
        if _needs_host(self):
            return super().forward(x)
        return _attend(self, x, self.relative_position_bias_table, self.qkv.bias)


class ShiftedWindowAttentionV2(swin.ShiftedWindowAttentionV2):
    """torchvision's attention of Swin V2 on cosine window attention."""

    def forward(self, x):
        if _needs_host(self):
            return super().forward(x)
        bias = self.qkv.bias
        if bias is not None:
            query, key, value = bias.chunk(3)
            bias = torch.cat([query, torch.zeros_like(key), value])
        return _attend(self, x, swin_v2_table(self), bias, self.logit_scale.flatten())


def _onto(twin: type):
    def plan(module: Any) -> Replacement | str:
        head_dim = module.proj.in_features // module.num_heads
        reason = nn.why_no_kernel("window_attention", "meta", torch.float32, head_dim)
        if reason:
            return reason
        for name in ("qkv", "proj"):
            if type(getattr(module, name)) is not torch.nn.Linear:
                kind = type(getattr(module, name)).__name__
                return f"its {name} is a {kind}, of which torchvision uses weight and bias only"
        dropout = module.attention_dropout > 0 or module.dropout > 0
        note = "torchvision's own forward while dropout is active" if dropout else ""
        return Replacement("window_attention", (swap_class(module, twin),), note=note)

    return plan


RULES = [
    Rule(
        swin.ShiftedWindowAttention,
        "window_attention",
        _onto(ShiftedWindowAttention),
        (_FUNCTION, _V1),
    ),
    Rule(
        swin.ShiftedWindowAttentionV2,
        "window_attention",
        _onto(ShiftedWindowAttentionV2),
        (_FUNCTION, _V2, _TABLE),
    ),
]
