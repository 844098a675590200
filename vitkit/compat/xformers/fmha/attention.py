"""``memory_efficient_attention`` on :func:`vitkit.flash_attention`.

Which way a mask takes: a band without limits, or causal from the first token, is what the kernels
know, dense or packed. Any other band is given to them as a bool mask, block by block, so that
sequences never meet in one matrix.
"""

from __future__ import annotations

from typing import Any

import torch

from vitkit.compat.xformers.fmha.attn_bias import Band, Block, band, blocks
from vitkit.ops.flash_attention import flash_attention
from vitkit.sdpa import equal_widths

NAME = "memory_efficient_attention"
Result = tuple[torch.Tensor, torch.Tensor]


def memory_efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | Any | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """xformers' function, on every device vitkit has kernels for.

    Args:
        query: [B, M, H, K]; [B, M, K] is one head; [B, M, G, H, K] groups of heads.
        key, value: the same with Mk tokens; the last dimension of value may differ.
        attn_bias: a tensor that broadcasts to [B, H, M, Mk] and is added to the scores (with a
            gradient), a mask of :mod:`vitkit.compat.xformers.fmha.attn_bias` or of xformers.
        p: dropout; must be 0.
        scale: K ** -0.5 if None.
        op: which of xformers' kernels to use: accepted, and of no meaning here.
        output_dtype: dtype of the result, that of query if None.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names it, the rule and
            the value.

    Example:
        >>> import torch
        >>> from vitkit.compat.xformers import memory_efficient_attention, fmha
        >>> mask, tokens = fmha.BlockDiagonalMask.from_tensor_list(
        ...     [torch.randn(2, 5, 3, 16), torch.randn(1, 7, 3, 16)]
        ... )
        >>> memory_efficient_attention(tokens, tokens, tokens, attn_bias=mask).shape
        torch.Size([1, 17, 3, 16])
    """
    return memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias, p, scale, output_dtype=output_dtype
    )[0]


def memory_efficient_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | Any | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The same without a gradient."""
    with torch.no_grad():
        return memory_efficient_attention(
            query, key, value, attn_bias, p, scale, output_dtype=output_dtype
        )


def memory_efficient_attention_forward_requires_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | Any | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Result:
    """(out, lse [B, H, M]), lse the natural log of the sum of exponentials of the scores."""
    out, lse = _attend(query, key, value, attn_bias, p, scale)
    return (out if output_dtype is None else out.to(output_dtype)), lse


def _attend(q: Any, k: Any, v: Any, attn_bias: Any, p: float, scale: float | None) -> Result:
    for name, t in (("query", q), ("key", k), ("value", v)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{NAME}: {name} must be a tensor, got {type(t).__name__}")
        if t.dim() not in (3, 4, 5) or t.dim() != q.dim():
            raise ValueError(
                f"{NAME}: {name} must be [B, M, H, K], [B, M, K] or [B, M, G, H, K], as query,"
                f" got {tuple(t.shape)}"
            )
    if p:
        raise ValueError(f"{NAME}: p must be 0: no kernel drops weights, got {p}")
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v = (_four_dimensions(t) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _masked(*equal_widths(q, k, v), attn_bias, scale)
    return out[..., : shape[-1]].reshape(shape), lse


def _four_dimensions(t: torch.Tensor) -> torch.Tensor:
    if t.dim() == 3:
        return t[:, :, None]
    return t if t.dim() == 4 else t.flatten(2, 3)


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: Any, scale: float
) -> Result:
    if attn_bias is None or isinstance(attn_bias, torch.Tensor):
        return _flash(q, k, v, bias=_dense(attn_bias, q), scale=scale)
    limits, found = band(attn_bias), blocks(attn_bias)
    if found is None:
        bias = getattr(attn_bias, "_bias", None)
        return _banded(q, k, v, limits, scale, _dense(bias, q))
    for name, t, end in (("query", q, found[-1].q_end if found else 0), ("key", k, None)):
        if t.shape[0] != 1 or (end is not None and t.shape[1] != end):
            raise ValueError(
                f"{NAME}: {name} must be [1, {end or 'Mk'}, H, K] for a"
                f" {type(attn_bias).__name__}, got {tuple(t.shape)}"
            )
    if max((b.k_end for b in found), default=0) > k.shape[1]:
        raise ValueError(
            f"{NAME}: key must hold the {max(b.k_end for b in found)} tokens of the mask,"
            f" got {k.shape[1]}"
        )
    return _block_diagonal(q, k, v, attn_bias, limits, found, scale)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Result:
    result = flash_attention(q, k, v, return_lse=True, **options)
    assert isinstance(result, tuple)
    return result


def _dense(bias: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """xformers wants a head dimension; [B, M, Mk] is taken for [B, 1, M, Mk]."""
    if bias is None or bias.dim() != 3:
        return bias
    return bias[:, None] if bias.shape[0] in (1, q.shape[0]) else bias


def _is_causal(limits: Band, queries: int, keys: int) -> bool:
    from_first_token = not limits.bottom_right or queries == keys
    return limits.left is None and limits.right == 0 and from_first_token


def _banded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    limits: Band,
    scale: float,
    bias: torch.Tensor | None = None,
) -> Result:
    """One block, [B, M, H, K]."""
    nq, nk = q.shape[1], k.shape[1]
    if limits.left is None and limits.right is None:
        return _flash(q, k, v, bias=bias, scale=scale)
    if _is_causal(limits, nq, nk):
        return _flash(q, k, v, bias=bias, causal=True, scale=scale)
    allowed = limits.pairs(nq, nk, q.device)
    return _flash(q, k, v, bias=allowed, scale=scale)


def _block_diagonal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    limits: Band,
    found: list[Block],
    scale: float,
) -> Result:
    """Sequences one after another, [1, T, H, K]: packed where the kernels know the band and the
    keys have no gaps, else sequence by sequence."""
    simple = (limits.left is None and limits.right is None) or all(
        _is_causal(limits, b.q_end - b.q_start, b.k_end - b.k_start) for b in found
    )
    if not found:
        return q.new_empty(q.shape), q.new_empty(1, q.shape[2], 0, dtype=torch.float32)
    if simple:
        k, v, k_starts = _without_gaps(k, v, found)
        cu_q = mask.q_seqinfo.seqstart.to(q.device)
        cu_k = mask.k_seqinfo.seqstart.to(q.device)
        if k_starts is not None:
            cu_k = torch.tensor(k_starts, dtype=torch.int32, device=q.device)
        out, lse = _flash(
            q[0], k[0], v[0], causal=limits.right == 0, scale=scale, cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
        )  # fmt: skip
        return out[None], lse[None]
    parts = [
        _banded(
            q[:, b.q_start : b.q_end], k[:, b.k_start : b.k_end], v[:, b.k_start : b.k_end],
            limits, scale,
        )
        for b in found
    ]  # fmt: skip
    return torch.cat([o for o, _ in parts], 1), torch.cat([z for _, z in parts], 2)


def _without_gaps(
    k: torch.Tensor, v: torch.Tensor, found: list[Block]
) -> tuple[torch.Tensor, torch.Tensor, list[int] | None]:
    """Keys and values of the blocks one after another, and where each begins; None if they lie so
    already."""
    starts = [0]
    for b in found:
        starts.append(starts[-1] + b.k_end - b.k_start)
    if starts == [found[0].k_start, *(b.k_end for b in found)] and starts[-1] == k.shape[1]:
        return k, v, None
    k, v = (torch.cat([t[:, b.k_start : b.k_end] for b in found], 1) for t in (k, v))
    return k, v, starts
