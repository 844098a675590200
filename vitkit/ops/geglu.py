"""GEGLU (Shazeer 2020, GLU Variants Improve Transformer) in one pass.

    y = value * gelu(gate),   gelu(z) = z * Phi(z), Phi the normal distribution function: erf, or
    its approximation 0.5 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))

Value and gate are the halves of a packed [..., 2F], the output of one projection, or two tensors
[..., F]. Read in their dtype, computed in float32, rounded once. Nothing is reduced: results are
deterministic. The backward pass computes gelu(gate) again instead of storing it, and writes the
gradient of a packed tensor packed.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from vitkit import _gated, _library, backends

NAME = "geglu"
_GELU_FLOPS = 5  # erf or tanh counted once


def reference(
    x: torch.Tensor, gate: torch.Tensor | None, gate_last: bool, tanh: bool
) -> torch.Tensor:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice."""
    value, gate = _gated.value_and_gate(x, gate, gate_last)
    y = value * F.gelu(gate, approximate="tanh" if tanh else "none")
    return y.to(x.dtype).contiguous()


def _fwd_triton(x, gate, gate_last, tanh):
    module = importlib.import_module("vitkit.kernels.gated_activation")
    return module.forward(x, gate, gate_last, "gelu_tanh" if tanh else "gelu")


def _bwd_triton(grad, x, gate, gate_last, tanh):
    module = importlib.import_module("vitkit.kernels.gated_activation")
    return module.backward(grad, x, gate, gate_last, "gelu_tanh" if tanh else "gelu")


_library.define(
    "geglu_fwd",
    "(Tensor x, Tensor? gate, bool gate_last, bool tanh) -> Tensor",
    fake=_gated.fwd_fake,
    triton=_fwd_triton,
    flops=_gated.fwd_flops(_GELU_FLOPS),
)
_library.define(
    "geglu_bwd",
    "(Tensor grad, Tensor x, Tensor? gate, bool gate_last, bool tanh) -> (Tensor, Tensor)",
    fake=_gated.bwd_fake,
    triton=_bwd_triton,
    flops=_gated.bwd_flops(_GELU_FLOPS),
)
_FWD = torch.ops.vitkit.geglu_fwd.default


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(x, gate, gate_last, tanh, overload):
        return getattr(torch.ops.vitkit.geglu_fwd, overload)(x, gate, gate_last, tanh)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gate, ctx.gate_last, ctx.tanh, ctx.overload = inputs
        ctx.save_for_backward(x, gate)

    @staticmethod
    def backward(ctx, grad):
        x, gate = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dgate = _library.differentiable_backward(
                lambda x, gate: (reference(x, gate, ctx.gate_last, ctx.tanh),),
                (x, gate),
                (grad,),
                ctx.needs_input_grad[:2],
            )
        else:
            op = getattr(torch.ops.vitkit.geglu_bwd, ctx.overload)
            dx, dgate = op(grad.contiguous(), x, gate, ctx.gate_last, ctx.tanh)
        return dx, None if gate is None else dgate, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_GEGLU.apply, info, in_dims, args)


def _check(x, gate=None, *, gate_last=True, approximate="none"):
    """Validates a call; returns what backends.select needs."""
    _gated.check(NAME, x, gate, gate_last)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{NAME}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return x.device.type, lambda backend: why_not(backend, x)


def why_not(backend: str, x: torch.Tensor) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    return _gated.why_not(NAME, backend, x)


def geglu(
    x: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    gate_last: bool = True,
    approximate: str = "none",
    backend: str = "auto",
) -> torch.Tensor:
    """``value * gelu(gate)`` in one pass, with gradients for both.

    The second half of a packed tensor is the gate in diffusers' GEGLU (``gate_last=True``), the
    first in timm's GluMlp with ``gate_last=False``. Two projections are passed as
    ``geglu(value, gate)``. Arithmetic is float32 for float32, bfloat16 and float16, float64 for
    float64.

    Args:
        x: [..., 2F] packed, or the value [..., F] if gate is given; floating point. Views whose
            rows lie at one distance (halves of a larger tensor) are read in place.
        gate: [..., F], the shape and dtype of x.
        gate_last: the second half of a packed x is the gate; without meaning if gate is given.
        approximate: ``"none"`` (erf) or ``"tanh"``, as in ``torch.nn.functional.gelu``.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        [..., F], contiguous, in the dtype of x.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> x = torch.randn(2, 5, 16)
        >>> value, gate = x.chunk(2, -1)
        >>> torch.allclose(vitkit.geglu(x), value * torch.nn.functional.gelu(gate), atol=1e-6)
        True
    """
    tanh = approximate == "tanh"
    named = tanh or approximate == "none"
    if backend == "auto" == backends.DEFAULT and named and type(gate_last) is bool:
        try:
            if _library.is_plain_cpu_call(x) and not _library.differentiated(x, gate):
                return _FWD(x, gate, gate_last, tanh)
        except Exception:
            pass  # refused: the checks below say why, or choose another backend
    x, gate = _gated.promoted(x, gate)
    plan = _gated.plan(
        NAME,
        x,
        gate,
        (gate_last, approximate),
        backend,
        lambda: _check(x, gate, gate_last=gate_last, approximate=approximate),
    )
    if not torch.compiler.is_compiling():
        _library.register_flops()
    if plan.fwd is None:
        return reference(x, gate, gate_last, tanh)
    x = x.contiguous() if plan.copy[0] else x
    gate = gate.contiguous() if gate is not None and plan.copy[1] else gate
    if _library.differentiated(x, gate):
        if torch.compiler.is_compiling():
            x, gate = _library.distinct(x, gate)
        return _library.apply(_GEGLU, x, gate, gate_last, tanh, plan.overload)
    return plan.fwd(x, gate, gate_last, tanh)


backends.OPS[NAME] = backends.Op(geglu, _check)
