"""Rules for timm's MLPs, gated and not, and its own activation classes."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm.layers.activations import GELU as TimmGELU
from timm.layers.activations import GELUTanh as TimmGELUTanh

from vitkit import nn
from vitkit.nn import products
from vitkit.patch.hosts.activations import APPROXIMATE, gated, kind_of, op_of, plan_mlp
from vitkit.patch.rules import Replacement, Rule, swap_class, watched

# What the replacements repeat, in every version whose forward they were compared with.
_GLU_MLP = {"7e8341286f": "1.0.20 to 1.0.31"}
_SWIGLU = {"710397ab48": "1.0.20 to 1.0.31"}
_GELU = {"b8f068935a": "1.0.20 to 1.0.31"}
_GELU_TANH = {"6df304faa1": "1.0.20 to 1.0.31"}
_MLP = {"b2342481f8": "1.0.20 to 1.0.31"}


class Mlp(timm.layers.Mlp):
    """timm's Mlp with the first projection and GELU in one pass."""

    def forward(self, x):
        kind = kind_of(self.act)
        if kind not in APPROXIMATE:
            return super().forward(x)
        x = products.linear_gelu(self.fc1, self.act, x, APPROXIMATE[kind])
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class GluMlp(timm.layers.GluMlp):
    """timm's GluMlp (SwiGLUPacked) with value and gate multiplied in one pass."""

    def forward(self, x):
        kind = kind_of(self.act)
        if kind is None or self.chunk_dim != -1 or watched(self.act):
            return super().forward(x)
        x = gated(self, kind, self.fc1(x), gate_last=self.gate_last)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class SwiGLU(timm.layers.SwiGLU):
    """timm's SwiGLU with value and gate multiplied in one pass."""

    def forward(self, x):
        kind = kind_of(self.act)
        if kind is None or watched(self.act):
            return super().forward(x)
        x = gated(self, kind, self.fc1_x(x), self.fc1_g(x))
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class GELU(TimmGELU):
    """timm's GELU on vitkit's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.gelu(self, input)


class GELUTanh(TimmGELUTanh):
    """timm's GELUTanh on vitkit's gelu."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.gelu(self, input, "tanh")


def _gated_onto(twin: type):
    def plan(module: Any) -> Replacement | str:
        kind = kind_of(module.act)
        if kind is None:
            return f"its act is {type(module.act).__name__}, neither SiLU nor GELU"
        if getattr(module, "chunk_dim", -1) != -1:
            return "it is convolutional: value and gate are channels of a map"
        return Replacement(op_of(kind), (swap_class(module, twin),), (module.act,))

    return plan


def _onto(twin: type, form: str):
    return lambda module: Replacement(f"gelu ({form})", (swap_class(module, twin),))


RULES = [
    Rule(timm.layers.Mlp, None, plan_mlp(Mlp, "act"), ((timm.layers.Mlp.forward, _MLP),)),
    Rule(
        timm.layers.GluMlp, "swiglu", _gated_onto(GluMlp), ((timm.layers.GluMlp.forward, _GLU_MLP),)
    ),
    Rule(
        timm.layers.SwiGLU, "swiglu", _gated_onto(SwiGLU), ((timm.layers.SwiGLU.forward, _SWIGLU),)
    ),
    Rule(TimmGELU, "gelu", _onto(GELU, "erf"), ((TimmGELU.forward, _GELU),)),
    Rule(TimmGELUTanh, "gelu", _onto(GELUTanh, "tanh"), ((TimmGELUTanh.forward, _GELU_TANH),)),
]
