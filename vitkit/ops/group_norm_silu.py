"""GroupNorm with its neighbours in one pass.

    y = act(GN(x + add[:, :, None...]) * (1 + scale) + shift),   GN(h) = (h - mean) * rstd * weight
    + bias

mean and rstd are taken over each sample's group of C / num_groups channels and all positions, in
float32 (two-pass, merged by Chan's formula, never E[x^2] - E[x]^2), whatever the dtype of x, and
kept in float32 for the backward pass.
Results are deterministic: no atomics. Both NCHW and channels_last inputs are read and written in
their own layout.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vitkit import _library, backends
from vitkit._checks import (
    check_floating,
    check_same_device,
    check_shape,
    why_not_dtype,
)

NAME = "group_norm_silu"
_memo = _library.Memo()


def reference(
    x: torch.Tensor,  # [N, C, *]
    num_groups: int,
    weight: torch.Tensor | None,  # [C]
    bias: torch.Tensor | None,  # [C]
    eps: float,
    silu: bool,
    add: torch.Tensor | None,  # [N, C]
    scale: torch.Tensor | None,  # [N, C]
    shift: torch.Tensor | None,  # [N, C]
) -> torch.Tensor:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice."""
    compute = torch.promote_types(x.dtype, torch.float32)
    per_channel = (*x.shape[:2], *(1,) * (x.dim() - 2))
    h = x.to(compute)
    if add is not None:
        h = h + add.to(compute).view(per_channel)
    grouped = h.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    centred = grouped - grouped.mean(2, keepdim=True)
    # The mean of values far from zero is itself rounded; what it missed is still in the residuals.
    centred = centred - centred.mean(2, keepdim=True)
    variance = centred.square().mean(2, keepdim=True)
    y = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        y = y * weight.to(compute).view(1, *per_channel[1:])
    if bias is not None:
        y = y + bias.to(compute).view(1, *per_channel[1:])
    if scale is not None:
        y = y * (1 + scale.to(compute).view(per_channel))
    if shift is not None:
        y = y + shift.to(compute).view(per_channel)
    if silu:
        y = F.silu(y)
    return _dense(y.to(x.dtype), _channels_last(x))


