"""Assertions over vitkit._numerics, the one tolerance rule of the project."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitkit._numerics import parity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_parity(name, actual, eager, exact, *, dtype=None, terms=1):
    """``actual`` is as near to ``exact`` (float64) as the rule of DESIGN §5 demands, ``eager``
    being its yardstick."""
    result = parity(actual, eager, exact, dtype=dtype, terms=terms)
    assert result.ok, f"{name}: {result}"


def gradients(function, tensors, cotangents):
    """Outputs of ``function(*tensors)`` and the gradients of sum(output * cotangent) for every
    floating tensor."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [c.to(o.dtype) for o, c in pairs], allow_unused=True
    )
    return outputs, grads


def double(*tensors):
    return [t.detach().double() if t is not None and t.is_floating_point() else t for t in tensors]


def eager_attention(q, k, v, bias=None, causal=False, scale=None):
    """Attention in the dtype of its inputs, as plain PyTorch computes it: the yardstick of the
    rule."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    if bias is not None:
        scores = (
            scores.masked_fill(~bias, float("-inf"))
            if bias.dtype == torch.bool
            else scores + bias.to(scores.dtype)
        )
    if causal:
        n, m = scores.shape[-2:]
        scores = scores.masked_fill(
            torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1), float("-inf")
        )
    weights = (
        torch.softmax(scores, -1).nan_to_num(0.0) if bias is not None else torch.softmax(scores, -1)
    )
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def eager_group_norm(
    x, groups, weight=None, bias=None, eps=1e-5, silu=True, add=None, scale=None, shift=None
):
    """GroupNorm and its neighbours in the dtype of x, op by op, as a host model computes them."""
    shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
    cast = [t.to(x.dtype) if t is not None else None for t in (weight, bias, add, scale, shift)]
    weight, bias, add, scale, shift = cast
    h = x if add is None else x + add.view(shape)
    h = F.group_norm(h, groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + scale.view(shape))
    if shift is not None:
        h = h + shift.view(shape)
    return F.silu(h) if silu else h


def eager_layer_norm(x, shift=None, scale=None, weight=None, bias=None, eps=1e-6):
    """LayerNorm and its modulation in the dtype of x, op by op, as a host model computes them."""
    cast = [t.to(x.dtype) if t is not None else None for t in (shift, scale, weight, bias)]
    shift, scale, weight, bias = cast
    h = F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def spread(t):
        return t if t.dim() == x.dim() else t.view(len(x), *(1,) * (x.dim() - 2), x.shape[-1])

    if scale is not None:
        h = h * (1 + spread(scale))
    return h if shift is None else h + spread(shift)
