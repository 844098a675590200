"""Rules for transformers' Swin and Swin V2 layers: attention on the map, without roll, padding and
windows. Swin V2 never asks transformers' registry for its attention function."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.swin import modeling_swin as v1
from transformers.models.swinv2 import modeling_swinv2 as v2

from vitkit import nn
from vitkit.nn.window import attend_windows, is_ragged
from vitkit.patch.hosts.transformers_attention import why_not_implementation
from vitkit.patch.rules import Replacement, Rule, swap_class, watched

# What the replacements repeat, in every version whose code they were compared with.
_V1 = (
    (v1.SwinLayer.forward, {"a3a1ea6782": "5.23"}),
    (v1.SwinLayer.get_attn_mask, {"775e3f322d": "5.23"}),
    (v1.SwinAttention.forward, {"556d024749": "5.23"}),
    (v1.SwinRelativePositionBias.forward, {"5a34663b21": "5.23"}),
)
_V2 = (
    (v2.Swinv2Layer.forward, {"d80f0a4792": "5.23"}),
    (v2.Swinv2Layer.get_attn_mask, {"9b05e8dee3": "5.23"}),
    (v2.Swinv2SelfAttention.forward, {"6a080346ca": "5.23"}),
    (v2.Swinv2SelfOutput.forward, {"91ae79ddd4": "5.23"}),
)


def _attend(
    layer: Any,
    x: torch.Tensor,  # [B, H, W, C]
    projections: tuple[torch.nn.Module, ...],
    heads: int,
    table: torch.Tensor,
    logit_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention within the layer's windows: [B, H * W, C]"""
    window, shift = (int(layer.window_size),) * 2, (int(layer.shift_size),) * 2
    pad = None
    if is_ragged(x, window):
        nothing = x.new_zeros(1, x.shape[-1])
        pad = torch.cat([p(nothing) for p in projections]).view(3, heads, -1)
    qkv = torch.cat([p(x) for p in projections], dim=-1)
    out = attend_windows(
        layer, qkv, heads, window, shift, bias_table=table, logit_scale=logit_scale, pad_value=pad
    )
    return out.flatten(1, 2)


class SwinLayer(v1.SwinLayer):
    """transformers' SwinLayer on window attention."""

    def forward(self, hidden_states, input_dimensions, always_partition=False, **kwargs):
        m = self.attention
        bias = m.relative_position_bias
        dropping = self.training and m.attention_dropout > 0
        other = m.config._attn_implementation != "sdpa" or kwargs.get("output_attentions")
        if dropping or other or watched(m, bias):
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        if bias.window_size != (self.window_size, self.window_size):
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        x = self.layernorm_before(hidden_states).unflatten(1, input_dimensions)
        table = bias.relative_position_bias_table
        projections = (m.q_proj, m.k_proj, m.v_proj)
        out = m.o_proj(_attend(self, x, projections, m.num_attention_heads, table))
        hidden_states = hidden_states + self.drop_path(self.dropout(out))
        mlp = self.mlp(self.layernorm_after(hidden_states))
        return self.dropout(mlp) + hidden_states, None


class Swinv2Layer(v2.Swinv2Layer):
    """transformers' Swinv2Layer on cosine window attention."""

    def forward(self, hidden_states, input_dimensions, output_attentions=False):
        m, output = self.attention.self, self.attention.output
        dropping = self.training and m.dropout.p > 0
        if dropping or output_attentions or watched(self.attention, m, m.dropout):
            return super().forward(hidden_states, input_dimensions, output_attentions)
        heads = m.num_attention_heads
        table = m.continuous_position_bias_mlp(m.relative_coords_table).view(-1, heads)
        out = _attend(
            self,
            hidden_states.unflatten(1, input_dimensions),
            (m.query, m.key, m.value),
            heads,
            16 * torch.sigmoid(table),
            m.logit_scale.flatten(),
        )
        out = self.layernorm_before(output(out, hidden_states))
        hidden_states = hidden_states + self.drop_path(out)
        out = self.output(self.intermediate(hidden_states))
        return (hidden_states + self.drop_path(self.layernorm_after(out)),)


def _why_not_heads(head_dim: int) -> str | None:
    return nn.why_no_kernel("window_attention", "meta", torch.float32, head_dim)


def _plan_v1(module: Any) -> Replacement | str:
    m, exact = module.attention, {v1.SwinAttention}
    if type(m) not in exact or type(m.relative_position_bias) is not v1.SwinRelativePositionBias:
        return f"its attention is a {type(m).__name__}: it may compute something else"
    reason = why_not_implementation(m) or _why_not_heads(m.head_dim)
    if reason:
        return reason
    note = "transformers' own layer while attention dropout is active"
    covers = (m, m.relative_position_bias)
    changes = (swap_class(module, SwinLayer),)
    return Replacement("window_attention", changes, covers, note if m.attention_dropout else "")


def _plan_v2(module: Any) -> Replacement | str:
    m: Any = getattr(module.attention, "self", None)
    exact = {v2.Swinv2SelfAttention}
    if type(m) not in exact or type(module.attention) is not v2.Swinv2Attention:
        return f"its attention is a {type(m).__name__}: it may compute something else"
    reason = _why_not_heads(m.attention_head_size)
    if reason:
        return reason
    note = "transformers' own layer while attention dropout is active"
    covers = (module.attention, m)
    changes = (swap_class(module, Swinv2Layer),)
    return Replacement("window_attention", changes, covers, note if m.dropout.p else "")


RULES = [
    Rule(v1.SwinLayer, "window_attention", _plan_v1, _V1),
    Rule(v2.Swinv2Layer, "window_attention", _plan_v2, _V2),
]
