"""Attention in the parameter layout of ``torch.nn.MultiheadAttention``, batch first."""

from __future__ import annotations

from typing import Any

import torch

from vitkit.nn.attention import _head_dim
from vitkit.nn.functional import attend
from vitkit.nn.products import Linear, linear


class MultiheadAttention(torch.nn.Module):
    """Queries attend to a context: the parameters of ``torch.nn.MultiheadAttention``.

    Args:
        dim: width of the queries and of the output.
        num_heads: divides dim.
        context_dim: width of the context, dim if None.
        bias: whether the projections have a bias.

    Example:
        >>> import torch, vitkit.nn
        >>> pool = vitkit.nn.MultiheadAttention(64, 4, context_dim=96)
        >>> pool(torch.randn(2, 3, 64), torch.randn(2, 17, 96)).shape
        torch.Size([2, 3, 64])
    """

    def __init__(
        self, dim: int, num_heads: int, *, context_dim: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        _head_dim("MultiheadAttention", dim, num_heads)
        self.in_proj_weight: torch.nn.Parameter | None = None
        # torch keeps one matrix where all three projections have the same input width.
        if context_dim in (None, dim):
            self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * dim, dim))
            torch.nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            widths = {"q": dim, "k": context_dim, "v": context_dim}
            for name, width in widths.items():
                weight = torch.nn.Parameter(torch.empty(dim, width))  # type: ignore[arg-type]
                torch.nn.init.xavier_uniform_(weight)
                self.register_parameter(f"{name}_proj_weight", weight)
        self.in_proj_bias = torch.nn.Parameter(torch.zeros(3 * dim)) if bias else None
        self.out_proj = Linear(dim, dim, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, Nq, dim], context [B, Nk, context_dim] (x if None), mask as the bias of
        ``vitkit.flash_attention`` -> [B, Nq, dim]"""
        context = x if context is None else context
        return self.out_proj(attend_heads(self, x, context, context, mask))


def attend_heads(
    m: Any,  # anything with the parameters of torch.nn.MultiheadAttention
    query: torch.Tensor,  # [B, Nq, E]
    key: torch.Tensor,  # [B, Nk, Ek]
    value: torch.Tensor,  # [B, Nk, Ev]
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """What ``torch.nn.MultiheadAttention`` computes before its output projection: [B, Nq, E]"""
    if query is key and key is value and m.in_proj_weight is not None:
        qkv = linear(m, query, m.in_proj_weight, m.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, m.num_heads, -1)).unbind(2)
        return attend(m, q, k, v, mask, causal).flatten(2)
    if m.in_proj_weight is not None:
        weights = m.in_proj_weight.chunk(3)
    else:
        weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    q, k, v = (
        linear(m, t, w, b).unflatten(-1, (m.num_heads, -1))
        for t, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    return attend(m, q, k, v, mask, causal).flatten(2)
