"""Rules for transformers' vision models."""

from __future__ import annotations

from vitkit.patch.hosts.transformers_attention import RULES as ATTENTION_RULES
from vitkit.patch.hosts.transformers_mlp import RULES as MLP_RULES
from vitkit.patch.hosts.transformers_patch import RULES as PATCH_RULES

RULES = [*MLP_RULES, *PATCH_RULES, *ATTENTION_RULES]
