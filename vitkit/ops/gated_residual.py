"""The gated end of a residual branch in one pass.

    out = x + gate * y

gate is one value per channel of a sample [B, E] (adaLN-zero), per token, in the shape of x, or for
all [E] (LayerScale). Arithmetic is float32 for bfloat16 and float16, rounded once. Results are
deterministic: the gradient of gate is summed over tokens in an order fixed by the shape, without
atomics. The gradient of x is that of out itself.
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
    check_shape,
    why_not_dtype,
)

NAME = "gated_residual"
_memo = _library.Memo()


def reference(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice."""
    compute = torch.promote_types(x.dtype, torch.float32)
    gate = gate.to(compute)
    if gate.dim() == 2 and x.dim() != 2:
        gate = gate.view(x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    return (x.to(compute) + gate * y.to(compute)).to(x.dtype).contiguous()


# ---- operators ----


def _fwd_fake(x, y, gate):
    return x.new_empty(x.shape)


def _bwd_fake(grad, y, gate):
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _fwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.gated_residual").forward(*args)


def _bwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.gated_residual").backward(*args)


def _fwd_flops(x_shape, *args, **kwargs) -> int:
    """A multiplication and an addition per element."""
    return 2 * math.prod(x_shape)


def _bwd_flops(grad_shape, *args, **kwargs) -> int:
    """Twice the forward pass."""
    return 2 * _fwd_flops(grad_shape)


_library.define(
    f"{NAME}_fwd",
    "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    fake=_fwd_fake,
    triton=_fwd_triton,
    flops=_fwd_flops,
)
_library.define(
    f"{NAME}_bwd",
    "(Tensor grad, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    fake=_bwd_fake,
    triton=_bwd_triton,
    flops=_bwd_flops,
)
_FWD = torch.ops.vitkit.gated_residual_fwd.default


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(x, y, gate, overload):
        return getattr(torch.ops.vitkit.gated_residual_fwd, overload)(x, y, gate)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, gate, ctx.overload = inputs
        ctx.save_for_backward(y, gate)

    @staticmethod
    def backward(ctx, grad):
        y, gate = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Linear in x: any x gives the same gradients.
            zeros = torch.zeros_like(y)
            _, dy, dgate = _library.differentiable_backward(
                lambda x, y, g: (reference(x, y, g),),
                (zeros, y, gate),
                (grad,),
                (False, *ctx.needs_input_grad[1:3]),
            )
            return grad, dy, dgate, None
        if not any(ctx.needs_input_grad[1:3]):
            return grad, None, None, None
        op = getattr(torch.ops.vitkit.gated_residual_bwd, ctx.overload)
        return grad, *op(grad.contiguous(), y, gate), None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_GatedResidual.apply, info, in_dims, args)


# ---- checks and choice of the backend ----


def _check(x, y, gate):
    """Validates a call; returns what backends.select needs."""
    check_floating(NAME, "x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{NAME}: x must have shape [*, E] with E >= 1, got {tuple(x.shape)}")
    check_floating(NAME, "y", y)
    check_same_device(NAME, "y", y, x, "x")
    check_same_dtype(NAME, "y", y, x, "x")
    check_shape(NAME, "y", y, tuple(x.shape), "that of x")
    check_floating(NAME, "gate", gate)
    check_same_device(NAME, "gate", gate, x, "x")
    e = x.shape[-1]
    allowed = {(e,): "[E]", (x.shape[0], e): "[B, E]", tuple(x.shape): "that of x"}
    if x.dim() < 2:
        allowed = {(e,): "[E]"}
    if tuple(gate.shape) not in allowed:
        listed = ", ".join(f"{names} = {shape}" for shape, names in allowed.items())
        raise ValueError(
            f"{NAME}: gate must have one of the shapes {listed}, got {tuple(gate.shape)}"
        )
    return x.device.type, lambda backend: why_not(backend, [x, y, gate])


def why_not(backend: str, tensors: list[torch.Tensor]) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    device_type = tensors[0].device.type
    return why_not_dtype(*tensors) or backends.why_not_device(NAME, backend, device_type)


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """``x + gate * y`` in one pass, with gradients for all three.

    The end of a residual branch: of adaLN-zero (Peebles & Xie 2023) with a gate per sample, of
    LayerScale (Touvron et al. 2021, CaiT) with a gate for all.

    Args:
        x: [*, E] floating point, the residual stream.
        y: the branch, in the shape and dtype of x.
        gate: [E], [B, E] or in the shape of x; any floating dtype.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        In the shape and dtype of x, contiguous. Under autocast x and y may differ in dtype, and the
        wider is taken, as torch's addition does.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> x, y, gate = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
        >>> torch.allclose(vitkit.gated_residual(x, y, gate), x + gate[:, None] * y, atol=1e-6)
        True
    """
    if backend == "auto" == backends.DEFAULT:
        try:
            if _library.is_plain_cpu_call(x) and not (
                torch.is_grad_enabled()
                and (x.requires_grad or y.requires_grad or gate.requires_grad)
            ):
                return _FWD(x, y, gate)
        except Exception:
            pass  # refused: the checks below say why, or choose another backend
    x, y = _widened(x, y)
    plan = _plan(x, y, gate, backend)
    if not torch.compiler.is_compiling():
        _library.register_flops()
    if plan.fwd is None:
        return reference(x, y, gate)
    copy_x, copy_y, adapt_gate = plan.copies
    x = x.contiguous() if copy_x else x
    y = y.contiguous() if copy_y else y
    gate = _library.readable_rows(gate, x) if adapt_gate else gate
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or gate.requires_grad):
        if torch.compiler.is_compiling():
            x, y, gate = _library.distinct(x, y, gate)
        return _library.apply(_GatedResidual, x, y, gate, plan.overload)
    return plan.fwd(x, y, gate)


def _widened(x: Any, y: Any) -> tuple[Any, Any]:
    """x and y in their wider dtype, where autocast made them differ."""
    both = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    if not both or x.dtype == y.dtype or not torch.is_autocast_enabled(x.device.type):
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


class _Plan(NamedTuple):
    """All that shapes, strides, dtypes and devices decide about a call."""

    fwd: Any  # the operator, None for the reference
    overload: str
    copies: tuple[bool, bool, bool]  # of x, y, gate: kernels do not read it as it is


def _plan(x, y, gate, backend) -> _Plan:
    """Validates the call and chooses its backend, once for calls of the same layout."""
    key = _library.layout_key(backend, x, y, gate)
    plan = _memo.get(key)
    if plan is not None:
        return plan
    device_type, reasons = _check(x, y, gate)
    chosen = backends.select(NAME, backend, device_type, reasons)
    overload = "triton" if chosen == "triton" else "default"
    plan = _Plan(
        None if chosen == "reference" else getattr(torch.ops.vitkit.gated_residual_fwd, overload),
        overload,
        (
            not x.is_contiguous(),
            not y.is_contiguous(),
            not _library.rows_are_readable(gate, x),
        ),
    )
    _memo.put(key, plan)
    return plan


backends.OPS[NAME] = backends.Op(gated_residual, _check)
