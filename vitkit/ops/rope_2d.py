"""Rotary positions (Su et al. 2021) of patches: q and k [B, N, H, D] rotated by tables of angles.

    y_a = x_a * cos_a - x_b * sin_a,   y_b = x_b * cos_b + x_a * sin_b

(a, b) are the pairs of a head: (j, j + D/2) in layout "half", (2j, 2j + 1) in layout "interleaved".
The tables say where each token is: 2-D positions are two axes side by side in their last dimension,
which is the model's business. They hold one value per element, as the hosts keep them (cos_a =
cos_b), or one per pair. Fewer positions than tokens leave the first tokens as they are: class and
register tokens. Computed in float32, rounded once, q and k in one pass. The gradient is the
transposed rotation; that of the tables, which only models with learned frequencies ask for, is
taken in plain PyTorch. Deterministic.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch

from vitkit import _library, backends
from vitkit._checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    why_not_dtype,
)

NAME = "rope_2d"
LAYOUTS = ("half", "interleaved")
_memo = _library.Memo()


def reference(
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor | None,  # [B, N, Hk, D]
    cos: torch.Tensor,  # broadcasts to [B, N', H, D]
    sin: torch.Tensor,
    interleaved: bool,
) -> tuple[torch.Tensor, ...]:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice."""
    return tuple(_rotated(x, cos, sin, interleaved) for x in (q, k) if x is not None)


def _quarter_turn(h, interleaved):
    """(a, b) -> (-b, a) for each pair."""
    if interleaved:
        return torch.stack([-h[..., 1::2], h[..., ::2]], -1).flatten(-2)
    a, b = h.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _rotated(x, cos, sin, interleaved):
    compute = torch.promote_types(x.dtype, torch.float32)
    prefix = x.shape[1] - cos.shape[1]
    h, cos, sin = x[:, prefix:].to(compute), cos.to(compute), sin.to(compute)
    y = (h * cos + _quarter_turn(h, interleaved) * sin).to(x.dtype)
    return torch.cat([x[:, :prefix], y], 1) if prefix else y.contiguous()


def _turned_back(grad, cos, sin, interleaved):
    """The transposed rotation, in plain PyTorch, differentiable in all three."""
    prefix = grad.shape[1] - cos.shape[1]
    h = grad[:, prefix:].to(cos.dtype)
    y = (h * cos - _quarter_turn(h * sin, interleaved)).to(grad.dtype)
    return torch.cat([grad[:, :prefix], y], 1) if prefix else y.contiguous()


def _table_gradients(pairs, table, interleaved):
    """Gradients of cos and sin from (x, gradient of the turned x), in plain PyTorch."""
    dcos, dsin = torch.zeros_like(table), torch.zeros_like(table)
    for x, grad in pairs:
        prefix = x.shape[1] - table.shape[1]
        h, g = x[:, prefix:].to(table.dtype), grad[:, prefix:].to(table.dtype)
        dcos = dcos + (g * h).sum_to_size(table.shape)
        dsin = dsin + (g * _quarter_turn(h, interleaved)).sum_to_size(table.shape)
    return dcos, dsin


# ---- operators ----

_SCHEMA = "(Tensor {}q, Tensor? {}k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)"


def _fake(q, k, cos, sin, interleaved):
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


def _fwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.rope_2d").rotate(*args, inverse=False)


def _bwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.rope_2d").rotate(*args, inverse=True)


def _flops(q_shape, k_shape, *args, **kwargs) -> int:
    """3 per element, forward as backward: two products and a sum."""
    return 3 * (math.prod(q_shape) + (math.prod(k_shape) if k_shape is not None else 0))


_library.define("rope_2d_fwd", _SCHEMA.format("", ""), fake=_fake, triton=_fwd_triton, flops=_flops)
_library.define(
    "rope_2d_bwd", _SCHEMA.format("grad_", "grad_"), fake=_fake, triton=_bwd_triton, flops=_flops
)
_FWD = torch.ops.vitkit.rope_2d_fwd.default


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(q, k, cos, sin, interleaved, learned, overload):
        return getattr(torch.ops.vitkit.rope_2d_fwd, overload)(q, k, cos, sin, interleaved)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, cos, sin, ctx.interleaved, ctx.learned, ctx.overload = inputs
        ctx.has_k = k is not None
        if k is None:
            ctx.mark_non_differentiable(output[1])
        # Turning back takes the tables only; the gradient of the tables takes what they turned.
        ctx.save_for_backward(*((q, k) if ctx.learned else (None, None)), cos, sin)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        q, k, cos, sin = ctx.saved_tensors
        grad_k = grad_k if ctx.has_k else None
        dcos = dsin = None
        if ctx.learned:
            pairs = [(q, grad_q)] if k is None else [(q, grad_q), (k, grad_k)]
            dcos, dsin = _table_gradients(pairs, cos, ctx.interleaved)
        if torch.is_grad_enabled():
            dq, dk = (
                None if g is None else _turned_back(g, cos, sin, ctx.interleaved)
                for g in (grad_q, grad_k)
            )
        else:
            op = getattr(torch.ops.vitkit.rope_2d_bwd, ctx.overload)
            grad_k = None if grad_k is None else _rows(grad_k)
            dq, dk = op(_rows(grad_q), grad_k, cos, sin, ctx.interleaved)
        return dq, dk if ctx.has_k else None, dcos, dsin, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_RoPE.apply, info, in_dims, args)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose heads are consecutive elements: what the kernels read."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


# ---- checks and choice of the backend ----


