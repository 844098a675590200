"""vitkit: fused kernels for vision models, on GPUs and plain CPUs.

Ops are functions on tensors; ``patch`` swaps them into a model that exists, ``verify`` shows that
its numbers stay. Importing vitkit imports torch and nothing heavy: kernels, Triton and host
libraries load when they are first used.
"""

import importlib as _importlib
from types import ModuleType as _ModuleType

from vitkit._version import __version__
from vitkit.attention_map import attention_map
from vitkit.backends import explain
from vitkit.ops.dilated_attention import dilated_attention
from vitkit.ops.flash_attention import flash_attention
from vitkit.ops.gated_residual import gated_residual
from vitkit.ops.geglu import geglu
from vitkit.ops.gelu import gelu
from vitkit.ops.group_norm_silu import group_norm_silu
from vitkit.ops.layer_norm_modulate import layer_norm_modulate
from vitkit.ops.patch_embed import patch_embed
from vitkit.ops.patch_embed_packed import patch_embed_packed
from vitkit.ops.rope_2d import rope_2d
from vitkit.ops.swiglu import swiglu
from vitkit.ops.window_attention import window_attention
from vitkit.patch import is_patched, patch, patched, unpatch
from vitkit.score_bias import DecomposedBias, DistanceBias
from vitkit.sdpa import scaled_dot_product_attention
from vitkit.verify import verify

__all__ = [
    "DecomposedBias",
    "DistanceBias",
    "__version__",
    "attention_map",
    "dilated_attention",
    "explain",
    "flash_attention",
    "gated_residual",
    "geglu",
    "gelu",
    "group_norm_silu",
    "is_patched",
    "layer_norm_modulate",
    "patch",
    "patch_embed",
    "patch_embed_packed",
    "patched",
    "rope_2d",
    "scaled_dot_product_attention",
    "swiglu",
    "unpatch",
    "verify",
    "window_attention",
]


def __getattr__(name: str) -> _ModuleType:
    if name == "models":  # classes of twenty families, loaded when they are asked for
        return _importlib.import_module("vitkit.models")
    raise AttributeError(f"module 'vitkit' has no attribute {name!r}")
