"""Rules for the activations of diffusers' FeedForward, which project and activate."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import activations as host

from vitkit import nn
from vitkit.patch.rules import Replacement, Rule, swap_class, watched

# What the replacements repeat, in every version whose source they were compared with.
_SINCE_035 = "0.35 to 0.42"
_GEGLU = (
    (host.GEGLU.forward, {"52fb90877f": _SINCE_035}),
    (host.GEGLU.gelu, {"ac06b65a33": _SINCE_035}),
)
_SWIGLU = ((host.SwiGLU.forward, {"1444e45d2f": _SINCE_035}),)
_GELU = (
    (host.GELU.forward, {"92ee0d29db": _SINCE_035}),
    (host.GELU.gelu, {"83cd22bc2d": _SINCE_035}),
)


class GEGLU(host.GEGLU):
    """diffusers' GEGLU with value and gate multiplied in one pass."""

    def forward(self, hidden_states, *args, **kwargs):
        if args or kwargs:  # deprecated arguments: the host says so
            return super().forward(hidden_states, *args, **kwargs)
        return nn.geglu(self, self.proj(hidden_states))


class SwiGLU(host.SwiGLU):
    """diffusers' SwiGLU with value and gate multiplied in one pass."""

    def forward(self, hidden_states):
        if type(self.activation) is not torch.nn.SiLU or watched(self.activation):
            return super().forward(hidden_states)
        return nn.swiglu(self, self.proj(hidden_states), gate_last=True)


class GELU(host.GELU):
    """diffusers' GELU on vitkit's."""

    def gelu(self, gate):
        return nn.gelu(self, gate, self.approximate)


def _onto(twin: type, by: str):
    return lambda module: Replacement(by, (swap_class(module, twin),))


def _gelu(module: Any) -> Replacement:
    form = "tanh" if module.approximate == "tanh" else "erf"
    return Replacement(f"gelu ({form})", (swap_class(module, GELU),))


RULES = [
    Rule(host.GEGLU, "geglu", _onto(GEGLU, "geglu (erf)"), _GEGLU),
    Rule(host.SwiGLU, "swiglu", _onto(SwiGLU, "swiglu"), _SWIGLU),
    Rule(host.GELU, "gelu", _gelu, _GELU),
]
