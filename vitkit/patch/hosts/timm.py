"""Rules for timm."""

from __future__ import annotations

from vitkit.patch.hosts.timm_attention import RULES as ATTENTION_RULES
from vitkit.patch.hosts.timm_mlp import RULES as MLP_RULES
from vitkit.patch.hosts.timm_models import RULES as MODEL_RULES
from vitkit.patch.hosts.timm_norms import RULES as NORM_RULES
from vitkit.patch.hosts.timm_patch import RULES as PATCH_RULES
from vitkit.patch.hosts.timm_pool import RULES as POOL_RULES
from vitkit.patch.hosts.timm_swin import RULES as SWIN_RULES

RULES = [
    *ATTENTION_RULES,
    *MODEL_RULES,
    *POOL_RULES,
    *SWIN_RULES,
    *MLP_RULES,
    *NORM_RULES,
    *PATCH_RULES,
]
