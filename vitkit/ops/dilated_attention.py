"""LongNet's dilated attention: several sparse attentions over the same tokens, mixed by their
softmax denominators.

Branch b cuts the tokens into segments of w_b; of a segment, head h keeps every r_b-th token from
phase h // ceil(H / r_b) on, and attends within what it kept:

    out_t = sum_b a_b(t) O_b(t),   a_b(t) = exp(lse_b(t)) / sum_c exp(lse_c(t))

over the branches that keep token t of head h; 0 where none does. The weights a_b are detached:
they have no gradient, as in the published code. Slots of a segment behind the last token hold zeros
that ARE attended (score 0, value 0), as GigaPath's and LongViT's weights were trained. With
``causal``, a slot attends itself and the slots before it, so real tokens see no zeros.

Mixing by denominators is one softmax over all branches' keys, a key held by m branches counted m
times; lse is the logarithm of that sum. The backward pass therefore uses p = exp(s - lse) in every
branch, and differs from that of one softmax only in its delta, grad . O_b, per branch.

A segment whose length r does not divide has ceil(w / r) * r slots. The published code writes such
segments back at that distance, so that later segments drift: ``alignment="torchscale"`` repeats it,
``"segment"`` puts each result at its token.

Statistics and accumulators are float32 (float64 in the reference for float64 inputs).
Deterministic: no atomics.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
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

NAME = "dilated_attention"
ALIGNMENTS = ("segment", "torchscale")
MAX_HEAD_DIM = 256
MAX_CUDA_BRANCHES = 32  # they are parameters of the C++ kernels
_memo = _library.Memo()


class Branch(NamedTuple):
    """One branch over N tokens, as every backend lays it out."""

    length: int  # of a segment, at most N
    ratio: int
    segments: int
    slots: int  # of a segment: ceil(length / ratio), of one head
    rows: int  # of all segments: what a head's output takes, rounded up over the phases


def branches(
    tokens: int, segment_lengths: Sequence[int], dilation_ratios: Sequence[int], torchscale: bool
) -> list[Branch]:
    """The branches over ``tokens`` tokens. Row i of segment s of a branch's output is row
    s * slots + i of ``rows``; what lies behind the last token has no row."""
    result = []
    for wanted, ratio in zip(segment_lengths, dilation_ratios, strict=True):
        length = min(wanted, tokens)
        segments = -(-tokens // length)
        slots = -(-length // ratio)
        # In output order, segments begin `pitch` tokens apart.
        pitch = slots * ratio if torchscale else length
        last = min(segments, -(-tokens // pitch)) - 1
        rest = tokens - last * pitch
        rows = last * slots + min(slots, -(-rest // ratio))
        result.append(Branch(length, ratio, segments, slots, rows))
    return result


def _slots(branch: Branch, tokens: int, phase: int, torchscale: bool, device: Any):
    """(input token, output token) of slot i of segment s [segments, slots]; ``tokens`` where there
    is none."""
    place = phase + torch.arange(branch.slots, device=device) * branch.ratio
    start = torch.arange(branch.segments, device=device)[:, None]
    token = start * branch.length + place
    token = torch.where((place < branch.length) & (token < tokens), token, tokens)
    if not torchscale:
        return token, token
    pitch = branch.slots * branch.ratio
    return token, (start * pitch + place).clamp(max=tokens)


def reference(
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,
    v: torch.Tensor,
    segment_lengths: Sequence[int],
    dilation_ratios: Sequence[int],
    causal: bool,
    scale: float,
    torchscale: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain PyTorch, by gathering: any device, any floating dtype,
    differentiable twice. Returns out [B, N, H, D] and lse [B, H, N]."""
    b, n, heads, d = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0:
        return q + k + v, q.new_full((b, heads, n), -math.inf, dtype=compute)
    # Token n is the zeros behind the last one.
    qe, ke, ve = (torch.cat([t, t.new_zeros(b, 1, heads, d)], 1).to(compute) for t in (q, k, v))
    outs, lses = [], []
    for branch in branches(n, segment_lengths, dilation_ratios, torchscale):
        out = q.new_zeros((b, n + 1, heads, d), dtype=compute)
        lse = q.new_full((b, n + 1, heads), -math.inf, dtype=compute)
        group = -(-heads // branch.ratio)
        for phase in range(-(-heads // group)):
            hs = slice(phase * group, min((phase + 1) * group, heads))
            token, target = _slots(branch, n, phase, torchscale, q.device)
            qs, ks, vs = (t[:, :, hs][:, token] for t in (qe, ke, ve))  # [B, segments, slots, h, D]
            scores = torch.einsum("bsihd,bsjhd->bshij", qs, ks) * scale
            if causal:
                i = torch.arange(branch.slots, device=q.device)
                scores = scores.masked_fill(i[None, :] > i[:, None], -math.inf)
            o = torch.einsum("bshij,bsjhd->bsihd", scores.softmax(-1), vs)
            z = scores.logsumexp(-1).transpose(2, 3)
            keep = target.flatten() < n
            where = _index(b, target.flatten()[keep], hs, q.device)
            out = out.index_put(where, o.reshape(b, -1, o.shape[3], d)[:, keep])
            lse = lse.index_put(where, z.reshape(b, -1, z.shape[3])[:, keep])
        outs.append(out[:, :n])
        lses.append(lse[:, :n])
    stacked = torch.stack(lses)
    empty = (stacked == -math.inf).all(0)
    safe = stacked.masked_fill(empty, 0)  # a row without keys has no gradient
    weights = safe.detach().softmax(0).masked_fill(empty, 0)
    out = (torch.stack(outs) * weights[..., None]).sum(0)
    lse = safe.logsumexp(0).masked_fill(empty, -math.inf).transpose(1, 2)
    return out.to(q.dtype), lse


def _index(batch: int, tokens: torch.Tensor, heads: slice, device: Any):
    """Index of [batch, tokens, heads], broadcasting."""
    return (
        torch.arange(batch, device=device)[:, None, None],
        tokens[None, :, None],
        torch.arange(heads.start, heads.stop, device=device)[None, None, :],
    )


# ---- operators ----

_OPTIONS = "int[] segment_lengths, int[] dilation_ratios, bool causal, float scale, bool torchscale"
_FWD_SCHEMA = (
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool need_branches) -> (Tensor, Tensor, Tensor)"
)
_BWD_SCHEMA = (
    "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor branch_out,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)


def branch_rows(tokens, segment_lengths, dilation_ratios, torchscale) -> int:
    """Rows of branch_out [B, rows, H, D]: those of all branches, one branch after the other."""
    return sum(b.rows for b in branches(tokens, segment_lengths, dilation_ratios, torchscale))


def _fwd_fake(q, k, v, segment_lengths, dilation_ratios, causal, scale, torchscale, need_branches):
    b, n, heads, d = q.shape
    rows = branch_rows(n, segment_lengths, dilation_ratios, torchscale) if need_branches else 0
    return (
        q.new_empty((b, n, heads, d)),
        q.new_empty((b, heads, n), dtype=torch.float32),
        q.new_empty((b, rows, heads, d)),
    )


def _bwd_fake(grad, grad_lse, q, k, v, *args):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.dilated_attention").forward(*args)


def _bwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.dilated_attention").backward(*args)


def _fwd_flops(q_shape, k_shape, v_shape, segment_lengths, dilation_ratios, *args, **kwargs) -> int:
    """2 products of 2 * slots * slots * D per segment and head; causal calls count the square."""
    b, n, heads, d = q_shape
    pairs = sum(
        x.segments * x.slots**2 for x in branches(n, segment_lengths, dilation_ratios, False)
    )
    return 4 * b * heads * pairs * d


def _bwd_flops(grad, grad_lse, q, k, v, lse, branch_out, *args, **kwargs) -> int:
    """5 products where the forward pass has 2."""
    return 5 * _fwd_flops(q, k, v, *args) // 2


_library.define(f"{NAME}_fwd", _FWD_SCHEMA, fake=_fwd_fake, triton=_fwd_triton, flops=_fwd_flops)
_library.define(f"{NAME}_bwd", _BWD_SCHEMA, fake=_bwd_fake, triton=_bwd_triton, flops=_bwd_flops)


class _DilatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, segment_lengths, dilation_ratios, causal, scale, torchscale, overload):
        op = getattr(torch.ops.vitkit.dilated_attention_fwd, overload)
        return op(q, k, v, segment_lengths, dilation_ratios, causal, scale, torchscale, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.overload = inputs
        ctx.options = tensors[3:]
        _, lse, branch_out = output
        ctx.mark_non_differentiable(branch_out)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:3], lse, branch_out)

    @staticmethod
    def backward(ctx, grad, grad_lse, _):
        q, k, v, lse, branch_out = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 9
        if torch.is_grad_enabled():
            grads = _library.differentiable_backward(
                lambda *inputs: reference(*inputs, *ctx.options),
                (q, k, v),
                (grad, grad_lse),
                ctx.needs_input_grad[:3],
            )
        else:
            op = getattr(torch.ops.vitkit.dilated_attention_bwd, ctx.overload)
            grad = torch.zeros_like(q) if grad is None else grad
            grads = op(grad, grad_lse, q, k, v, lse, branch_out, *ctx.options)
        return (*grads, *(None,) * 6)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_DilatedAttention.apply, info, in_dims, args)


