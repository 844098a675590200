"""The other functions of ``xformers.ops`` that vision models import (DINOv2 and its kin)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitkit.ops.swiglu import swiglu


def unbind(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """``torch.unbind``."""
    return x.unbind(dim)


def index_select_cat(
    sources: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Chosen rows of each source, flattened and one after another."""
    rows = [s.index_select(0, i).flatten() for s, i in zip(sources, indices, strict=True)]
    return torch.cat(rows)


def scaled_index_add(
    input: torch.Tensor,
    index: torch.Tensor,
    source: torch.Tensor,
    scaling: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """``input`` with ``alpha * scaling * source`` added to the rows ``index`` (DINOv2's drop path).
    In place where no gradient is asked for, as xformers does."""
    if scaling is not None:
        source = source * scaling
    source = source.to(input.dtype)
    if torch.is_grad_enabled() and (input.requires_grad or source.requires_grad):
        return input.index_add(0, index, source, alpha=alpha)
    return input.index_add_(0, index, source, alpha=alpha)


class SwiGLU(torch.nn.Module):
    """``w3(silu(x1) * x2)``, x1 and x2 from one Linear ``w12`` or from ``w1`` and ``w2``;
    parameters are named as in xformers."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        _pack_weights: bool = True,
    ) -> None:
        super().__init__()
        self.w12: torch.nn.Linear | None = None
        if _pack_weights:
            self.w12 = torch.nn.Linear(in_features, 2 * hidden_features, bias=bias)
        else:
            self.w1 = torch.nn.Linear(in_features, hidden_features, bias=bias)
            self.w2 = torch.nn.Linear(in_features, hidden_features, bias=bias)
        self.w3 = torch.nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.hidden_features = hidden_features
        self.in_features = in_features
        self.out_features = out_features or in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.w12 is not None:
            return self.w3(swiglu(self.w12(x)))
        return self.w3(swiglu(self.w2(x), self.w1(x)))
