"""Rules for transformers' MLPs of ViT, SigLIP and DINOv2, the gated ones of DINOv2 and DINOv3, and
its GELU classes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import activations as host
from transformers.models.dinov2.modeling_dinov2 import Dinov2MLP, Dinov2SwiGLUFFN
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersSwiGLUFFN,
)
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTGatedMLP
from transformers.models.siglip.modeling_siglip import SiglipMLP
from transformers.models.vit.modeling_vit import ViTMLP

from vitkit import nn
from vitkit.nn import products
from vitkit.patch.hosts.activations import (
    APPROXIMATE,
    function_kind,
    gated,
    kind_of,
    op_of,
    plan_mlp,
)
from vitkit.patch.rules import Replacement, Rule, swap_class, watched

# What the replacements repeat, in every version whose forward they were compared with.
_GATED = {"e8f8bc7e96": "5.23"}
_MLP = {"23ebccf6d8": "5.23"}
_GELU = {"2a3d2362d6": "5.23"}


def _gated_forward(m: Any, x: torch.Tensor, original: Any) -> torch.Tensor:
    kind = kind_of(m.act_fn)
    if kind is None or watched(m.act_fn):
        return original(x)
    return m.down_proj(gated(m, kind, m.up_proj(x), m.gate_proj(x)))


def _mlp_forward(m: Any, x: torch.Tensor, original: Any) -> torch.Tensor:
    kind = kind_of(m.activation_fn)
    if kind not in APPROXIMATE:
        return original(x)
    return m.fc2(products.linear_gelu(m.fc1, m.activation_fn, x, APPROXIMATE[kind]))


class OfViT(ViTMLP):
    """The MLP of ViT with the first projection and GELU in one pass."""

    def forward(self, hidden_states):
        return _mlp_forward(self, hidden_states, super().forward)


class OfSiglip(SiglipMLP):
    """The same, of SigLIP."""

    def forward(self, hidden_states):
        return _mlp_forward(self, hidden_states, super().forward)


class OfDinov2(Dinov2MLP):
    """The same, of DINOv2."""

    def forward(self, hidden_states):
        return _mlp_forward(self, hidden_states, super().forward)


class SwiGLUFFN(Dinov2SwiGLUFFN):
    """DINOv2's gated MLP with value and gate multiplied in one pass."""

    def forward(self, x):
        return _gated_forward(self, x, super().forward)


class WithRegistersSwiGLUFFN(Dinov2WithRegistersSwiGLUFFN):
    """The same, of DINOv2 with registers."""

    def forward(self, x):
        return _gated_forward(self, x, super().forward)


class GatedMLP(DINOv3ViTGatedMLP):
    """The same, of DINOv3."""

    def forward(self, x):
        return _gated_forward(self, x, super().forward)


class GELUActivation(host.GELUActivation):
    """transformers' GELUActivation on vitkit's gelu."""

    def forward(self, input):
        return nn.gelu(self, input)


class GELUTanh(host.GELUTanh):
    """transformers' GELUTanh on vitkit's gelu."""

    def forward(self, input):
        return nn.gelu(self, input, "tanh")


def _gated_onto(twin: type):
    def plan(module: Any) -> Replacement | str:
        kind = kind_of(module.act_fn)
        if kind is None:
            return f"its act_fn is {type(module.act_fn).__name__}, neither SiLU nor GELU"
        return Replacement(op_of(kind), (swap_class(module, twin),), (module.act_fn,))

    return plan


def _gelu_onto(twin: type, kind: str):
    def plan(module: Any) -> Replacement | str:
        if function_kind(module.act) != kind:
            return "it spells GELU out in Python"
        form = "tanh" if kind == "gelu_tanh" else "erf"
        return Replacement(f"gelu ({form})", (swap_class(module, twin),))

    return plan


RULES = [
    *(
        Rule(cls, None, plan_mlp(twin, "activation_fn"), ((cls.forward, _MLP),))
        for cls, twin in ((ViTMLP, OfViT), (SiglipMLP, OfSiglip), (Dinov2MLP, OfDinov2))
    ),
    *(
        Rule(cls, "swiglu", _gated_onto(twin), ((cls.forward, _GATED),))
        for cls, twin in (
            (Dinov2SwiGLUFFN, SwiGLUFFN),
            (Dinov2WithRegistersSwiGLUFFN, WithRegistersSwiGLUFFN),
            (DINOv3ViTGatedMLP, GatedMLP),
        )
    ),
    Rule(
        host.GELUActivation,
        "gelu",
        _gelu_onto(GELUActivation, "gelu"),
        ((host.GELUActivation.forward, _GELU),),
    ),
    Rule(
        host.GELUTanh,
        "gelu",
        _gelu_onto(GELUTanh, "gelu_tanh"),
        ((host.GELUTanh.forward, _GELU),),
    ),
]
