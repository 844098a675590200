"""Swin's windowed attention on the map as it lies in memory: nothing is rolled, padded or
partitioned.

    s_ij = scale * q_i . k_j + T[d(i, j)] + m(i, j)                        Swin V1
    s_ij = g * q_i . k_j / (|q_i| |k_j|) + T[d(i, j)] + m(i, j)            Swin V2
    out_i = sum_j softmax_j(s_ij) v_j                                      j in the window of i

with g = exp(min(logit_scale, ln 100)), norms of at least 1e-12, d(i, j) the relative position and
m(i, j) = -100 where the shift has brought tokens from opposite ends of the map together (additive,
as every published checkpoint was trained with it), 0 elsewhere. The map [H, W] is a grid of
[ceil(H / wh), ceil(W / ww)] windows; a place of the grid without a token holds the pad value, which
is attended but has no output.

Windows find their tokens by arithmetic: place (y, x) of the shifted grid is the token

    ((y + sh) % Hp, (x + sw) % Wp)  of the padded map    padding="pad_then_roll" (torchvision, HF)
    ((y + sh) % H, (x + sw) % W)    if y < H and x < W   padding="roll_then_pad" (timm)

which differ only where the window does not divide the map. Statistics and accumulators are float32
(float64 in the reference for float64 inputs). Deterministic: the gradient of the table is summed in
a fixed order, without atomics.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from vitkit import _library, backends
from vitkit._checks import (
    check_floating,
    check_same_device,
    check_shape,
    why_not_dtype,
)

NAME = "window_attention"
PADDINGS = ("pad_then_roll", "roll_then_pad")
MAX_HEAD_DIM = 256
MAX_WINDOW_TOKENS = 1024  # of the kernels; 24 x 24 is the largest published window
MAX_CUDA_HEAD_DIM = 128  # of the C++ kernels; every published Swin has 32
MAX_CUDA_COSINE_HEAD_DIM = 64  # of those for logit_scale
MASK = -100.0
MAX_LOGIT_SCALE = math.log(100.0)
MIN_NORM = 1e-12
_memo = _library.Memo()


def _source(size: int, window: int, shift: int, roll_first: bool, device: Any) -> torch.Tensor:
    """Token of every place of the shifted grid along one axis, ``size`` where there is none."""
    places = torch.arange(math.ceil(size / window) * window, device=device)
    if roll_first:
        return torch.where(places < size, (places + shift) % size, size)
    source = (places + shift) % len(places)
    return source.clamp(max=size)


def _regions(places: int, window: int, shift: int, device: Any) -> torch.Tensor:
    """Which of the regions that the shift has brought together each place of an axis is in."""
    y = torch.arange(places, device=device)
    if shift == 0:
        return torch.zeros_like(y)
    return (y >= places - window).long() + (y >= places - shift).long()


def _windows(grid: torch.Tensor, window: Sequence[int]) -> torch.Tensor:
    """[Hp, Wp] -> [windows, tokens of a window]"""
    hp, wp = grid.shape
    wh, ww = window
    return grid.view(hp // wh, wh, wp // ww, ww).permute(0, 2, 1, 3).reshape(-1, wh * ww)


def _relative_positions(window: Sequence[int], device: Any) -> torch.Tensor:
    """[S, S] index into the bias table: (dy + wh - 1) * (2 ww - 1) + dx + ww - 1."""
    wh, ww = window
    y = torch.arange(wh, device=device).repeat_interleave(ww)
    x = torch.arange(ww, device=device).repeat(wh)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + wh - 1) * (2 * ww - 1) + dx + ww - 1


def reference(
    qkv: torch.Tensor,  # [B, H, W, 3, heads, D]
    bias_table: torch.Tensor | None,  # [(2 wh - 1) (2 ww - 1), heads]
    logit_scale: torch.Tensor | None,  # [heads]
    pad_value: torch.Tensor | None,  # [3, heads, D]
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    roll_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice.
    Returns out [B, H, W, heads * D] and lse [B, H, W, heads]."""
    b, h, w, _, heads, d = qkv.shape
    compute = torch.promote_types(qkv.dtype, torch.float32)
    ys = _source(h, window_size[0], shift_size[0], roll_first, qkv.device)
    xs = _source(w, window_size[1], shift_size[1], roll_first, qkv.device)
    inside = (ys < h)[:, None] & (xs < w)[None, :]
    # Token h * w is the pad value.
    token = _windows(torch.where(inside, ys[:, None] * w + xs[None, :], h * w), window_size)
    pad = qkv.new_zeros(3, heads, d) if pad_value is None else pad_value.to(qkv.dtype)
    rows = torch.cat([qkv.reshape(b, h * w, 3, heads, d), pad.expand(b, 1, 3, heads, d)], 1)
    q, k, v = rows.to(compute)[:, token].unbind(3)  # [B, windows, S, heads, D]
    if logit_scale is not None:
        q = q / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(MIN_NORM)
        k = k / torch.linalg.vector_norm(k, dim=-1, keepdim=True).clamp_min(MIN_NORM)
        gain = logit_scale.to(compute).clamp(max=MAX_LOGIT_SCALE).exp()
        q = q * gain[:, None]
    else:
        q = q * scale
    scores = torch.einsum("bnihd,bnjhd->bnhij", q, k)
    if bias_table is not None:
        index = _relative_positions(window_size, qkv.device)
        scores = scores + bias_table.to(compute)[index].permute(2, 0, 1)
    region = _regions(len(ys), window_size[0], shift_size[0], qkv.device)[:, None] * 3
    region = region + _regions(len(xs), window_size[1], shift_size[1], qkv.device)
    region = _windows(region, window_size)
    scores = scores + MASK * (region[:, :, None] != region[:, None, :]).to(compute)[:, None]
    weights = scores.softmax(-1)
    out = torch.einsum("bnhij,bnjhd->bnihd", weights, v)
    lse = scores.logsumexp(-1).transpose(2, 3)
    # Every token is at exactly one place.
    place = torch.empty(h * w + 1, dtype=torch.long, device=qkv.device)
    place[token.flatten()] = torch.arange(token.numel(), device=qkv.device)
    place = place[: h * w]
    out = out.reshape(b, token.numel(), heads * d)[:, place].reshape(b, h, w, heads * d)
    lse = lse.reshape(b, token.numel(), heads)[:, place].reshape(b, h, w, heads)
    return out.to(qkv.dtype), lse


