"""Chosen rows of the attention matrix, for looking inside a model."""

from __future__ import annotations

import torch

from vitkit._checks import check_floating, check_same_device, check_same_dtype

NAME = "attention_map"


def attention_map(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor | list[int] | int,
    *,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """``softmax(scale * q[rows] k^T + bias)``: what chosen queries attend, and nothing else of the
    [Nq, Nk] matrix that :func:`vitkit.flash_attention` never makes.

    Plain PyTorch on every device: 2·B·H·R·Nk·D operations and B·H·R·Nk numbers for R rows. Queries
    and keys of a patched model: ``vitkit.demo.rollout.AttentionCalls``.

    Args:
        q: [B, Nq, H, D].
        k: [B, Nk, H, D], dtype and device of q.
        rows: queries, an integer or R of them; negative ones count from the end. Row 0 is what the
            class token attends.
        bias: broadcastable to [B, H, Nq, Nk], added to the scores, or bool, True = attend;
            a compact one as its ``dense(q.dtype)``.
        causal: query i attends keys j <= i.
        scale: D ** -0.5 if None.

    Returns:
        [B, H, R, Nk] in float32 (float64 for float64 inputs); every row sums to 1, or is 0 if its
        query may attend nothing. With gradients for q, k and bias.

    Raises:
        TypeError: q, k or bias is no floating tensor (bias may be bool), rows are no integers, or
            k has another dtype than q.
        ValueError: shapes do not fit, a row lies outside -Nq..Nq-1, or devices differ.

    Example:
        >>> import torch, vitkit
        >>> q, k = torch.randn(2, 2, 197, 12, 64)
        >>> vitkit.attention_map(q, k, 0).shape
        torch.Size([2, 12, 1, 197])
    """
    check_floating(NAME, "q", q)
    check_floating(NAME, "k", k)
    if q.dim() != 4:
        raise ValueError(f"{NAME}: q must have shape [B, Nq, H, D], got {tuple(q.shape)}")
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"{NAME}: k must have shape [B, Nk, H, D] with the sizes of q {tuple(q.shape)},"
            f" got {tuple(k.shape)}"
        )
    check_same_dtype(NAME, "k", k, q, "q")
    check_same_device(NAME, "k", k, q, "q")
    chosen = _chosen(rows, q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * torch.einsum("brhd,bnhd->bhrn", q[:, chosen].to(wide), k.to(wide))
    if bias is not None:
        scores = _with_bias(scores, bias, chosen, q, k)
    if causal:
        later = torch.arange(k.shape[1], device=q.device) > chosen[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    without_keys = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(without_keys, 0.0).softmax(-1).masked_fill(without_keys, 0.0)


def _chosen(rows: torch.Tensor | list[int] | int, q: torch.Tensor) -> torch.Tensor:
    found = torch.as_tensor(rows, device=q.device)
    found = found[None] if found.dim() == 0 else found
    whole = not (found.dtype == torch.bool or found.is_floating_point() or found.is_complex())
    if found.dim() != 1 or (found.numel() and not whole):
        raise TypeError(f"{NAME}: rows must be an integer or a list of them, got {rows!r}")
    n = q.shape[1]
    if found.numel() and not (-n <= int(found.min()) and int(found.max()) < n):
        raise ValueError(f"{NAME}: rows must lie in -{n}..{n - 1}, got {found.tolist()}")
    found = found.long()
    return torch.where(found < 0, found + n, found)


def _with_bias(
    scores: torch.Tensor,
    bias: torch.Tensor,
    chosen: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
) -> torch.Tensor:
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"{NAME}: bias must be a tensor, got {type(bias).__name__}")
    if bias.dtype != torch.bool:
        check_floating(NAME, "bias", bias)
    check_same_device(NAME, "bias", bias, q, "q")
    try:
        picked = bias.expand(full)[:, :, chosen]  # a view, then its rows
    except RuntimeError:
        raise ValueError(
            f"{NAME}: bias must broadcast to [B, H, Nq, Nk] = {full}, got {tuple(bias.shape)}"
        ) from None
    if bias.dtype == torch.bool:
        return scores.masked_fill(~picked, float("-inf"))
    return scores + picked.to(scores.dtype)
