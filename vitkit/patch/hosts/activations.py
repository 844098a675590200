"""What the rules for MLPs of several hosts share: which activation a module is, and what takes its
place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import gelu

from vitkit import nn
from vitkit.nn import products
from vitkit.patch.rules import Replacement, swap_class

# Class names of activations -> what they compute. Names, because each host brings its own classes;
# a class of another library with such a name is not trusted.
_TRUSTED = ("torch", "timm", "transformers", "diffusers", "vitkit")
_KINDS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Swish": "silu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
}

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def kind_of(activation: Any) -> str | None:
    """ "silu", "gelu" or "gelu_tanh"; None for every other activation."""
    cls = type(activation)
    if cls.__module__.split(".")[0] not in _TRUSTED:
        return None
    if cls.__name__ in ("GELUActivation", "GELUTanh") and hasattr(activation, "act"):
        return function_kind(activation.act)
    if isinstance(activation, torch.nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _KINDS.get(cls.__name__)


def function_kind(function: Any) -> str | None:
    """Of torch's gelu, or a partial of it that chooses the approximation."""
    if function is gelu:
        return "gelu"
    options = getattr(function, "keywords", None)
    if getattr(function, "func", None) is gelu and options == {"approximate": "tanh"}:
        return "gelu_tanh"
    return None


def gated(
    module: torch.nn.Module,
    kind: str,
    x: torch.Tensor,
    gate: torch.Tensor | None = None,
    gate_last: bool = False,
) -> torch.Tensor:
    """value * activation(gate) on vitkit's kernels."""
    if kind == "silu":
        return nn.swiglu(module, x, gate, gate_last=gate_last)
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    return nn.geglu(module, x, gate, gate_last=gate_last, approximate=approximate)


def op_of(kind: str) -> str:
    """What the report says."""
    return {"silu": "swiglu", "gelu": "geglu (erf)", "gelu_tanh": "geglu (tanh)"}[kind]


def plan_mlp(twin: type, act: str) -> Callable[[Any], Replacement | None]:
    """Plans an MLP whose first projection is ``fc1`` and whose activation ``act``: of no concern
    unless there is a kernel for both. Projections and activation have rules of their own."""

    def plan(module: Any) -> Replacement | None:
        linear = type(module.fc1) in (torch.nn.Linear, products.Linear)
        if not linear or kind_of(getattr(module, act)) not in APPROXIMATE:
            return None
        if not products.has_kernel(module.fc1.weight.dtype, module.fc1.weight.device.type):
            return None
        return Replacement("linear + gelu", (swap_class(module, twin),))

    return plan