# ---- checks and choice of the backend ----


def _positive(arg: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 1 for i in values
    ):
        raise ValueError(f"{NAME}: {arg} must be a list of integers of at least 1, got {values!r}")
    if not values:
        raise ValueError(f"{NAME}: {arg} must not be empty, got {values!r}")
    return tuple(values)


def _check(
    q,
    k,
    v,
    *,
    segment_lengths,
    dilation_ratios,
    causal=False,
    scale=None,
    alignment="segment",
    return_lse=False,
):
    """Validates a call; returns what backends.select needs."""
    check_floating(NAME, "q", q)
    if q.dim() != 4 or min(q.shape[2:]) < 1:
        raise ValueError(f"{NAME}: q must have shape [B, N, H, D], got {tuple(q.shape)}")
    for arg, value in (("k", k), ("v", v)):
        check_floating(NAME, arg, value)
        check_same_device(NAME, arg, value, q, "q")
        check_same_dtype(NAME, arg, value, q, "q")
        check_shape(NAME, arg, value, tuple(q.shape), "that of q")
    lengths = _positive("segment_lengths", segment_lengths)
    ratios = _positive("dilation_ratios", dilation_ratios)
    if len(lengths) != len(ratios):
        raise ValueError(
            f"{NAME}: dilation_ratios must have one ratio per segment length ({len(lengths)}),"
            f" got {len(ratios)}"
        )
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (number and abs(scale) < math.inf):
        raise ValueError(f"{NAME}: scale must be a finite number or None, got {scale!r}")
    if alignment not in ALIGNMENTS:
        raise ValueError(f"{NAME}: alignment must be one of {ALIGNMENTS}, got {alignment!r}")
    return q.device.type, lambda backend: why_not(backend, q, len(lengths))