# ---- operators ----

_ARGS = (
    "Tensor? bias_table, Tensor? logit_scale, Tensor? pad_value, int[] window_size,"
    " int[] shift_size, float scale, bool roll_first"
)
_FWD_SCHEMA = f"(Tensor qkv, {_ARGS}) -> (Tensor, Tensor)"
_BWD_SCHEMA = (
    f"(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_ARGS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def _fwd_fake(qkv, bias_table, logit_scale, pad_value, window_size, shift_size, scale, roll_first):
    b, h, w, _, heads, d = qkv.shape
    return qkv.new_empty((b, h, w, heads * d)), qkv.new_empty((b, h, w, heads), dtype=torch.float32)


def _bwd_fake(grad, qkv, out, lse, bias_table, logit_scale, pad_value, *options):
    def like(t):
        return qkv.new_empty(0) if t is None else t.new_empty(t.shape)

    return qkv.new_empty(qkv.shape), like(bias_table), like(logit_scale), like(pad_value)


def _fwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.window_attention").forward(*args)


def _bwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.window_attention").backward(*args)


def _fwd_flops(qkv_shape, bias, logit_scale, pad_value, window_size, *args, **kwargs) -> int:
    """2 products of 2 * S * S * D per window and head, S the tokens of a window."""
    b, h, w, _, heads, d = qkv_shape
    wh, ww = window_size
    windows = b * -(-h // wh) * -(-w // ww)
    return 4 * windows * heads * (wh * ww) ** 2 * d


def _bwd_flops(grad, qkv, out, lse, bias, logit_scale, pad_value, window_size, *args, **kw) -> int:
    """5 products where the forward pass has 2."""
    return 5 * _fwd_flops(qkv, bias, logit_scale, pad_value, window_size) // 2


_library.define(f"{NAME}_fwd", _FWD_SCHEMA, fake=_fwd_fake, triton=_fwd_triton, flops=_fwd_flops)
_library.define(f"{NAME}_bwd", _BWD_SCHEMA, fake=_bwd_fake, triton=_bwd_triton, flops=_bwd_flops)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        qkv, bias_table, logit_scale, pad_value, window_size, shift_size, scale, roll_first,
        overload,
    ):  # fmt: skip
        op = getattr(torch.ops.vitkit.window_attention_fwd, overload)
        return op(
            qkv, bias_table, logit_scale, pad_value, window_size, shift_size, scale, roll_first
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, window_size, shift_size, scale, roll_first, ctx.overload = inputs
        ctx.options = (window_size, shift_size, scale, roll_first)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, grad, _):
        *tensors, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _library.differentiable_backward(
                lambda *inputs: reference(*inputs, *ctx.options)[:1],
                tensors,
                (grad,),
                ctx.needs_input_grad[:4],
            )
        else:
            op = getattr(torch.ops.vitkit.window_attention_bwd, ctx.overload)
            grads = op(grad, tensors[0], out, lse, *tensors[1:], *ctx.options)
        needed = ctx.needs_input_grad
        return (*(g if n else None for g, n in zip(grads, needed[:4], strict=True)), *(None,) * 5)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_WindowAttention.apply, info, in_dims, args)


