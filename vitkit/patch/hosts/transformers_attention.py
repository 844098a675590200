"""The rule for every attention module that asks transformers for its attention function: it gets a
config of its own that names vitkit's."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from vitkit.compat import transformers as compat
from vitkit.patch.rules import Change, Replacement, Rule

REGISTRY = "ALL_ATTENTION_FUNCTIONS"


def asks_the_registry(module: torch.nn.Module) -> bool:
    """Whether the forward of the module looks its attention function up by its config's name."""
    if not hasattr(module.__dict__.get("config"), "_attn_implementation"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and REGISTRY in code.co_names


def why_not_implementation(module: Any) -> str | None:
    """The reason that the attention function the module asks for is not one to stand in for."""
    current = module.config._attn_implementation
    if current == "sdpa":
        return None
    return (
        f"its attention implementation is {current!r}, which may return weights or take other"
        " masks: model.set_attn_implementation('sdpa') first"
    )


def _plan(module: Any) -> Replacement | str:
    reason = why_not_implementation(module)
    if reason:
        return reason
    compat.register()
    config = copy.copy(module.config)
    # Not by its property, which would set the configs of other modules too.
    config._attn_implementation_internal = compat.IMPLEMENTATION
    return Replacement(
        "flash_attention", (Change(module, "config", config),), note="sdpa while dropout is active"
    )


RULES = [Rule(torch.nn.Module, "flash_attention", _plan, applies=asks_the_registry)]
