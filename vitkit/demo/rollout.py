"""Attention rollout of a patched model, without any attention matrix.

Rollout (Abnar and Zuidema 2020) multiplies the layers' attention matrices, averaged over heads and
mixed half and half with the identity for the residual. One of its rows needs ``r A`` for a row r
and every layer's A, and that is a gradient flash attention computes already: with ``out = A v``,
the gradient of v for the output gradient r is ``A^T r``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vitkit


class AttentionCall(NamedTuple):
    """What one call of ``vitkit.flash_attention`` attended; arguments of ``attention_map``."""

    q: torch.Tensor  # [B, Nq, H, D]
    k: torch.Tensor  # [B, Nk, H, D]
    bias: torch.Tensor | None
    causal: bool
    scale: float


class AttentionCalls(TorchDispatchMode):
    """Keeps, while entered, the queries and keys of every call of ``vitkit.flash_attention`` with
    a dense bias or none, in ``calls``; those of a patched model are the model's layers in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitkit" and func._schema.name == "vitkit::flash_attention_fwd":
            q, k, _, bias, cu_seqlens_q, _, causal, scale = args
            if cu_seqlens_q is None:
                bias = None if bias is None else bias.detach()
                self.calls.append(AttentionCall(q.detach(), k.detach(), bias, causal, scale))
        return func(*args, **(kwargs or {}))


def weigh(call: AttentionCall, r: torch.Tensor) -> torch.Tensor:
    """``r A``, A averaged over heads: [B, Nq] -> [B, Nk] in float32."""
    q, k = call.q.float(), call.k.float()
    bias = call.bias
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.float()
    v = torch.zeros_like(k, requires_grad=True)
    with torch.enable_grad():
        out = vitkit.flash_attention(q, k, v, bias=bias, causal=call.causal, scale=call.scale)
    assert isinstance(out, torch.Tensor)
    grad = torch.zeros_like(out)
    grad[..., 0] = r[:, :, None] / q.shape[2]
    return torch.autograd.grad(out, v, grad)[0][..., 0].sum(-1)


def rollout(calls: list[AttentionCall], row: int = 0) -> torch.Tensor:
    """Row ``row`` (0: the class token) of the rollout of self-attention layers: [B, N], summing
    to 1. Time of one backward pass of attention per layer, memory of a few rows.

    Raises:
        ValueError: there is no call, or one is not self-attention among the same tokens.
    """
    shapes = {(c.q.shape[:2], c.k.shape[:2]) for c in calls}
    if len(shapes) != 1 or len(set(next(iter(shapes)))) != 1:
        raise ValueError(f"rollout: calls must be self-attention of one size, got {shapes}")
    first = calls[0].q
    r = torch.zeros(first.shape[:2], device=first.device)
    r[:, row] = 1
    for call in reversed(calls):
        r = (r + weigh(call, r)) / 2
    return r