# ---- checks and choice of the backend ----


def _pair(arg: str, value: Any, low: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(i, int) and not isinstance(i, bool) and i >= low for i in pair)
    ):
        raise ValueError(
            f"{NAME}: {arg} must be an integer of at least {low} or two of them, got {value!r}"
        )
    return pair[0], pair[1]


def _check(
    qkv,
    *,
    window_size,
    shift_size=(0, 0),
    bias_table=None,
    logit_scale=None,
    scale=None,
    pad_value=None,
    padding="pad_then_roll",
):
    """Validates a call; returns what backends.select needs."""
    check_floating(NAME, "qkv", qkv)
    if qkv.dim() != 6 or qkv.shape[3] != 3 or min(qkv.shape[4:]) < 1:
        raise ValueError(
            f"{NAME}: qkv must have shape [B, H, W, 3, heads, head_dim], got {tuple(qkv.shape)}"
        )
    window, shift = _pair("window_size", window_size, 1), _pair("shift_size", shift_size, 0)
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise ValueError(
            f"{NAME}: shift_size must be smaller than window_size {window} on both axes,"
            f" got {shift}"
        )
    heads, d = qkv.shape[4:]
    expected = {
        "bias_table": (bias_table, ((2 * window[0] - 1) * (2 * window[1] - 1), heads),
                       "[(2 wh - 1) (2 ww - 1), heads]"),
        "logit_scale": (logit_scale, (heads,), "[heads]"),
        "pad_value": (pad_value, (3, heads, d), "[3, heads, head_dim]"),
    }  # fmt: skip
    for arg, (value, shape, names) in expected.items():
        if value is not None:
            check_floating(NAME, arg, value)
            check_same_device(NAME, arg, value, qkv, "qkv")
            check_shape(NAME, arg, value, shape, names)
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and (logit_scale is not None or not number or not abs(scale) < math.inf):
        raise ValueError(
            f"{NAME}: scale must be a finite number, or None (with logit_scale always),"
            f" got {scale!r}"
        )
    if padding not in PADDINGS:
        raise ValueError(f"{NAME}: padding must be one of {PADDINGS}, got {padding!r}")
    tokens = window[0] * window[1]
    return qkv.device.type, lambda backend: why_not(backend, qkv, tokens, logit_scale is not None)


def why_not(
    backend: str, qkv: torch.Tensor, window_tokens: int, cosine: bool = False
) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    reason = why_not_dtype(qkv)
    if reason is not None:
        return reason
    head_dim = qkv.shape[-1]
    if head_dim % 8 != 0 or head_dim > MAX_HEAD_DIM:
        return (
            f"its kernels need a head dim that is a multiple of 8 up to {MAX_HEAD_DIM},"
            f" got {head_dim}"
        )
    if window_tokens > MAX_WINDOW_TOKENS:
        return f"its kernels take windows of up to {MAX_WINDOW_TOKENS} tokens, got {window_tokens}"
    if backend == "cuda":
        most = MAX_CUDA_COSINE_HEAD_DIM if cosine else MAX_CUDA_HEAD_DIM
        if head_dim > most:
            given = " with logit_scale" if cosine else ""
            return f"its kernels take head dims of up to {most}{given}, got {head_dim}"
    return backends.why_not_device(NAME, backend, qkv.device.type)


