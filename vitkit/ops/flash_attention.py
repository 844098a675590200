"""Exact attention by online softmax, without the [B, H, Nq, Nk] score matrix.

    s_ij = scale * q_i . k_j + bias_ij,   out_i = sum_j softmax_j(s_ij) v_j,
    lse_i = log sum_j exp(s_ij)

Dense batches [B, N, H, D] or packed sequences [T, H, D] with cu_seqlens. Scores, softmax statistics
and accumulators are float32 (float64 in the reference for float64 inputs). A row that may attend
nothing gives out 0, lse -inf and zero gradients. Deterministic: no atomics. A bias is a tensor or a
structured one (vitkit/score_bias.py), which has operators of its own; its gradient is reduced to
the bias's own shape inside the kernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vitkit import _library, backends
from vitkit._checks import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    why_not_dtype,
)
from vitkit.score_bias import SCORE_BIASES, DecomposedBias, DistanceBias, ScoreBias

NAME = "flash_attention"
MAX_HEAD_DIM = 256
MAX_CUDA_STRUCTURED_HEAD_DIM = 128  # of the C++ kernels in float32
_memo = _library.Memo()


def reference(
    q: torch.Tensor,  # [B, Nq, H, D] or [Tq, H, D]
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | ScoreBias | None,  # broadcastable to [B, H, Nq, Nk]
    cu_seqlens_q: torch.Tensor | None,  # [S + 1]
    cu_seqlens_k: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain PyTorch: any device, any floating dtype, any head dim,
    differentiable twice."""
    if cu_seqlens_q is not None:
        assert cu_seqlens_k is not None
        allowed = _packed_mask(q.shape[0], k.shape[0], cu_seqlens_q, cu_seqlens_k, causal)
        out, lse = reference(q[None], k[None], v[None], allowed, None, None, False, scale)
        return out[0], lse[0]
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(compute), k.to(compute)) * scale
    if isinstance(bias, SCORE_BIASES):
        scores = scores + bias.dense(compute)
    elif bias is not None:
        scores = (
            scores.masked_fill(~bias, -math.inf)
            if bias.dtype == torch.bool
            else scores + bias.to(compute)
        )
    if causal:
        rows = torch.arange(q.shape[1], device=q.device)[:, None]
        columns = torch.arange(k.shape[1], device=q.device)[None, :]
        scores = scores.masked_fill(columns > rows, -math.inf)
    # The shift by the row maximum cancels exactly, so no gradient flows through it; -inf rows are
    # shifted by 0.
    peak = (
        scores.detach().amax(-1, keepdim=True)
        if k.shape[1]
        else scores.new_zeros((*scores.shape[:3], 1))
    )
    peak = peak.masked_fill(peak == -math.inf, 0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights / total, v.to(compute))
    lse = (torch.log(total) + peak).masked_fill(empty, -math.inf).squeeze(-1)
    return out.to(q.dtype), lse.to(torch.promote_types(torch.float32, compute))


