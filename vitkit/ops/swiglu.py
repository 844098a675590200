"""SwiGLU (Shazeer 2020, GLU Variants Improve Transformer) in one pass.

    y = value * silu(gate),   silu(z) = z / (1 + exp(-z))

Value and gate are the halves of a packed [..., 2F], the output of one projection, or two tensors
[..., F]. Read in their dtype, computed in float32, rounded once. Nothing is reduced: results are
deterministic. The backward pass computes silu(gate) again instead of storing it, and writes the
gradient of a packed tensor packed.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from vitkit import _gated, _library, backends

NAME = "swiglu"
_SILU_FLOPS = 5  # exp counted once


def reference(x: torch.Tensor, gate: torch.Tensor | None, gate_last: bool) -> torch.Tensor:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice."""
    value, gate = _gated.value_and_gate(x, gate, gate_last)
    return (value * F.silu(gate)).to(x.dtype).contiguous()


def _fwd_triton(x, gate, gate_last):
    module = importlib.import_module("vitkit.kernels.gated_activation")
    return module.forward(x, gate, gate_last, "silu")


def _bwd_triton(grad, x, gate, gate_last):
    module = importlib.import_module("vitkit.kernels.gated_activation")
    return module.backward(grad, x, gate, gate_last, "silu")


_library.define(
    "swiglu_fwd",
    "(Tensor x, Tensor? gate, bool gate_last) -> Tensor",
    fake=_gated.fwd_fake,
    triton=_fwd_triton,
    flops=_gated.fwd_flops(_SILU_FLOPS),
)
_library.define(
    "swiglu_bwd",
    "(Tensor grad, Tensor x, Tensor? gate, bool gate_last) -> (Tensor, Tensor)",
    fake=_gated.bwd_fake,
    triton=_bwd_triton,
    flops=_gated.bwd_flops(_SILU_FLOPS),
)
_FWD = torch.ops.vitkit.swiglu_fwd.default


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(x, gate, gate_last, overload):
        return getattr(torch.ops.vitkit.swiglu_fwd, overload)(x, gate, gate_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gate, ctx.gate_last, ctx.overload = inputs
        ctx.save_for_backward(x, gate)

    @staticmethod
    def backward(ctx, grad):
        x, gate = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dgate = _library.differentiable_backward(
                lambda x, gate: (reference(x, gate, ctx.gate_last),),
                (x, gate),
                (grad,),
                ctx.needs_input_grad[:2],
            )
        else:
            op = getattr(torch.ops.vitkit.swiglu_bwd, ctx.overload)
            dx, dgate = op(grad.contiguous(), x, gate, ctx.gate_last)
        return dx, None if gate is None else dgate, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_SwiGLU.apply, info, in_dims, args)


def _check(x, gate=None, *, gate_last=False):
    """Validates a call; returns what backends.select needs."""
    _gated.check(NAME, x, gate, gate_last)
    return x.device.type, lambda backend: why_not(backend, x)


def why_not(backend: str, x: torch.Tensor) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    return _gated.why_not(NAME, backend, x)


def swiglu(
    x: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    gate_last: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """``value * silu(gate)`` in one pass, with gradients for both.

    Which half of a packed tensor is the gate differs between hosts: the first in timm's
    SwiGLUPacked and in DINOv2's ``w12`` (``gate_last=False``), the second in diffusers' SwiGLU and
    timm's GluMlp with its default ``gate_last=True``. Two projections, as in timm's SwiGLU and
    transformers' Dinov2SwiGLUFFN, are passed as ``swiglu(value, gate)``. Arithmetic is float32 for
    float32, bfloat16 and float16, float64 for float64.

    Args:
        x: [..., 2F] packed, or the value [..., F] if gate is given; floating point. Views whose
            rows lie at one distance (halves of a larger tensor) are read in place.
        gate: [..., F], the shape and dtype of x.
        gate_last: the second half of a packed x is the gate; without meaning if gate is given.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        [..., F], contiguous, in the dtype of x.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> x = torch.randn(2, 5, 16)
        >>> gate, value = x.chunk(2, -1)
        >>> torch.allclose(vitkit.swiglu(x), value * torch.nn.functional.silu(gate), atol=1e-6)
        True
    """
    if backend == "auto" == backends.DEFAULT and type(gate_last) is bool:
        try:
            if _library.is_plain_cpu_call(x) and not _library.differentiated(x, gate):
                return _FWD(x, gate, gate_last)
        except Exception:
            pass  # refused: the checks below say why, or choose another backend
    x, gate = _gated.promoted(x, gate)
    plan = _gated.plan(
        NAME, x, gate, (gate_last,), backend, lambda: _check(x, gate, gate_last=gate_last)
    )
    if not torch.compiler.is_compiling():
        _library.register_flops()
    if plan.fwd is None:
        return reference(x, gate, gate_last)
    x = x.contiguous() if plan.copy[0] else x
    gate = gate.contiguous() if gate is not None and plan.copy[1] else gate
    if _library.differentiated(x, gate):
        if torch.compiler.is_compiling():
            x, gate = _library.distinct(x, gate)
        return _library.apply(_SwiGLU, x, gate, gate_last, plan.overload)
    return plan.fwd(x, gate, gate_last)


backends.OPS[NAME] = backends.Op(swiglu, _check)
