"""Rules for attention of text and image tokens in one sequence: SD3's processor and FLUX.

As with U-Nets, the processor stays and is looked at on every call. FLUX takes its attention from
diffusers' backends: one that was chosen (``set_attention_backend``, ``attention_backend``) runs.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatch
from diffusers.models import attention_processor as host
from diffusers.models.transformers import transformer_flux as flux

from vitkit import nn
from vitkit.nn.rope import rotate
from vitkit.patch.rules import Replacement, Rule, swap_class

# What the replacements repeat, in every version whose source they were compared with.
_SINCE_035 = "0.35 to 0.42"
SD3 = ((host.JointAttnProcessor2_0.__call__, {"fba949dd24": _SINCE_035}),)
_FLUX = (
    (flux.FluxAttention.forward, {"e1c6aaf4b1": _SINCE_035}),
    (
        flux.FluxAttnProcessor.__call__,
        {
            "85c78e1458": "0.35",
            "8411e58636": "0.36",
            "398ea976f3": "0.37 to 0.39",
            "44b5e28d17": "0.40 to 0.42",
        },
    ),
    (flux.apply_rotary_emb, {"ae44166f7e": _SINCE_035}),
)


def attend_jointly(m: Any, hidden_states: torch.Tensor, text: torch.Tensor | None) -> Any:
    """What JointAttnProcessor2_0 does for the Attention ``m``."""
    projections = [(m.to_q, m.norm_q), (m.to_k, m.norm_k), (m.to_v, None)]
    parts = [_heads(p, norm, hidden_states, m.heads) for p, norm in projections]
    images = hidden_states.shape[1]
    if text is not None:
        added = [
            (m.add_q_proj, m.norm_added_q), (m.add_k_proj, m.norm_added_k), (m.add_v_proj, None)
        ]  # fmt: skip
        texts = [_heads(p, norm, text, m.heads) for p, norm in added]
        parts = [torch.cat(pair, dim=1) for pair in zip(parts, texts, strict=True)]
    q, k, v = parts
    out = nn.attend(m, q, k, v).flatten(2).to(q.dtype)
    if text is None:
        return m.to_out[1](m.to_out[0](out))
    out, text = out[:, :images], out[:, images:]
    if not m.context_pre_only:
        text = m.to_add_out(text)
    return m.to_out[1](m.to_out[0](out)), text


def _heads(projection: Any, norm: Any, x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, H, D]"""
    x = projection(x).unflatten(-1, (heads, -1))
    return x if norm is None else norm(x)


def _asks_another(processor: Any) -> bool:
    """Whether a backend of diffusers other than torch's own function was chosen."""
    native = dispatch.AttentionBackendName.NATIVE
    chosen = processor._attention_backend
    if chosen is None:
        chosen = dispatch._AttentionBackendRegistry.get_active_backend()[0]
    return chosen != native or getattr(processor, "_parallel_config", None) is not None


class FluxAttention(flux.FluxAttention):
    """diffusers' FluxAttention with FluxAttnProcessor, on rotary positions and flash attention."""

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
        **kwargs,
    ):
        exact = type(self.processor) is flux.FluxAttnProcessor
        # Without text a module that was made for it has projections to spare: the host's affair.
        alone = self.added_kv_proj_dim is not None and encoder_hidden_states is None
        if not exact or kwargs or alone or _asks_another(self.processor):
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
        text = encoder_hidden_states
        # By head_dim: of a module that is split over devices fewer heads are here.
        found = flux._get_qkv_projections(self, hidden_states, text)
        parts = [t.unflatten(-1, (-1, self.head_dim)) for t in found[:3]]
        parts[:2] = self.norm_q(parts[0]), self.norm_k(parts[1])
        if self.added_kv_proj_dim is not None:
            added = [t.unflatten(-1, (-1, self.head_dim)) for t in found[3:]]
            added[:2] = self.norm_added_q(added[0]), self.norm_added_k(added[1])
            parts = [torch.cat(pair, dim=1) for pair in zip(added, parts, strict=True)]
        q, k, v = parts
        if image_rotary_emb is not None:
            cos, sin = (t.to(q.device) for t in image_rotary_emb)
            q, k = rotate(self, q, k, cos, sin, "interleaved")
        out = nn.attend(self, q, k, v, attention_mask).flatten(2).to(q.dtype)
        if text is None:
            return out
        text, out = out.split([text.shape[1], out.shape[1] - text.shape[1]], dim=1)
        return self.to_out[1](self.to_out[0](out)), self.to_add_out(text)


def _flux(module: Any) -> Replacement | str:
    if type(module.processor) is not flux.FluxAttnProcessor:
        return f"its processor is {type(module.processor).__name__}"
    if _asks_another(module.processor):
        return "an attention backend of diffusers other than 'native' was chosen for it"
    reason = nn.why_no_kernel("flash_attention", "meta", torch.float32, module.head_dim)
    return reason or Replacement("rope_2d, flash_attention", (swap_class(module, FluxAttention),))


RULES = [Rule(flux.FluxAttention, "flash_attention", _flux, _FLUX)]
