"""Rules for diffusers' adaptive LayerNorms: DiT, SD3, FLUX, CogVideoX and what is built like them.

The projection of the condition stays the host's; the norm it owns and the modulation become one
call. Where that would not be the host's computation (hooks on the norm, an embedding that widens
the result) the norm is called and modulated as the host does.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import normalization as host

from vitkit import nn
from vitkit.patch.rules import Replacement, Rule, swap_class, watched

# What the replacements repeat, in every version whose source they were compared with.
_VERSIONS = "0.35 to 0.42"
_KNOWN: dict[str, dict[str, str]] = {
    "AdaLayerNorm": {"b34ea5fdbd": _VERSIONS},
    "AdaLayerNormContinuous": {"5bae7d8a7d": _VERSIONS},
    "AdaLayerNormZero": {"9d6a5793c7": _VERSIONS},
    "AdaLayerNormZeroSingle": {"e639a23644": _VERSIONS},
    "CogVideoXLayerNormZero": {"25f4819e6a": _VERSIONS},
    "FP32LayerNorm": {"5eafb9b8a0": _VERSIONS},
    "SD35AdaLayerNormZeroX": {"04beff4a68": _VERSIONS},
}
NORMS = (torch.nn.LayerNorm, host.FP32LayerNorm)


def modulate(
    norm: Any,
    x: torch.Tensor,  # [B, N, E]
    shift: torch.Tensor,  # [B, E]
    scale: torch.Tensor,
) -> torch.Tensor:
    """norm(x) * (1 + scale) + shift, in one pass where that is what the host computes."""
    widens = torch.promote_types(x.dtype, scale.dtype) != x.dtype
    # FP32LayerNorm returns the dtype of its input, also where autocast would widen it.
    narrows = type(norm) is host.FP32LayerNorm and torch.is_autocast_enabled(x.device.type)
    if x.dim() == 3 and len(scale) == len(x) and not (widens or narrows or watched(norm)):
        return nn.layer_norm(norm, x, shift=shift, scale=scale)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


class AdaLayerNorm(host.AdaLayerNorm):
    """AdaLayerNorm of CogVideoX and OmniGen: ``chunk_dim`` 1."""

    def forward(self, x, timestep=None, temb=None):
        if self.emb is not None:
            temb = self.emb(timestep)
        shift, scale = self.linear(self.silu(temb)).chunk(2, dim=1)
        return modulate(self.norm, x, shift, scale)


class AdaLayerNormZero(host.AdaLayerNormZero):
    """AdaLayerNormZero of DiT, SD3 and FLUX."""

    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return modulate(self.norm, x, shift, scale), *rest


class AdaLayerNormZeroSingle(host.AdaLayerNormZeroSingle):
    """AdaLayerNormZeroSingle of FLUX."""

    def forward(self, x, emb=None):
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return modulate(self.norm, x, shift, scale), gate


class AdaLayerNormContinuous(host.AdaLayerNormContinuous):
    """AdaLayerNormContinuous of SD3 and FLUX: scale comes first."""

    def forward(self, x, conditioning_embedding):
        emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        scale, shift = torch.chunk(emb, 2, dim=1)
        return modulate(self.norm, x, shift, scale)


class SD35AdaLayerNormZeroX(host.SD35AdaLayerNormZeroX):
    """SD35AdaLayerNormZeroX: two modulations of one norm, each its own pass."""

    def forward(self, hidden_states, emb=None):
        shift, scale, *rest, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        second = modulate(self.norm, hidden_states, shift2, scale2)
        return modulate(self.norm, hidden_states, shift, scale), *rest, second, gate2


class CogVideoXLayerNormZero(host.CogVideoXLayerNormZero):
    """CogVideoXLayerNormZero: one norm of tokens and of text."""

    def forward(self, hidden_states, encoder_hidden_states, temb):
        parts = self.linear(self.silu(temb)).chunk(6, dim=1)
        shift, scale, gate, text_shift, text_scale, text_gate = parts
        hidden_states = modulate(self.norm, hidden_states, shift, scale)
        text = modulate(self.norm, encoder_hidden_states, text_shift, text_scale)
        return hidden_states, text, gate[:, None, :], text_gate[:, None, :]


class FP32LayerNorm(host.FP32LayerNorm):
    """FP32LayerNorm on vitkit's kernels, which compute in float32 anyway."""

    def forward(self, inputs):
        return nn.layer_norm(self, inputs).to(inputs.dtype)


def _onto(twin: type):
    def plan(module: Any) -> Replacement | str:
        norm = module.norm
        if type(norm) not in NORMS:
            return f"its norm is a {type(norm).__name__}, not a LayerNorm"
        if getattr(module, "chunk_dim", 1) != 1:
            return "its chunk_dim is 0: one modulation for all samples"
        if watched(norm):
            return "its norm has hooks, which a fused call would not run"
        by = "layer_norm_modulate (norm, shift, scale)"
        return Replacement(by, (swap_class(module, twin),), (norm,))

    return plan


def _plain(module: Any) -> Replacement | str:
    if len(module.normalized_shape) != 1:
        return (
            f"it normalises over {len(module.normalized_shape)} dimensions, kernels over the last"
        )
    by = "layer_norm_modulate (no modulation)"
    return Replacement(by, (swap_class(module, FP32LayerNorm),))


def _rule(twin: type, plan: Any) -> Rule:
    original = twin.__mro__[1]
    repeats = ((original.forward, _KNOWN[twin.__name__]),)  # type: ignore[attr-defined]
    return Rule(original, "layer_norm_modulate", plan, repeats)


ADAPTIVE = (
    AdaLayerNorm,
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    CogVideoXLayerNormZero,
    SD35AdaLayerNormZeroX,
)
RULES = [*(_rule(twin, _onto(twin)) for twin in ADAPTIVE), _rule(FP32LayerNorm, _plain)]
