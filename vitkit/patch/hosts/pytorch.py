"""Rules for torch's own modules, in whatever model they are."""

from __future__ import annotations

import torch

from vitkit import nn
from vitkit.patch.rules import Replacement, Rule, swap_class


def _group_norm(module: torch.nn.Module) -> Replacement:
    return Replacement("group_norm_silu (no activation)", (swap_class(module, nn.GroupNorm),))


def _gelu(module: torch.nn.GELU) -> Replacement:
    return Replacement(
        f"gelu ({'tanh' if module.approximate == 'tanh' else 'erf'})",
        (swap_class(module, nn.GELU),),
    )


def _layer_norm(module: torch.nn.LayerNorm) -> Replacement | str:
    if len(module.normalized_shape) != 1:
        return (
            f"it normalises over {len(module.normalized_shape)} dimensions, kernels over the last"
        )
    return Replacement("layer_norm_modulate (no modulation)", (swap_class(module, nn.LayerNorm),))


RULES = [
    Rule(torch.nn.GroupNorm, "group_norm_silu", _group_norm),
    Rule(torch.nn.GELU, "gelu", _gelu),
    Rule(torch.nn.LayerNorm, "layer_norm_modulate", _layer_norm),
]
