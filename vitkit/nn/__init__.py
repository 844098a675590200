"""Thin modules over vitkit's ops.

Parameters have the names and shapes of the modules they stand in for, so a state_dict loads either
way. ``attend`` and ``group_norm_silu`` are what a module's forward calls: the op where one of its
kernels can run, torch's own functions where none can.
"""

from vitkit.nn.attention import Attention, AttentionPoolLatent
from vitkit.nn.dilated import DilatedAttention
from vitkit.nn.functional import attend, group_norm_silu, patch_embed, why_no_kernel
from vitkit.nn.norm import GroupNorm, GroupNormSiLU
from vitkit.nn.patch import PatchEmbed
from vitkit.nn.window import WindowAttention, WindowAttentionV2, attend_windows

__all__ = [
    "Attention",
    "AttentionPoolLatent",
    "DilatedAttention",
    "GroupNorm",
    "GroupNormSiLU",
    "PatchEmbed",
    "WindowAttention",
    "WindowAttentionV2",
    "attend",
    "attend_windows",
    "group_norm_silu",
    "patch_embed",
    "why_no_kernel",
]