def window_attention(
    qkv: torch.Tensor,
    *,
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int] = (0, 0),
    bias_table: torch.Tensor | None = None,
    logit_scale: torch.Tensor | None = None,
    scale: float | None = None,
    pad_value: torch.Tensor | None = None,
    padding: str = "pad_then_roll",
    backend: str = "auto",
) -> torch.Tensor:
    """Attention within (shifted) windows of a map, read and written in the map's own order.

    Semantics of Swin Transformer (Liu et al. 2021) and, with ``logit_scale``, of Swin V2 (Liu et
    al. 2022), as in timm, torchvision and transformers.

    Args:
        qkv: [B, H, W, 3, heads, D], what a ``qkv`` Linear makes of the un-rolled, un-padded map;
            float32, bfloat16, float16 or float64.
        window_size: (wh, ww), or one integer for both. May be larger than the map.
        shift_size: (sh, sw), each smaller than the window; 0 switches an axis off.
        bias_table: [(2 wh - 1) (2 ww - 1), heads], row (dy + wh - 1) (2 ww - 1) + dx + ww - 1 for
            a query dy rows and dx columns after the key. Swin V2: the output of its position MLP.
        logit_scale: [heads]. Given, attention is cosine attention with gain
            exp(min(logit_scale, ln 100)).
        scale: factor of the scores without ``logit_scale``, D ** -0.5 if None.
        pad_value: [3, heads, D], q, k and v of places without a token where the window does not
            divide the map; the bias of the ``qkv`` Linear is what the hosts have there. Zeros if
            None.
        padding: ``"pad_then_roll"`` (torchvision, transformers) or ``"roll_then_pad"`` (timm).
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        [B, H, W, heads * D] in the dtype of qkv. Gradients for qkv, bias_table, logit_scale and
        pad_value.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> qkv = torch.randn(2, 14, 14, 3, 6, 32)
        >>> table = torch.zeros(13 * 13, 6)
        >>> vitkit.window_attention(qkv, window_size=7, shift_size=3, bias_table=table).shape
        torch.Size([2, 14, 14, 192])
    """
    compiling = torch.compiler.is_compiling()
    if (compiling or torch._C._is_any_autocast_enabled()) and isinstance(qkv, torch.Tensor):
        (qkv,) = _library.autocast(qkv)
    plan = _plan(
        qkv, bias_table, logit_scale, pad_value, window_size, shift_size, scale, padding, backend
    )
    if not compiling:
        _library.register_flops()
    window, shift, factor, overload = plan
    tensors = (qkv, bias_table, logit_scale, pad_value)
    options = (window, shift, factor, padding == "roll_then_pad")
    if overload is None or qkv.numel() == 0:
        with torch.autocast(qkv.device.type, enabled=False):
            return reference(*tensors, *options)[0]
    kernel_tensors = _for_kernels(*tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _library.apply(_WindowAttention, *kernel_tensors, *options, overload)[0]
    op = getattr(torch.ops.vitkit.window_attention_fwd, overload)
    return op(*kernel_tensors, *options)[0]


def _for_kernels(qkv, bias_table, logit_scale, pad_value):
    """What kernels are promised: qkv with a dense last dimension, float32 tables, pad_value in the
    dtype of qkv, and all small tensors contiguous."""

    def small(t, dtype):
        return None if t is None else t.to(dtype).contiguous()

    return (
        qkv if qkv.stride(-1) == 1 else qkv.contiguous(),
        small(bias_table, torch.float32),
        small(logit_scale, torch.float32),
        small(pad_value, qkv.dtype),
    )


def _plan(
    qkv, bias_table, logit_scale, pad_value, window_size, shift_size, scale, padding, backend
):
    """Validates the call and chooses its backend, once for calls of the same layout: (window,
    shift, scale, overload or None for the reference)."""
    pairs = tuple(
        tuple(p) if isinstance(p, (list, tuple)) else p for p in (window_size, shift_size)
    )
    key = _library.layout_key(
        pairs, scale, padding, backend, qkv, bias_table, logit_scale, pad_value
    )
    plan = _memo.get(key)
    if plan is not None:
        return plan
    device_type, reasons = _check(
        qkv,
        window_size=window_size,
        shift_size=shift_size,
        bias_table=bias_table,
        logit_scale=logit_scale,
        scale=scale,
        pad_value=pad_value,
        padding=padding,
    )
    chosen = backends.select(NAME, backend, device_type, reasons)
    if logit_scale is not None:
        factor = 1.0
    else:
        factor = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    plan = (
        _pair("window_size", window_size, 1),
        _pair("shift_size", shift_size, 0),
        factor,
        {"reference": None, "triton": "triton"}.get(chosen, "default"),
    )
    _memo.put(key, plan)
    return plan


backends.OPS[NAME] = backends.Op(window_attention, _check)