def _channels_last(x: torch.Tensor) -> bool:
    """Whether x lies in memory as [N, *, C] and not as [N, C, *]."""
    # Asked through a permuted view: vmap cannot answer is_contiguous(memory_format=...).
    return x.dim() in (4, 5) and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _dense(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x itself if it has the layout asked for, otherwise a copy that has."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


# ---- operators ----

_OPTIONS = "Tensor? weight, Tensor? bias, {eps}bool silu, Tensor? add, Tensor? scale, Tensor? shift"
_FWD_SCHEMA = (
    f"(Tensor x, int num_groups, {_OPTIONS.format(eps='float eps, ')}) -> (Tensor, Tensor, Tensor)"
)
_BWD_SCHEMA = (
    f"(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, {_OPTIONS.format(eps='')})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _dense_image(x: torch.Tensor) -> torch.Tensor:
    """x as it lies where it is contiguous or channels_last, else a contiguous copy."""
    return x if _channels_last(x) else x.contiguous()


def _fwd_fake(x, num_groups, weight, bias, eps, silu, add, scale, shift):
    stats = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return torch.empty_like(_dense_image(x)), stats, torch.empty_like(stats)


def _bwd_fake(grad, x, mean, rstd, num_groups, weight, bias, silu, add, scale, shift):
    small = [
        t.new_empty(t.shape) if t is not None else x.new_empty(0)
        for t in (weight, bias, add, scale, shift)
    ]
    return (torch.empty_like(_dense_image(x)), *small)


def _fwd_triton(x, *args: Any):
    return importlib.import_module("vitkit.kernels.group_norm_silu").forward(_dense_image(x), *args)


def _bwd_triton(grad, x, *args: Any):
    x = _dense_image(x)
    grad = _dense(grad, _channels_last(x))
    return importlib.import_module("vitkit.kernels.group_norm_silu").backward(grad, x, *args)


def _fwd_flops(x_shape, *args, **kwargs) -> int:
    """12 per element: 3 for the statistics, 4 for normalise and affine, 5 for SiLU with exp counted
    once."""
    return 12 * math.prod(x_shape)


def _bwd_flops(grad_shape, *args, **kwargs) -> int:
    """Twice the forward pass."""
    return 2 * _fwd_flops(grad_shape)


_library.define(
    "group_norm_silu_fwd", _FWD_SCHEMA, fake=_fwd_fake, triton=_fwd_triton, flops=_fwd_flops,
    any_strides=True,
)  # fmt: skip
_library.define(
    "group_norm_silu_bwd", _BWD_SCHEMA, fake=_bwd_fake, triton=_bwd_triton, flops=_bwd_flops,
    any_strides=True,
)  # fmt: skip
_FWD = torch.ops.vitkit.group_norm_silu_fwd.default


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(x, num_groups, weight, bias, eps, silu, add, scale, shift, overload):
        op = getattr(torch.ops.vitkit.group_norm_silu_fwd, overload)
        return op(x, num_groups, weight, bias, eps, silu, add, scale, shift)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.num_groups, weight, bias, ctx.eps, ctx.silu, add, scale, shift, ctx.overload = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, mean, rstd, weight, bias, add, scale, shift)

    @staticmethod
    def backward(ctx, grad, _grad_mean, _grad_rstd):
        x, mean, rstd, weight, bias, add, scale, shift = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad
            found = _library.differentiable_backward(
                lambda x, w, b, a, sc, sh: (
                    reference(x, ctx.num_groups, w, b, ctx.eps, ctx.silu, a, sc, sh),
                ),
                (x, weight, bias, add, scale, shift),
                (grad,),
                (needed[0], needed[2], needed[3], *needed[6:9]),
            )
        else:
            op = getattr(torch.ops.vitkit.group_norm_silu_bwd, ctx.overload)
            found = op(
                grad, x, mean, rstd, ctx.num_groups, weight, bias, ctx.silu, add, scale, shift
            )
        dx, dweight, dbias, dadd, dscale, dshift = found
        given = (weight, bias, add, scale, shift)
        dweight, dbias, dadd, dscale, dshift = (
            g if t is not None else None
            for g, t in zip((dweight, dbias, dadd, dscale, dshift), given, strict=True)
        )
        return dx, None, dweight, dbias, None, None, dadd, dscale, dshift, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_GroupNormSilu.apply, info, in_dims, args)


# ---- checks and choice of the backend
# ----------------------------------------------------------------------------


def _check(
    x,
    num_groups,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    activation="silu",
    add=None,
    scale=None,
    shift=None,
):
    """Validates a call; returns what backends.select needs."""
    check_floating(NAME, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{NAME}: x must have shape [N, C, *], got {tuple(x.shape)}")
    if isinstance(num_groups, bool) or not isinstance(num_groups, (int, torch.SymInt)):
        raise TypeError(f"{NAME}: num_groups must be an int, got {type(num_groups).__name__}")
    n, c = x.shape[:2]
    if num_groups < 1 or c == 0 or c % num_groups != 0:
        raise ValueError(
            f"{NAME}: num_groups must be at least 1 and divide C = {c}, got {num_groups}"
        )
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"{NAME}: eps must be a number >= 0, got {eps!r}")
    if activation not in ("silu", None):
        raise ValueError(f"{NAME}: activation must be 'silu' or None, got {activation!r}")
    for arg, value, shape, names in (
        ("weight", weight, (c,), "[C]"),
        ("bias", bias, (c,), "[C]"),
        ("add", add, (n, c), "[N, C]"),
        ("scale", scale, (n, c), "[N, C]"),
        ("shift", shift, (n, c), "[N, C]"),
    ):
        if value is not None:
            check_floating(NAME, arg, value)
            check_same_device(NAME, arg, value, x, "x")
            check_shape(NAME, arg, value, shape, names)
    tensors = [t for t in (x, weight, bias, add, scale, shift) if t is not None]
    return x.device.type, lambda backend: why_not(backend, tensors)


