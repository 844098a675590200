"""Rules for transformers' vision models."""

from __future__ import annotations

from vitkit.patch.hosts.transformers_mlp import RULES as MLP_RULES

RULES = [*MLP_RULES]
