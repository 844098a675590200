"""Thin modules over vitkit's ops. Parameters have the names and shapes of the modules they stand in
for, so that a state_dict loads either way."""

from vitkit.nn.attention import Attention, AttentionPoolLatent, attend
from vitkit.nn.norm import GroupNorm, GroupNormSiLU, group_norm_silu

__all__ = [
    "Attention",
    "AttentionPoolLatent",
    "GroupNorm",
    "GroupNormSiLU",
    "attend",
    "group_norm_silu",
]