def why_not(backend: str, q: torch.Tensor, branch_count: int = 1) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    reason = why_not_dtype(q)
    if reason is not None:
        return reason
    head_dim = q.shape[-1]
    if head_dim % 8 != 0 or head_dim > MAX_HEAD_DIM:
        return (
            f"its kernels need a head dim that is a multiple of 8 up to {MAX_HEAD_DIM},"
            f" got {head_dim}"
        )
    if backend == "cuda" and branch_count > MAX_CUDA_BRANCHES:
        return f"its kernels take up to {MAX_CUDA_BRANCHES} branches, got {branch_count}"
    return backends.why_not_device(NAME, backend, q.device.type)


def dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_ratios: Sequence[int],
    causal: bool = False,
    scale: float | None = None,
    alignment: str = "segment",
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LongNet's attention over segments of several lengths, each thinned out by its own ratio.

    Semantics of torchscale's ``DilatedAttention`` (Ding et al. 2023), as Prov-GigaPath's slide
    encoder and LongViT use it; weights trained there give the same features here. One difference:
    torchscale takes a log-sum-exp of exactly 0 for a row without keys, this op does not.

    Args:
        q, k, v: [B, N, H, D] after the projections; float32, bfloat16, float16 or float64.
        segment_lengths, dilation_ratios: one integer of at least 1 each per branch. A segment
            longer than N is one of N; a ratio larger than H leaves the phases from H on unused.
        causal: a slot attends itself and the slots before it in its segment.
        scale: factor of the scores, D ** -0.5 if None.
        alignment: ``"segment"``, or ``"torchscale"`` for the published code's placement, which
            differs where a ratio does not divide its segment and there is more than one segment.
        return_lse: also return the log-sum-exp over all branches' scores.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        out with the shape and dtype of q; with ``return_lse`` also lse [B, H, N], float32 (float64
        for float64 inputs), -inf and out 0 where no branch keeps a token.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> q, k, v = torch.randn(1, 100, 3, 4, 24).unbind(2)
        >>> vitkit.dilated_attention(
        ...     q, k, v, segment_lengths=[16, 64], dilation_ratios=[1, 2]
        ... ).shape
        torch.Size([1, 100, 4, 24])
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        q, k, v = _library.autocast(q, k, v)
    plan = _plan(q, k, v, segment_lengths, dilation_ratios, causal, scale, alignment, backend)
    if not torch.compiler.is_compiling():
        _library.register_flops()
    factor, overload = plan
    lengths, ratios = list(segment_lengths), list(dilation_ratios)
    options = (lengths, ratios, causal, factor, alignment == "torchscale")
    if overload is None or q.numel() == 0:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = reference(q, k, v, *options)
        return (out, lse) if return_lse else out
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        tensors = _library.distinct(q, k, v) if torch.compiler.is_compiling() else (q, k, v)
        out, lse, _ = _library.apply(_DilatedAttention, *tensors, *options, overload)
    else:
        op = getattr(torch.ops.vitkit.dilated_attention_fwd, overload)
        out, lse, _ = op(q, k, v, *options, False)
    return (out, lse) if return_lse else out


def _plan(q, k, v, segment_lengths, dilation_ratios, causal, scale, alignment, backend):
    """Validates the call and chooses its backend, once for calls of the same layout: (scale,
    overload or None for the reference)."""
    lists = tuple(
        tuple(p) if isinstance(p, (list, tuple)) else p for p in (segment_lengths, dilation_ratios)
    )
    key = _library.layout_key(lists, scale, alignment, backend, q, k, v)
    plan = _memo.get(key)
    if plan is not None:
        return plan
    device_type, reasons = _check(
        q,
        k,
        v,
        segment_lengths=segment_lengths,
        dilation_ratios=dilation_ratios,
        causal=causal,
        scale=scale,
        alignment=alignment,
    )
    chosen = backends.select(NAME, backend, device_type, reasons)
    plan = (
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        {"reference": None, "triton": "triton"}.get(chosen, "default"),
    )
    _memo.put(key, plan)
    return plan


backends.OPS[NAME] = backends.Op(dilated_attention, _check)
