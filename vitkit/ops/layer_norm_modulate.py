"""LayerNorm over the last dimension with its modulation in one pass.

    y = LN(x) * (1 + scale) + shift,   LN(x) = (x - mean) * rstd * weight + bias

mean and rstd are those of each row of x, taken in float32 in two passes (never E[x^2] - E[x]^2),
whatever the dtype of x, and kept in float32 for the backward pass. scale and shift come per sample
[B, E] (DiT, SiT, FiT, SD3, FLUX) or per token, in the shape of x (Wan). Without any of the four
this is plain LayerNorm, which runs on the same kernels. Results are deterministic: sums over rows
are cut by the shape alone and added in order, without atomics.
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

NAME = "layer_norm_modulate"
# Kernels for GPUs hold whole rows in registers, the gradient six of them.
MAX_GPU_WIDTH = 8192
_memo = _library.Memo()


def reference(
    x: torch.Tensor,  # [*, E]
    shift: torch.Tensor | None,  # [B, E] or the shape of x
    scale: torch.Tensor | None,  # as shift
    weight: torch.Tensor | None,  # [E]
    bias: torch.Tensor | None,  # [E]
    eps: float,
) -> torch.Tensor:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice."""
    compute = torch.promote_types(x.dtype, torch.float32)
    h = x.to(compute)
    centred = h - h.mean(-1, keepdim=True)
    # The mean of values far from zero is itself rounded; what it missed is still in the residuals.
    centred = centred - centred.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    if scale is not None:
        y = y * (1 + _spread(scale.to(compute), x))
    if shift is not None:
        y = y + _spread(shift.to(compute), x)
    return y.to(x.dtype).contiguous()