def _packed_mask(tokens_q, tokens_k, cu_seqlens_q, cu_seqlens_k, causal):
    """[1, 1, Tq, Tk] bool: same sequence, and not after the query when causal."""

    def sequence_and_position(tokens, cu_seqlens):
        index = torch.arange(tokens, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
        starts = torch.cat([cu_seqlens[:1], cu_seqlens]).long()
        return sequence, index - starts[sequence.clamp(max=len(cu_seqlens) - 1) + 1]

    sequence_q, position_q = sequence_and_position(tokens_q, cu_seqlens_q)
    sequence_k, position_k = sequence_and_position(tokens_k, cu_seqlens_k)
    allowed = sequence_q[:, None] == sequence_k[None, :]
    if causal:
        allowed = allowed & (position_k[None, :] <= position_q[:, None])
    return allowed[None, None]


# ---- operators ----


class _Term(NamedTuple):
    """A kind of score term. Its operators are ``flash_attention{suffix}_fwd`` and ``_bwd``; the
    plain one also holds the packed sequences, which no other kind has."""

    bias: type | None
    tensors: tuple[str, ...]  # arguments of the operators, after q, k, v
    gradients: int  # the first so many of them have one


_TERMS = {
    "": _Term(None, ("Tensor? bias", "Tensor? cu_seqlens_q", "Tensor? cu_seqlens_k"), 1),
    "_decomposed": _Term(DecomposedBias, ("Tensor rel_h", "Tensor rel_w"), 2),
    "_distance": _Term(DistanceBias, ("Tensor slopes", "Tensor coords_q", "Tensor coords_k"), 1),
}


def _fwd_fake(q, k, v, *rest):
    *batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((*batch, heads, tokens), dtype=torch.float32)


def _bwd_fake(gradients, grad, grad_lse, q, k, v, out, lse, *rest):
    need_dterm = rest[-1]
    dterm = (t.new_empty(t.shape) if need_dterm else q.new_empty(0) for t in rest[:gradients])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *dterm


def _triton(function: str) -> Callable[..., Any]:
    def launcher(*args: Any) -> Any:
        kernels = importlib.import_module("vitkit.kernels.flash_attention")
        return getattr(kernels, function)(*args)

    return launcher


def _fwd_flops(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    """2 products of 2 * Nq * Nk * D per head; packed and causal calls count the whole rectangle."""
    *batch, nq, heads, head_dim = q_shape
    return 4 * math.prod(batch) * heads * nq * k_shape[-3] * head_dim


def _bwd_flops(grad_shape, grad_lse_shape, q_shape, k_shape, *args, **kwargs) -> int:
    """5 products where the forward pass has 2."""
    return 5 * _fwd_flops(q_shape, k_shape, k_shape) // 2


def _define(suffix: str, term: _Term) -> None:
    tensors = ", ".join(term.tensors)
    _library.define(
        f"flash_attention{suffix}_fwd",
        f"(Tensor q, Tensor k, Tensor v, {tensors}, bool causal, float scale) -> (Tensor, Tensor)",
        fake=_fwd_fake,
        triton=_triton(f"forward{suffix}"),
        flops=_fwd_flops,
    )
    _library.define(
        f"flash_attention{suffix}_bwd",
        "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        f" {tensors}, bool causal, float scale, bool need_dterm)"
        f" -> ({', '.join(['Tensor'] * (3 + term.gradients))})",
        fake=functools.partial(_bwd_fake, term.gradients),
        triton=_triton(f"backward{suffix}"),
        flops=_bwd_flops,
    )


for _suffix, _term in _TERMS.items():
    _define(_suffix, _term)
_FWD = torch.ops.vitkit.flash_attention_fwd.default


def _operator(suffix: str, direction: str, overload: str) -> Any:
    return getattr(getattr(torch.ops.vitkit, f"{NAME}{suffix}_{direction}"), overload)


def _reference_of(suffix: str, causal: bool, scale: float) -> Callable[..., Any]:
    """The reference as a function of the tensors of an operator."""
    structured = _TERMS[suffix].bias

    def call(q, k, v, *tensors):
        bias, cu_q, cu_k = (structured(*tensors), None, None) if structured else tensors
        return reference(q, k, v, bias, cu_q, cu_k, causal, scale)

    return call


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(suffix, overload, causal, scale, q, k, v, *tensors):
        return _operator(suffix, "fwd", overload)(q, k, v, *tensors, causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.suffix, ctx.overload, ctx.causal, ctx.scale, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, grad, grad_lse):
        *inputs, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            grads = _library.differentiable_backward(
                _reference_of(ctx.suffix, ctx.causal, ctx.scale), inputs, (grad, grad_lse), needed
            )
        elif grad is None and grad_lse is None:
            return (None,) * (4 + len(inputs))
        else:
            op = _operator(ctx.suffix, "bwd", ctx.overload)
            grad = torch.zeros_like(out) if grad is None else grad
            q, k, v, *term = inputs
            options = (ctx.causal, ctx.scale, any(needed[3:]))
            found = op(grad, grad_lse, q, k, v, out, lse, *term, *options)
            grads = [*found, *(None,) * (len(inputs) - len(found))]
        return (
            None,
            None,
            None,
            None,
            *(g if n else None for g, n in zip(grads, needed, strict=True)),
        )

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_FlashAttention.apply, info, in_dims, args)


# ---- checks and choice of the backend
# ----------------------------------------------------------------------------


def _check(
    q,
    k,
    v,
    *,
    bias=None,
    causal=False,
    scale=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    return_lse=False,
):
    """Validates a call (all but the values of cu_seqlens); returns what backends.select needs."""
    check_floating(NAME, "q", q)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    layout = "[T, H, D]" if packed else "[B, N, H, D]"
    if q.dim() != (3 if packed else 4):
        hint = "" if packed else " (3-D tensors need cu_seqlens_q and cu_seqlens_k)"
        raise ValueError(f"{NAME}: q must have shape {layout}{hint}, got {tuple(q.shape)}")
    for arg, value in (("k", k), ("v", v)):
        check_floating(NAME, arg, value)
        check_same_device(NAME, arg, value, q, "q")
        check_same_dtype(NAME, arg, value, q, "q")
        if (
            value.dim() != q.dim()
            or value.shape[-2:] != q.shape[-2:]
            or (not packed and value.shape[0] != q.shape[0])
        ):
            expected = (*(() if packed else (q.shape[0],)), "N", *q.shape[-2:])
            raise ValueError(
                f"{NAME}: {arg} must match q's batch, heads and head dim, i.e. have shape"
                f" ({', '.join(map(str, expected))}), got {tuple(value.shape)}"
            )
    if v.shape != k.shape:
        raise ValueError(
            f"{NAME}: v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}"
        )
    if q.shape[-1] == 0:
        raise ValueError(f"{NAME}: q must have a head dim of at least 1, got {tuple(q.shape)}")
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (number and abs(scale) < math.inf):
        raise ValueError(f"{NAME}: scale must be a finite number or None, got {scale!r}")
    if bias is not None:
        _check_bias(bias, q, k, packed)
    if packed:
        for arg, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if value is None:
                raise ValueError(f"{NAME}: {arg} must be given together with its twin, got None")
            check_cu_seqlens(NAME, arg, value, q)
        check_shape(
            NAME,
            "cu_seqlens_k",
            cu_seqlens_k,
            tuple(cu_seqlens_q.shape),
            "that of cu_seqlens_q [S + 1]",
        )
    suffix = _suffix_of(bias)
    tensors = [q, k, v, bias] if isinstance(bias, torch.Tensor) else [q, k, v]
    return q.device.type, lambda backend: why_not(backend, tensors, q.shape[-1], suffix)


