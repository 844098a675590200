"""Rules for timm's LayerNorms, of tokens and of channels-first maps."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch

from vitkit import nn
from vitkit.patch.rules import Replacement, Rule, swap_class

# What the replacements repeat, in every version whose forward they were compared with.
_LAYER_NORM = {"cc148669b0": "1.0.20 to 1.0.31"}
_LAYER_NORM_2D = {"f13057a657": "1.0.20 to 1.0.31"}
_LAYER_NORM_FP32 = {"5195b685f8": "1.0.20 to 1.0.31"}


class LayerNorm(timm.layers.LayerNorm):
    """timm's LayerNorm on vitkit's kernels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.layer_norm(self, x)


class LayerNorm2d(timm.layers.LayerNorm2d):
    """timm's LayerNorm of [B, C, H, W] on vitkit's kernels; the result has channels last, as
    timm's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.layer_norm(self, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNormFp32(timm.layers.LayerNormFp32):
    """timm's LayerNorm in float32 on vitkit's kernels, which compute in float32 anyway."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.layer_norm(self, x).to(x.dtype)


def _onto(twin: type):
    def plan(module: Any) -> Replacement | str:
        if len(module.normalized_shape) != 1:
            dimensions = len(module.normalized_shape)
            return f"it normalises over {dimensions} dimensions, kernels over the last"
        if getattr(module, "_fast_norm", False):
            return "its fast norm is on, which lowers the precision under autocast"
        return Replacement("layer_norm_modulate (no modulation)", (swap_class(module, twin),))

    return plan


RULES = [
    Rule(host, "layer_norm_modulate", _onto(twin), ((host.forward, known),))
    for host, twin, known in (
        (timm.layers.LayerNorm, LayerNorm, _LAYER_NORM),
        (timm.layers.LayerNorm2d, LayerNorm2d, _LAYER_NORM_2D),
        (timm.layers.LayerNormFp32, LayerNormFp32, _LAYER_NORM_FP32),
    )
]