def _spread(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t, broadcastable over the tokens of x."""
    return t if t.dim() == x.dim() else t.view(x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])


def _per_token(x: torch.Tensor, t: torch.Tensor | None) -> bool:
    return t is not None and t.dim() == x.dim()


# ---- operators ----

_OPTIONS = "Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias"
_FWD_SCHEMA = f"(Tensor x, {_OPTIONS}, float eps) -> (Tensor, Tensor)"
_BWD_SCHEMA = (
    f"(Tensor grad, Tensor x, Tensor stats, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fwd_fake(x, shift, scale, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)


def _bwd_fake(grad, x, stats, shift, scale, weight, bias):
    small = [
        t.new_empty(t.shape) if t is not None else x.new_empty(0)
        for t in (shift, scale, weight, bias)
    ]
    return (x.new_empty(x.shape), *small)


def _fwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.layer_norm_modulate").forward(*args)


def _bwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.layer_norm_modulate").backward(*args)


def _fwd_flops(x_shape, *args, **kwargs) -> int:
    """8 per element: 4 for the statistics, 2 to normalise, 2 for gain and offset."""
    return 8 * math.prod(x_shape)


def _bwd_flops(grad_shape, *args, **kwargs) -> int:
    """Twice the forward pass."""
    return 2 * _fwd_flops(grad_shape)


_library.define(f"{NAME}_fwd", _FWD_SCHEMA, fake=_fwd_fake, triton=_fwd_triton, flops=_fwd_flops)
_library.define(f"{NAME}_bwd", _BWD_SCHEMA, fake=_bwd_fake, triton=_bwd_triton, flops=_bwd_flops)
_FWD = torch.ops.vitkit.layer_norm_modulate_fwd.default


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(x, shift, scale, weight, bias, eps, overload):
        op = getattr(torch.ops.vitkit.layer_norm_modulate_fwd, overload)
        return op(x, shift, scale, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, shift, scale, weight, bias, ctx.eps, ctx.overload = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1], shift, scale, weight, bias)

    @staticmethod
    def backward(ctx, grad, _grad_stats):
        x, stats, shift, scale, weight, bias = ctx.saved_tensors
        given = (x, shift, scale, weight, bias)
        if torch.is_grad_enabled():
            found = _library.differentiable_backward(
                lambda x, sh, sc, w, b: (reference(x, sh, sc, w, b, ctx.eps),),
                given,
                (grad,),
                ctx.needs_input_grad[:5],
            )
            return *found, None, None
        grad = grad.contiguous()
        op = getattr(torch.ops.vitkit.layer_norm_modulate_bwd, ctx.overload)
        # The gradient of a shift per token is grad itself: no kernel need copy it.
        of_tokens = _per_token(x, shift)
        dx, dshift, *rest = op(grad, x, stats, None if of_tokens else shift, scale, weight, bias)
        if of_tokens:
            dshift = grad.to(shift.dtype)
        small = (
            g if t is not None else None for g, t in zip((dshift, *rest), given[1:], strict=True)
        )
        return dx, *small, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_LayerNormModulate.apply, info, in_dims, args)


# ---- checks and choice of the backend ----


def _check(x, *, shift=None, scale=None, weight=None, bias=None, eps=1e-6):
    """Validates a call; returns what backends.select needs."""
    check_floating(NAME, "x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{NAME}: x must have shape [*, E] with E >= 1, got {tuple(x.shape)}")
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"{NAME}: eps must be a number >= 0, got {eps!r}")
    options = (("shift", shift), ("scale", scale), ("weight", weight), ("bias", bias))
    for arg, value in options:
        if value is None:
            continue
        check_floating(NAME, arg, value)
        check_same_device(NAME, arg, value, x, "x")
        if arg in ("weight", "bias"):
            check_shape(NAME, arg, value, (x.shape[-1],), "[E]")
            continue
        per_sample = (x.shape[0], x.shape[-1])
        if x.dim() < 2 or tuple(value.shape) not in (per_sample, tuple(x.shape)):
            raise ValueError(
                f"{NAME}: {arg} must have shape [B, E] = {per_sample} or that of"
                f" x = {tuple(x.shape)}, got {tuple(value.shape)}"
            )
    if shift is not None and scale is not None and shift.shape != scale.shape:
        raise ValueError(
            f"{NAME}: shift must have the shape of scale, {tuple(scale.shape)},"
            f" got {tuple(shift.shape)}"
        )
    if shift is not None and scale is not None and _per_token(x, shift):
        check_same_dtype(NAME, "shift", shift, scale, "scale")
    tensors = [x, *(t for _, t in options if t is not None)]
    return x.device.type, lambda backend: why_not(backend, tensors)


def why_not(backend: str, tensors: list[torch.Tensor]) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    reason = why_not_dtype(*tensors)
    if reason is not None:
        return reason
    if backend in ("cuda", "triton") and tensors[0].shape[-1] > MAX_GPU_WIDTH:
        return f"its kernels hold rows of up to {MAX_GPU_WIDTH}, got {tensors[0].shape[-1]}"
    return backends.why_not_device(NAME, backend, tensors[0].device.type)


def layer_norm_modulate(
    x: torch.Tensor,
    *,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor:
    """``y = LayerNorm(x) * (1 + scale) + shift`` in one pass, with gradients for every tensor.

    Semantics of ``torch.nn.functional.layer_norm`` over the last dimension, followed by the
    modulation of adaLN (Peebles & Xie 2023, Scalable Diffusion Models with Transformers).
    Statistics and arithmetic are float32 for float32, bfloat16 and float16, float64 for float64.
    Without shift, scale, weight and bias it is plain LayerNorm.

    Args:
        x: [*, E] floating point, [B, *, E] with a modulation; other strides than contiguous are
            copied first.
        shift, scale: [B, E] (one for all tokens of a sample) or in the shape of x (one per token),
            any floating dtype; given both, they have one shape, and one dtype if it is per token.
        weight, bias: [E], any floating dtype.
        eps: added to the variance.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        In the shape and dtype of x, contiguous. Under CUDA autocast float32, as torch's.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> x, (shift, scale) = torch.randn(2, 5, 16), torch.randn(2, 32).chunk(2, 1)
        >>> y = vitkit.layer_norm_modulate(x, shift=shift, scale=scale)
        >>> want = torch.nn.functional.layer_norm(x, (16,), eps=1e-6)
        >>> torch.allclose(y, want * (1 + scale[:, None]) + shift[:, None], atol=1e-5)
        True
    """
    options = (shift, scale, weight, bias)
    if backend == "auto" == backends.DEFAULT:
        try:
            if _library.is_plain_cpu_call(x) and not _library.differentiated(x, *options):
                return _FWD(x, *options, eps)[0]
        except Exception:
            pass  # refused: the checks below say why, or choose another backend
    if isinstance(x, torch.Tensor) and x.is_cuda and torch.is_autocast_enabled("cuda"):
        # As torch autocasts layer_norm: on CUDA, and only there.
        x = x.float() if x.dtype != torch.float64 else x
    plan = _plan(x, options, eps, backend)
    if not torch.compiler.is_compiling():
        _library.register_flops()
    if plan.fwd is None:
        return reference(x, shift, scale, weight, bias, eps)
    x = x.contiguous() if plan.copy else x
    if any(plan.adapt):
        shift, scale, weight, bias = options = tuple(
            _library.readable_rows(t, x) if t is not None and wanted else t
            for t, wanted in zip(options, plan.adapt, strict=True)
        )  # type: ignore[assignment]
    if _library.differentiated(x, *options):
        if torch.compiler.is_compiling():
            x, shift, scale, weight, bias = _library.distinct(x, *options)
        return _library.apply(
            _LayerNormModulate, x, shift, scale, weight, bias, float(eps), plan.overload
        )[0]
    return plan.fwd(x, shift, scale, weight, bias, eps)[0]


class _Plan(NamedTuple):
    """All that shapes, strides, dtypes and devices decide about a call."""

    fwd: Any  # the operator, None for the reference
    overload: str
    copy: bool  # x is not contiguous
    adapt: tuple[bool, ...]  # of shift, scale, weight, bias: kernels do not read it as it is


def _plan(x, options, eps, backend) -> _Plan:
    """Validates the call and chooses its backend, once for calls of the same layout."""
    key = _library.layout_key(eps, backend, x, *options)
    plan = _memo.get(key)
    if plan is not None:
        return plan
    shift, scale, weight, bias = options
    device_type, reasons = _check(x, shift=shift, scale=scale, weight=weight, bias=bias, eps=eps)
    chosen = backends.select(NAME, backend, device_type, reasons)
    overload = "triton" if chosen == "triton" else "default"
    plan = _Plan(
        None
        if chosen == "reference"
        else getattr(torch.ops.vitkit.layer_norm_modulate_fwd, overload),
        overload,
        not x.is_contiguous(),
        tuple(t is not None and not _library.rows_are_readable(t, x) for t in options),
    )
    _memo.put(key, plan)
    return plan


backends.OPS[NAME] = backends.Op(layer_norm_modulate, _check)
