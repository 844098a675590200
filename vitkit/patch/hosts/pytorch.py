"""Rules for torch's own modules, in whatever model they are."""

from __future__ import annotations

import torch

from vitkit import nn
from vitkit.patch.rules import Replacement, Rule, swap_class


def _group_norm(module: torch.nn.Module) -> Replacement:
    return Replacement("group_norm_silu (no activation)", (swap_class(module, nn.GroupNorm),))


RULES = [Rule(torch.nn.GroupNorm, "group_norm_silu", _group_norm)]
