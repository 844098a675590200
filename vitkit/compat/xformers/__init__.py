"""``xformers.ops`` on vitkit's kernels: the same names and mask classes, on GPUs and plain CPUs.

    from vitkit.compat.xformers import memory_efficient_attention, fmha, unbind

or, for code that imports xformers itself and a machine without it, :func:`install`.
"""

from __future__ import annotations

from vitkit.compat.xformers import fmha
from vitkit.compat.xformers.extras import SwiGLU, index_select_cat, scaled_index_add, unbind
from vitkit.compat.xformers.fmha import (
    memory_efficient_attention,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
)
from vitkit.compat.xformers.fmha.attn_bias import (
    AttentionBias,
    BlockDiagonalMask,
    LowerTriangularMask,
)
from vitkit.compat.xformers.install import install, uninstall

__all__ = [
    "AttentionBias",
    "BlockDiagonalMask",
    "LowerTriangularMask",
    "SwiGLU",
    "fmha",
    "index_select_cat",
    "install",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "scaled_index_add",
    "unbind",
    "uninstall",
]