def _check(q, k, cos, sin, *, layout="half"):
    """Validates a call; returns what backends.select needs."""
    check_floating(NAME, "q", q)
    if q.dim() != 4 or q.shape[-1] % 2:
        raise ValueError(
            f"{NAME}: q must have shape [B, N, H, D] with an even D, got {tuple(q.shape)}"
        )
    b, n, heads, d = q.shape
    if k is not None:
        check_floating(NAME, "k", k)
        check_same_device(NAME, "k", k, q, "q")
        check_same_dtype(NAME, "k", k, q, "q")
        if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (b, n, d):
            raise ValueError(
                f"{NAME}: k must have shape [B, N, Hk, D] with the B, N and D of q,"
                f" got {tuple(k.shape)} beside {tuple(q.shape)}"
            )
    if layout not in LAYOUTS:
        raise ValueError(f"{NAME}: layout must be one of {LAYOUTS}, got {layout!r}")
    for arg, table in (("cos", cos), ("sin", sin)):
        check_floating(NAME, arg, table)
        check_same_device(NAME, arg, table, q, "q")
        _check_table(arg, table, q, k)
    if cos.shape != sin.shape:
        raise ValueError(
            f"{NAME}: sin must have the shape of cos {tuple(cos.shape)}, got {tuple(sin.shape)}"
        )
    return q.device.type, lambda backend: why_not(backend, q)


def _check_table(arg, table, q, k):
    b, n, heads, d = q.shape
    shape = tuple(table.shape)
    if table.dim() not in (2, 4) or shape[-1] not in (d, d // 2):
        raise ValueError(
            f"{NAME}: {arg} must have shape [N', D], [B or 1, N', H or 1, D] or the same with D / 2"
            f" (D = {d}), got {shape}"
        )
    if table.shape[-2 if table.dim() == 2 else 1] > n:
        raise ValueError(
            f"{NAME}: {arg} must have at most as many positions as q has tokens, {n}, got {shape}"
        )
    if table.dim() == 4:
        if table.shape[0] not in (1, b):
            raise ValueError(f"{NAME}: {arg} must have batch 1 or {b}, got {shape}")
        if table.shape[2] not in (1, heads) or (
            table.shape[2] != 1 and k is not None and k.shape[2] != heads
        ):
            raise ValueError(f"{NAME}: {arg} must have 1 head or those of q and k, got {shape}")


def why_not(backend: str, q: torch.Tensor) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    return why_not_dtype(q) or backends.why_not_device(NAME, backend, q.device.type)


def _table(table: torch.Tensor, head_dim: int, interleaved: bool, dtype: torch.dtype):
    """[B or 1, N', H or 1, D] of ``dtype``, one value per element, elements consecutive."""
    table = table.to(dtype)
    if table.shape[-1] != head_dim:
        table = table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)
    return _rows(table[None, :, None] if table.dim() == 2 else table)


def rope_2d(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Rotates q and k by tables of angles, in one pass, with gradients for all four.

    ``layout="half"`` turns element j with j + D/2: transformers' DINOv3, timm with
    ``rotate_half=True``. ``layout="interleaved"`` turns 2j with 2j + 1: FLUX and others of
    diffusers (``use_real_unbind_dim=-1``), FiT, timm's EVA and ROPE ViTs.

    Tables with fewer positions N' than there are tokens N belong to the last N' tokens; the ones
    before (class, register) are copied. FLUX has angles for text and image alike: N' = N.

    Args:
        q: [B, N, H, D], D even; any strides whose last is 1 (thirds of a qkv, transposed
            [B, H, N, D]) are read in place.
        k: [B, N, Hk, D] of q's dtype, or None.
        cos, sin: [N', D], or [B or 1, N', H or 1, D] for positions that differ between samples or
            heads; or D / 2 in place of D. Any floating dtype.
        layout: ``"half"`` or ``"interleaved"``.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        (q, k) rotated, contiguous, in their dtype; q alone if k is None.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> q = torch.randn(1, 5, 2, 8)  # a class token and 4 patches
        >>> angles = torch.randn(4, 8)
        >>> rotated = vitkit.rope_2d(q, None, angles.cos(), angles.sin())
        >>> torch.equal(rotated[:, :1], q[:, :1])
        True
    """
    plan = _plan(q, k, cos, sin, layout, backend)
    if not torch.compiler.is_compiling():
        _library.register_flops()
    interleaved = layout == "interleaved"
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (_table(t, q.shape[-1], interleaved, wide) for t in (cos, sin))
    if plan.fwd is None:
        found = reference(q, k, cos, sin, interleaved)
        return found[0] if k is None else (found[0], found[1])
    q, k = _rows(q), None if k is None else _rows(k)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, cos, sin)):
        learned = cos.requires_grad or sin.requires_grad
        if torch.compiler.is_compiling():
            q, k, cos, sin = _library.distinct(q, k, cos, sin)
        turned = _library.apply(_RoPE, q, k, cos, sin, interleaved, learned, plan.overload)
    else:
        turned = plan.fwd(q, k, cos, sin, interleaved)
    return turned[0] if k is None else (turned[0], turned[1])


class _Plan(NamedTuple):
    """All that shapes, strides, dtypes and devices decide about a call."""

    fwd: Any  # the operator, None for the reference
    overload: str


def _plan(q, k, cos, sin, layout, backend) -> _Plan:
    """Validates the call and chooses its backend, once for calls of the same layout."""
    key = _library.layout_key(layout, backend, q, k, cos, sin)
    plan = _memo.get(key)
    if plan is not None:
        return plan
    device_type, reasons = _check(q, k, cos, sin, layout=layout)
    chosen = backends.select(NAME, backend, device_type, reasons)
    overload = "triton" if chosen == "triton" else "default"
    operator = getattr(torch.ops.vitkit.rope_2d_fwd, overload)
    plan = _Plan(None if chosen == "reference" else operator, overload)
    _memo.put(key, plan)
    return plan


backends.OPS[NAME] = backends.Op(rope_2d, _check)