def _suffix_of(bias: Any) -> str:
    return next((s for s, t in _TERMS.items() if t.bias is not None and type(bias) is t.bias), "")


def _check_bias(bias, q, k, packed):
    structured = isinstance(bias, SCORE_BIASES)
    if not structured and not isinstance(bias, torch.Tensor):
        raise TypeError(
            f"{NAME}: bias must be a tensor, a DecomposedBias or a DistanceBias,"
            f" got {type(bias).__name__}"
        )
    if packed:
        given = type(bias).__name__ if structured else f"shape {tuple(bias.shape)}"
        raise ValueError(f"{NAME}: bias must be None for packed sequences, got {given}")
    if structured:
        bias.check(NAME, q, k.shape[1])
        return
    if bias.dtype != torch.bool:
        check_floating(NAME, "bias", bias)
    check_same_device(NAME, "bias", bias, q, "q")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(sizes) != 4 or any(b != 1 and b != f for b, f in zip(sizes, full, strict=True)):
        raise ValueError(
            f"{NAME}: bias must broadcast to [B, H, Nq, Nk] = {full}, got {tuple(bias.shape)}"
        )


def why_not(
    backend: str, tensors: list[torch.Tensor], head_dim: int, suffix: str = ""
) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    reason = why_not_dtype(*(t for t in tensors if t.dtype != torch.bool))
    if reason is not None:
        return reason
    if head_dim % 8 != 0 or head_dim > MAX_HEAD_DIM:
        return (
            f"its kernels need a head dim that is a multiple of 8 up to {MAX_HEAD_DIM},"
            f" got {head_dim}"
        )
    narrow = backend == "cuda" and suffix and tensors[0].dtype == torch.float32
    if narrow and head_dim > MAX_CUDA_STRUCTURED_HEAD_DIM:
        return (
            f"its kernels take head dims of up to {MAX_CUDA_STRUCTURED_HEAD_DIM} with this bias in"
            f" float32, got {head_dim}"
        )
    return backends.why_not_device(NAME + suffix, backend, tensors[0].device.type)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | ScoreBias | None = None,
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * q k^T + bias) v`` per head, with gradients for q, k, v, bias and through
    lse.

    Semantics of ``torch.nn.functional.scaled_dot_product_attention`` in the [B, N, H, D] layout
    that a ``qkv`` Linear produces (Vaswani et al. 2017; the online softmax of Milakov & Gimelshein
    2018 and FlashAttention, Dao et al. 2022).

    Args:
        q: [B, Nq, H, D], or packed [Tq, H, D]; float32, bfloat16, float16 or float64. Any strides
            are read in place as long as the last dimension is dense. Under autocast q, k, v are
            cast to the autocast dtype.
        k, v: [B, Nk, H, D] or packed [Tk, H, D], dtype and device of q.
        bias: broadcastable to [B, H, Nq, Nk]. Floating: added to the scaled scores, its gradient
            has its own shape.
            bool: True = attend. A :class:`DecomposedBias` or :class:`DistanceBias` is computed
            from its compact form, and so is its gradient. Not for packed sequences.
        causal: query i attends keys j <= i (aligned to the first token, as torch's ``is_causal``),
            per sequence.
        scale: factor of the scores, D ** -0.5 if None.
        cu_seqlens_q, cu_seqlens_k: int32 [S + 1], offsets of the packed sequences: 0 first, T last,
            never decreasing.
        return_lse: also return the log-sum-exp of the scores (natural log).
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. Kernels take
            head dims that are a multiple of 8 up to 256, the reference any.

    Returns:
        out with the shape and dtype of q; with ``return_lse`` also lse [B, H, Nq] (packed [H, Tq]),
        float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> qkv = torch.randn(2, 197, 3, 12, 64)
        >>> vitkit.flash_attention(*qkv.unbind(2)).shape
        torch.Size([2, 197, 12, 64])
    """
    if (
        (bias is None or isinstance(bias, torch.Tensor))
        and backend == "auto" == backends.DEFAULT
        and scale is None
        and cu_seqlens_q is None
    ):
        try:
            if _library.is_plain_cpu_call(q) and not (
                torch.is_grad_enabled()
                and (
                    q.requires_grad
                    or k.requires_grad
                    or v.requires_grad
                    or (bias is not None and bias.requires_grad)
                )
            ):
                wide = bias if bias is None else _four_dimensions(bias)
                out, lse = _FWD(q, k, v, wide, None, None, causal, q.shape[-1] ** -0.5)
                return (out, lse) if return_lse else out
        except Exception:
            pass  # refused: the checks below say why, or choose another backend
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        q, k, v = _library.autocast(q, k, v)
    plan = _plan(q, k, v, bias, causal, scale, cu_seqlens_q, cu_seqlens_k, backend)
    if not torch.compiler.is_compiling():
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            check_cu_seqlens_values(NAME, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
            check_cu_seqlens_values(NAME, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
        _library.register_flops()
    if isinstance(bias, torch.Tensor):
        bias = _four_dimensions(bias)
    if plan.fwd is None:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = reference(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, causal, plan.scale)
    else:
        if plan.copy:
            q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        term: tuple[Any, ...] = (bias, cu_seqlens_q, cu_seqlens_k)
        if isinstance(bias, SCORE_BIASES):
            term = bias.operands()
        if torch.is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or any(t is not None and t.requires_grad for t in term)
        ):
            tensors: tuple[Any, ...] = (q, k, v, *term)
            if torch.compiler.is_compiling():
                tensors = _library.distinct(*tensors)
            options = (plan.suffix, plan.overload, causal, plan.scale)
            out, lse = _library.apply(_FlashAttention, *options, *tensors)
        else:
            out, lse = plan.fwd(q, k, v, *term, causal, plan.scale)
    return (out, lse) if return_lse else out


def _four_dimensions(bias: torch.Tensor) -> torch.Tensor:
    return bias if bias.dim() >= 4 else bias[(None,) * (4 - bias.dim())]


class _Plan(NamedTuple):
    """All that shapes, strides, dtypes and devices decide about a call."""

    fwd: Any  # the operator, None for the reference
    suffix: str  # of its kind of score term
    overload: str
    scale: float
    copy: bool  # a last dimension is not dense


def _plan(q, k, v, bias, causal, scale, cu_seqlens_q, cu_seqlens_k, backend) -> _Plan:
    """Validates the call and chooses its backend, once for calls of the same layout."""
    suffix = _suffix_of(bias)
    parts = bias.tensors() if isinstance(bias, SCORE_BIASES) else (bias,)
    key = _library.layout_key(suffix, scale, backend, q, k, v, *parts, cu_seqlens_q, cu_seqlens_k)
    plan = _memo.get(key)
    if plan is not None:
        return plan
    device_type, reasons = _check(
        q,
        k,
        v,
        bias=bias,
        causal=causal,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    chosen = backends.select(NAME, backend, device_type, reasons)
    overload = "triton" if chosen == "triton" else "default"
    plan = _Plan(
        None if chosen == "reference" else _operator(suffix, "fwd", overload),
        suffix,
        overload,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        any(t.stride(-1) != 1 for t in (q, k, v)),
    )
    _memo.put(key, plan)
    return plan


def cuda_path(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | ScoreBias | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    capability: tuple[int, int] | None = None,
    **options: Any,
) -> str:
    """Which forward kernel the C++ CUDA backend takes for a (valid) call, and why not the one for
    Hopper GPUs. ``capability``: of another GPU than that of q."""
    if importlib.util.find_spec("vitkit._runtime") is None:
        return "not known, vitkit._runtime is not built"
    runtime = importlib.import_module("vitkit._runtime")
    if capability is None:
        capability = torch.cuda.get_device_capability(q.device)
    packed = cu_seqlens_q is not None
    tensors = [t[None] if packed else t for t in (q, k, v)]
    reason = runtime.why_not_hopper(
        "sm_90a" in runtime.build_facts()["cuda_archs"],
        capability[0] * 10 + capability[1],
        q.element_size(),
        packed,
        bias is not None,
        *((t.data_ptr(), list(t.shape), list(t.stride())) for t in tensors),
    )
    if reason is None:
        return "the kernel for sm_90a (emulated, not yet confirmed on hardware)"
    return f"the kernel for sm_80 and later, because {reason}"


backends.OPS[NAME] = backends.Op(flash_attention, _check, cuda_path)
