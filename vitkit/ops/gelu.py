"""GELU (Hendrycks & Gimpel 2016) and its gradient.

    y = x * Phi(x), Phi the normal distribution function: erf, or its approximation
    0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))

Read in the dtype of x, computed in float32, rounded once. Contiguous and channels_last tensors are
read and written in their own layout. Nothing is reduced: results are deterministic.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vitkit import _library, backends
from vitkit._checks import check_floating, why_not_dtype

NAME = "gelu"
_memo = _library.Memo()


def reference(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = F.gelu(x.to(compute), approximate="tanh" if tanh else "none").to(x.dtype)
    return _like(y, x)


def _channels_last(x: torch.Tensor) -> bool:
    """Whether x lies in memory as [N, *, C] and not as [N, C, *]."""
    # Asked through a permuted view: vmap cannot answer is_contiguous(memory_format=...).
    return x.dim() in (4, 5) and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x itself if it has the layout of ``other``, otherwise a copy that has."""
    if _channels_last(other):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


# ---- operators ----


def _fwd_fake(x, tanh):
    return torch.empty_like(x)


def _bwd_fake(grad, x, tanh):
    return torch.empty_like(x)


def _fwd_triton(x, tanh):
    module = importlib.import_module("vitkit.kernels.gated_activation")
    return module.forward_alone(x, "gelu_tanh" if tanh else "gelu")


def _bwd_triton(grad, x, tanh):
    module = importlib.import_module("vitkit.kernels.gated_activation")
    return module.backward_alone(grad, x, "gelu_tanh" if tanh else "gelu")


def _fwd_flops(x_shape, *args, **kwargs) -> int:
    """5 per element, erf or tanh counted once."""
    return 5 * math.prod(x_shape)


def _bwd_flops(grad_shape, *args, **kwargs) -> int:
    """Twice the forward pass."""
    return 2 * _fwd_flops(grad_shape)


_library.define(
    "gelu_fwd",
    "(Tensor x, bool tanh) -> Tensor",
    fake=_fwd_fake,
    triton=_fwd_triton,
    flops=_fwd_flops,
)
_library.define(
    "gelu_bwd",
    "(Tensor grad, Tensor x, bool tanh) -> Tensor",
    fake=_bwd_fake,
    triton=_bwd_triton,
    flops=_bwd_flops,
)
_FWD = torch.ops.vitkit.gelu_fwd.default


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(x, tanh, overload):
        return getattr(torch.ops.vitkit.gelu_fwd, overload)(x, tanh)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.tanh, ctx.overload = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            (dx,) = _library.differentiable_backward(
                lambda x: (reference(x, ctx.tanh),), (x,), (grad,), (True,)
            )
        else:
            op = getattr(torch.ops.vitkit.gelu_bwd, ctx.overload)
            dx = op(_like(grad, x), x, ctx.tanh)
        return dx, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_GELU.apply, info, in_dims, args)


# ---- checks and choice of the backend ----


def _check(x, *, approximate="none"):
    """Validates a call; returns what backends.select needs."""
    check_floating(NAME, "x", x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{NAME}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return x.device.type, lambda backend: why_not(backend, x)


def why_not(backend: str, x: torch.Tensor) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    return why_not_dtype(x) or backends.why_not_device(NAME, backend, x.device.type)


def gelu(x: torch.Tensor, *, approximate: str = "none", backend: str = "auto") -> torch.Tensor:
    """``torch.nn.functional.gelu``, with its gradient.

    The MLPs of ViTs use the exact form, DiT's and SigLIP's the approximation. Arithmetic is float32
    for float32, bfloat16 and float16, float64 for float64. Far below zero a float32 result keeps
    the leading digits that 1 + erf loses.

    Args:
        x: floating point, any shape; contiguous and channels_last(_3d) inputs give outputs of the
            same layout, other strides are copied to contiguous first.
        approximate: ``"none"`` (erf) or ``"tanh"``.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        The shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> x = torch.randn(2, 5, 16)
        >>> torch.allclose(vitkit.gelu(x), torch.nn.functional.gelu(x), atol=1e-6)
        True
    """
    tanh = approximate == "tanh"
    if backend == "auto" == backends.DEFAULT and (tanh or approximate == "none"):
        try:
            if _library.is_plain_cpu_call(x) and not (torch.is_grad_enabled() and x.requires_grad):
                return _FWD(x, tanh)
        except Exception:
            pass  # refused: the checks below say why, or choose another backend
    plan = _plan(x, approximate, backend)
    if not torch.compiler.is_compiling():
        _library.register_flops()
    if plan.fwd is None:
        return reference(x, tanh)
    if plan.copy:
        x = x.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _library.apply(_GELU, x, tanh, plan.overload)
    return plan.fwd(x, tanh)


class _Plan(NamedTuple):
    """All that shapes, strides, dtypes and devices decide about a call."""

    fwd: Any  # the operator, None for the reference
    overload: str
    copy: bool  # x is neither contiguous nor channels_last


def _plan(x, approximate, backend) -> _Plan:
    """Validates the call and chooses its backend, once for calls of the same layout."""
    key = _library.layout_key(approximate, backend, x)
    plan = _memo.get(key)
    if plan is not None:
        return plan
    device_type, reasons = _check(x, approximate=approximate)
    chosen = backends.select(NAME, backend, device_type, reasons)
    overload = "triton" if chosen == "triton" else "default"
    plan = _Plan(
        None if chosen == "reference" else getattr(torch.ops.vitkit.gelu_fwd, overload),
        overload,
        not x.is_contiguous() and not _channels_last(x),
    )
    _memo.put(key, plan)
    return plan


backends.OPS[NAME] = backends.Op(gelu, _check)
