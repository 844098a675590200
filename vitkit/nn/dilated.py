"""LongNet's attention module in torchscale's parameter layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vitkit.nn.attention import _head_dim
from vitkit.nn.norm import LayerNorm
from vitkit.nn.products import Linear
from vitkit.ops import dilated_attention as _op


class DilatedAttention(torch.nn.Module):
    """Multi-head dilated self-attention: the parameters of torchscale's DilatedAttention, which
    Prov-GigaPath's slide encoder is made of.

    Args:
        dim: width of the tokens.
        num_heads: divides dim.
        segment_lengths, dilation_ratios: one each per branch.
        subln: LayerNorm (``inner_attn_ln``) before the output projection, as GigaPath has it.
        causal, alignment: see ``vitkit.dilated_attention``.
        eps: of that LayerNorm.

    Example:
        >>> import torch, vitkit.nn
        >>> m = vitkit.nn.DilatedAttention(96, 4, segment_lengths=[16, 64], dilation_ratios=[1, 2])
        >>> m(torch.randn(2, 100, 96)).shape
        torch.Size([2, 100, 96])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        segment_lengths: Sequence[int],
        dilation_ratios: Sequence[int],
        subln: bool = True,
        causal: bool = False,
        alignment: str = "segment",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _head_dim("DilatedAttention", dim, num_heads)
        self.num_heads = num_heads
        self.segment_lengths, self.dilation_ratios = list(segment_lengths), list(dilation_ratios)
        self.causal, self.alignment = causal, alignment
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.inner_attn_ln = LayerNorm(dim, eps=eps) if subln else None
        self.out_proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, norm: torch.nn.Module | None = None) -> torch.Tensor:
        """x [B, N, dim] -> [B, N, dim], of norm(x) if there is one. Nothing outlives its use: of
        long sequences every tensor counts."""
        out = self.attend(*self._project(x if norm is None else norm(x))).flatten(2)
        if self.inner_attn_ln is not None:
            out = self.inner_attn_ln(out)
        return self.out_proj(out)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(proj(x).unflatten(-1, (self.num_heads, -1)) for proj in projections)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The attention itself, of [B, N, H, D]."""
        out = _op.dilated_attention(
            q,
            k,
            v,
            segment_lengths=self.segment_lengths,
            dilation_ratios=self.dilation_ratios,
            causal=self.causal,
            alignment=self.alignment,
            backend=getattr(self, "vitkit_backend", "auto"),
        )
        assert isinstance(out, torch.Tensor)
        return out
