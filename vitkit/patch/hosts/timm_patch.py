"""Rule for timm's PatchEmbed: projection, transpose and norm in one pass."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm.layers.format import Format

from vitkit import nn
from vitkit.patch.patches import must_call_host, onto
from vitkit.patch.rules import Rule

_FORWARD = {"6c8e9707e9": "1.0.20 to 1.0.31"}
_FUSED_NORMS = {torch.nn.LayerNorm, timm.layers.LayerNorm}


class PatchEmbed(timm.layers.PatchEmbed):
    """timm's PatchEmbed on vitkit.patch_embed."""

    def forward(self, x):
        pad = self.dynamic_img_pad
        tokens_out = self.flatten or self.output_fmt in (Format.NLC, Format.NHWC)
        expected = self.img_size is None or not self.strict_img_size
        expected = expected or tuple(x.shape[2:]) == tuple(self.img_size)
        if not (expected and tokens_out) or must_call_host(x, self.proj, pad, self.norm):
            return super().forward(x)
        norm: Any = self.norm if type(self.norm) in _FUSED_NORMS else None
        tokens = nn.patch_embed(self, x, self.proj, norm, pad=pad)
        if not self.flatten and self.output_fmt == Format.NHWC:
            tokens = tokens.unflatten(1, self.dynamic_feat_size(x.shape[2:]))
        return tokens if norm is not None else self.norm(tokens)


_plan = onto(PatchEmbed, "proj", "norm")


def _patch_embed(module):
    if not module.flatten and module.output_fmt not in (Format.NLC, Format.NHWC):
        return f"its output is {module.output_fmt.value}, not tokens"
    return _plan(module)


RULES = [
    Rule(
        timm.layers.PatchEmbed,
        "patch_embed",
        _patch_embed,
        ((timm.layers.PatchEmbed.forward, _FORWARD),),
    )
]
