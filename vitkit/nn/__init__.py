"""Thin modules over vitkit's ops.

Parameters have the names and shapes of the modules they stand in for, so a state_dict loads either
way. ``attend``, ``group_norm_silu`` and ``layer_norm`` are what a module's forward calls: the op
where one of its kernels can run, torch's own functions where none can.
"""

from vitkit.nn.attention import Attention, AttentionPoolLatent
from vitkit.nn.convolution import Conv1d, Conv2d, Conv3d
from vitkit.nn.dilated import DilatedAttention
from vitkit.nn.functional import attend, group_norm_silu, layer_norm, patch_embed, why_no_kernel
from vitkit.nn.mlp import GEGLU, GELU, Mlp, SwiGLU, SwiGLUPacked, geglu, gelu, project_gelu, swiglu
from vitkit.nn.multihead import MultiheadAttention
from vitkit.nn.norm import AdaLayerNorm, GroupNorm, GroupNormSiLU, LayerNorm
from vitkit.nn.patch import PatchEmbed
from vitkit.nn.products import Linear
from vitkit.nn.residual import LayerScale, gated_residual
from vitkit.nn.rope import RotaryEmbedding2d, rotate
from vitkit.nn.window import WindowAttention, WindowAttentionV2, attend_windows
from vitkit.score_bias import DecomposedBias, DistanceBias

__all__ = [
    "GEGLU",
    "GELU",
    "AdaLayerNorm",
    "Attention",
    "AttentionPoolLatent",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "DecomposedBias",
    "DilatedAttention",
    "DistanceBias",
    "GroupNorm",
    "GroupNormSiLU",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Mlp",
    "MultiheadAttention",
    "PatchEmbed",
    "RotaryEmbedding2d",
    "SwiGLU",
    "SwiGLUPacked",
    "WindowAttention",
    "WindowAttentionV2",
    "attend",
    "attend_windows",
    "gated_residual",
    "geglu",
    "gelu",
    "group_norm_silu",
    "layer_norm",
    "patch_embed",
    "project_gelu",
    "rotate",
    "swiglu",
    "why_no_kernel",
]
