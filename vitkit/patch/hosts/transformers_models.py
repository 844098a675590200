"""Rules for attention of transformers' models that never ask its registry: Perceiver, ViTDet and
the image encoders of Segment Anything."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.perceiver import modeling_perceiver as perceiver
from transformers.models.sam import modeling_sam as sam
from transformers.models.sam_hq import modeling_sam_hq as sam_hq
from transformers.models.vitdet import modeling_vitdet as vitdet

from vitkit import nn
from vitkit.patch.hosts.decomposed import decomposed_bias
from vitkit.patch.rules import Replacement, Rule, swap_class, watched

# What the replacements repeat, in every version whose code they were compared with.
_PERCEIVER = ((perceiver.PerceiverSelfAttention.forward, {"5f7da38d3c": "5.23"}),)
_VITDET = (
    (vitdet.VitDetAttention.forward, {"4b4a5365af": "5.23"}),
    (vitdet.add_decomposed_relative_positions, {"ef53eb41f3": "5.23"}),
)
_SAM = {"c5cf794686": "5.23"}
_SAM_POSITIONS = {"1ebde29a52": "5.23"}


class PerceiverSelfAttention(perceiver.PerceiverSelfAttention):
    """transformers' PerceiverSelfAttention, also its cross-attention, on flash attention."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        inputs=None,
        inputs_mask=None,
        output_attentions=False,
    ):
        dropping = self.training and self.dropout.p > 0
        if dropping or output_attentions or watched(self.dropout):
            return super().forward(
                hidden_states, attention_mask, inputs, inputs_mask, output_attentions
            )
        hidden_states = self.layernorm1(hidden_states)
        inputs = self.layernorm2(inputs)
        context, mask = (hidden_states, attention_mask) if inputs is None else (inputs, inputs_mask)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1))
            for projection, x in (
                (self.query, hidden_states), (self.key, context), (self.value, context),
            )
        )  # fmt: skip
        return (nn.attend(self, q, k, v, mask).flatten(2),)


def _on_map(m: Any, x: torch.Tensor, heads: int, positions: Any) -> torch.Tensor:
    """ViTDet's attention of the tokens x [B, H, W, C] of a map; ``positions`` takes the size of an
    axis and its table, None where there are none."""
    _, h, w, _ = x.shape
    q, k, v = m.qkv(x).flatten(1, 2).unflatten(-1, (3, heads, -1)).unbind(2)
    bias = None
    if positions is not None:
        bias = decomposed_bias(q, positions(h, h, m.rel_pos_h), positions(w, w, m.rel_pos_w))
    return m.proj(nn.attend(m, q, k, v, bias).flatten(2).unflatten(1, (h, w)))


class VitDetAttention(vitdet.VitDetAttention):
    """transformers' VitDetAttention on flash attention."""

    def forward(self, hidden_state, output_attentions=False):
        if output_attentions:
            return super().forward(hidden_state, output_attentions)
        positions = vitdet.get_rel_pos if self.use_relative_position_embeddings else None
        return (_on_map(self, hidden_state, self.num_heads, positions),)


class SamVisionSdpaAttention(sam.SamVisionSdpaAttention):
    """transformers' attention of SAM on flash attention."""

    def forward(self, hidden_states, output_attentions=False):
        if output_attentions:  # there are none: the host says so
            return super().forward(hidden_states, output_attentions)
        positions = self.get_rel_pos if self.use_rel_pos else None
        return _on_map(self, hidden_states, self.num_attention_heads, positions), None


class SamHQVisionSdpaAttention(sam_hq.SamHQVisionSdpaAttention):
    """transformers' attention of SAM-HQ on flash attention."""

    def forward(self, hidden_states, output_attentions=False):
        if output_attentions:
            return super().forward(hidden_states, output_attentions)
        positions = self.get_rel_pos if self.use_rel_pos else None
        return _on_map(self, hidden_states, self.num_attention_heads, positions), None


def _why_not(head_dim: int) -> str | None:
    return nn.why_no_kernel("flash_attention", "meta", torch.float32, head_dim)


def _perceiver(module: Any) -> Replacement | str:
    q, v = module.qk_channels_per_head, module.v_channels_per_head
    if q != v:
        return f"its values have another head dim than its queries: {v}, not {q}"
    reason = _why_not(q)
    if reason:
        return reason
    note = "transformers' own forward while dropout is active" if module.dropout.p else ""
    return Replacement("flash_attention", (swap_class(module, PerceiverSelfAttention),), note=note)


def _map_onto(twin: type):
    def plan(module: Any) -> Replacement | str:
        heads = module.num_heads if twin is VitDetAttention else module.num_attention_heads
        reason = _why_not(module.proj.in_features // heads)
        return reason or Replacement("flash_attention", (swap_class(module, twin),))

    return plan


def _eager(module: Any) -> str:
    return (
        "its attention implementation is 'eager', which returns weights: load the model with 'sdpa'"
    )


RULES = [
    Rule(perceiver.PerceiverSelfAttention, "flash_attention", _perceiver, _PERCEIVER),
    Rule(vitdet.VitDetAttention, "flash_attention", _map_onto(VitDetAttention), _VITDET),
    *(
        Rule(
            base,
            "flash_attention",
            _map_onto(twin),
            ((base.forward, _SAM), (base.get_rel_pos, _SAM_POSITIONS)),
        )
        for base, twin in (
            (sam.SamVisionSdpaAttention, SamVisionSdpaAttention),
            (sam_hq.SamHQVisionSdpaAttention, SamHQVisionSdpaAttention),
        )
    ),
    Rule(sam.SamVisionAttention, "flash_attention", _eager),
    Rule(sam_hq.SamHQVisionAttention, "flash_attention", _eager),
]