def why_not(backend: str, tensors: list[torch.Tensor]) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    device_type = tensors[0].device.type
    return why_not_dtype(*tensors) or backends.why_not_device(NAME, backend, device_type)


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = "silu",
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``y = act(GroupNorm(x + add) * (1 + scale) + shift)`` in one pass, with gradients for every
    tensor.

    Semantics of ``torch.nn.functional.group_norm`` followed by ``silu`` (Wu & He 2018, Group
    Normalization); ``add`` is the time-embedding addition and ``scale``, ``shift`` the modulation
    of diffusers' ResnetBlock2D. Statistics and arithmetic are float32 for float32, bfloat16 and
    float16, float64 for float64.

    Args:
        x: [N, C, *] floating point; contiguous and channels_last(_3d) inputs give outputs of the
            same layout, other strides are copied to contiguous first.
        num_groups: divides C.
        weight, bias: [C], any floating dtype.
        eps: added to the variance.
        activation: ``"silu"`` or None.
        add, scale, shift: [N, C], any floating dtype, broadcast over positions.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        [N, C, *] in the dtype of x.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> x = torch.randn(2, 32, 8, 8)
        >>> y = vitkit.group_norm_silu(x, 8, torch.ones(32), torch.zeros(32))
        >>> want = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8))
        >>> torch.allclose(y, want, atol=1e-5)
        True
    """
    silu = activation == "silu"
    options = (weight, bias, add, scale, shift)
    if backend == "auto" == backends.DEFAULT and (silu or activation is None):
        try:
            if _library.is_plain_cpu_call(x) and not _library.differentiated(x, *options):
                return _FWD(x, num_groups, weight, bias, eps, silu, add, scale, shift)[0]
        except Exception:
            pass  # refused: the checks below say why, or choose another backend
    if isinstance(x, torch.Tensor) and x.is_cuda and torch.is_autocast_enabled("cuda"):
        # As torch autocasts group_norm: on CUDA, and only there.
        x = x.float() if x.dtype != torch.float64 else x
    plan = _plan(x, num_groups, eps, activation, options, backend)
    if not torch.compiler.is_compiling():
        _library.register_flops()
    if plan.fwd is None:
        return reference(x, num_groups, weight, bias, eps, silu, add, scale, shift)
    if _library.differentiated(x, *options):
        x = _dense_image(x)  # what is kept for the gradient
        if torch.compiler.is_compiling():
            x, *rest = _library.distinct(x, *options)
            weight, bias, add, scale, shift = rest
        return _library.apply(
            _GroupNormSilu,
            x,
            num_groups,
            weight,
            bias,
            float(eps),
            silu,
            add,
            scale,
            shift,
            plan.overload,
        )[0]
    return plan.fwd(x, num_groups, weight, bias, eps, silu, add, scale, shift)[0]


class _Plan(NamedTuple):
    """All that shapes, strides, dtypes and devices decide about a call."""

    fwd: Any  # the operator, None for the reference
    overload: str


def _plan(x, num_groups, eps, activation, options, backend) -> _Plan:
    """Validates the call and chooses its backend, once for calls of the same layout."""
    key = _library.layout_key(num_groups, eps, activation, backend, x, *options)
    plan = _memo.get(key)
    if plan is not None:
        return plan
    weight, bias, add, scale, shift = options
    device_type, reasons = _check(
        x,
        num_groups,
        weight,
        bias,
        eps,
        activation=activation,
        add=add,
        scale=scale,
        shift=shift,
    )
    chosen = backends.select(NAME, backend, device_type, reasons)
    overload = "triton" if chosen == "triton" else "default"
    plan = _Plan(
        None if chosen == "reference" else getattr(torch.ops.vitkit.group_norm_silu_fwd, overload),
        overload,
    )
    _memo.put(key, plan)
    return plan


backends.OPS[NAME] = backends.Op(group_norm_silu, _check)
