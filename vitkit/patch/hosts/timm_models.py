"""Rules for the attention modules that timm's models bring themselves: BEiT, EVA, SAM (ViTDet) and
ViTs with relative positions."""

from __future__ import annotations

from typing import Any

import timm.models.beit as beit
import timm.models.eva as eva
import timm.models.vision_transformer_relpos as relpos
import timm.models.vision_transformer_sam as sam
import torch
from torch.nn.functional import linear

from vitkit import nn
from vitkit.patch.hosts.decomposed import decomposed_bias
from vitkit.patch.hosts.timm_attention import attend_rotated, is_table, needs_host, onto, rotated
from vitkit.patch.rules import Replacement, Rule, watched

# What the replacements repeat, in every version whose code they were compared with.
_BEIT = (
    (beit.Attention.forward, {"0a88de2347": "1.0.20 to 1.0.31"}),
    (beit.Attention._get_rel_pos_bias, {"88f411b008": "1.0.20 to 1.0.31"}),
)
_EVA = (
    (
        eva.EvaAttention.forward,
        {
            "6ff00f7263": "1.0.20 to 1.0.25",
            "4c181e2c92": "1.0.26, 1.0.27",
            "f437e08a6c": "1.0.28 to 1.0.31",
        },
    ),
)
_SAM = (
    (sam.Attention.forward, {"9dbba93cc6": "1.0.20 to 1.0.31"}),
    (sam.get_decomposed_rel_pos_bias, {"9398d66f54": "1.0.20 to 1.0.31"}),
)
_RELPOS = ((relpos.RelPosAttention.forward, {"9f475c0a45": "1.0.20 to 1.0.31"}),)


def _with_bias(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The fused projection of BEiT and EVA, whose keys have no bias: [B, N, H, D] of each."""
    if m.q_bias is None:
        qkv = m.qkv(x)
    else:
        bias = torch.cat((m.q_bias, m.k_bias, m.v_bias))
        separate = m.qkv_bias_separate
        qkv = m.qkv(x) + bias if separate else linear(x, m.qkv.weight, bias)
    return qkv.unflatten(-1, (3, m.num_heads, -1)).unbind(2)


class BeitAttention(beit.Attention):
    """timm's Attention of BEiT on flash attention."""

    def forward(self, x, shared_rel_pos_bias=None):
        if needs_host(self):
            return super().forward(x, shared_rel_pos_bias)
        q, k, v = _with_bias(self, x)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self.proj_drop(self.proj(nn.attend(self, q, k, v, bias).flatten(2)))


class EvaAttention(eva.EvaAttention):
    """timm's EvaAttention on rotary positions and flash attention."""

    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        turned = rope is None or is_table(rope, x.shape[1] - self.num_prefix_tokens)
        if needs_host(self, attn_mask, is_causal) or not turned:
            causal = {"is_causal": True} if is_causal else {}
            return super().forward(x, rope, attn_mask=attn_mask, **causal)
        if self.qkv is not None:
            q, k, v = _with_bias(self, x)
        else:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in projections)
        return attend_rotated(self, x, q, k, v, rope, attn_mask, is_causal)


class SamAttention(sam.Attention):
    """timm's Attention of SAM on flash attention: its relative positions stay two small tables."""

    def forward(self, x):
        if needs_host(self):
            return super().forward(x)
        _, h, w, _ = x.shape
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None
        if self.use_rel_pos:
            tables = sam.get_rel_pos(h, h, self.rel_pos_h), sam.get_rel_pos(w, w, self.rel_pos_w)
            bias = decomposed_bias(q, *tables)
        elif self.rope is not None:
            rope: Any = self.rope
            q, k = (t.type_as(v) for t in rotated(self, q, k, rope.get_embed()))
        out = nn.attend(self, q, k, v, bias).flatten(2).unflatten(1, (h, w))
        return self.proj_drop(self.proj(out))


class RelPosAttention(relpos.RelPosAttention):
    """timm's RelPosAttention on flash attention."""

    def forward(self, x, shared_rel_pos=None):
        # With positions of its own and shared ones, timm's two paths disagree.
        own: Any = self.rel_pos
        both = own is not None and shared_rel_pos is not None
        if both or needs_host(self) or watched(own):
            return super().forward(x, shared_rel_pos)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = shared_rel_pos if own is None else own.get_bias()
        return self.proj_drop(self.proj(nn.attend(self, q, k, v, bias).flatten(2)))


def _onto_biased(twin: type):
    plan = onto(twin)

    def plan_biased(module: Any) -> Replacement | str:
        qkv = module.qkv
        by_weight = module.q_bias is not None and not module.qkv_bias_separate
        if by_weight and type(qkv) is not torch.nn.Linear:
            return f"its qkv is a {type(qkv).__name__}, of which timm uses the weight only"
        return plan(module)

    return plan_biased


RULES = [
    Rule(beit.Attention, "flash_attention", _onto_biased(BeitAttention), _BEIT),
    Rule(eva.EvaAttention, "flash_attention", _onto_biased(EvaAttention), _EVA),
    Rule(sam.Attention, "flash_attention", onto(SamAttention), _SAM),
    Rule(relpos.RelPosAttention, "flash_attention", onto(RelPosAttention), _RELPOS),
]
