"""Rules for transformers' vision models."""

from __future__ import annotations

from vitkit.patch.hosts.transformers_attention import RULES as ATTENTION_RULES
from vitkit.patch.hosts.transformers_mlp import RULES as MLP_RULES
from vitkit.patch.hosts.transformers_models import RULES as MODEL_RULES
from vitkit.patch.hosts.transformers_patch import RULES as PATCH_RULES
from vitkit.patch.hosts.transformers_swin import RULES as SWIN_RULES

# The rule of the registry comes last: it is for every module that no other rule is for.
RULES = [*MLP_RULES, *PATCH_RULES, *SWIN_RULES, *MODEL_RULES, *ATTENTION_RULES]
