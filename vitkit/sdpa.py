"""torch's attention function, its signature and layout, on vitkit's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitkit.ops.flash_attention import flash_attention

NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` through :func:`vitkit.flash_attention`,
    which reads the transposed views in place.

    Differences: ``is_causal`` and ``attn_mask`` may be given together; a row that may attend
    nothing is 0, as in torch; attention weights are not dropped.

    Args:
        query: [..., H, L, E]; with two dimensions [L, E], one head.
        key, value: [..., H, S, E] and [..., H, S, Ev].
        attn_mask: broadcastable to [..., H, L, S]: bool, True = attend, or added to the scores,
            then with a gradient in its own shape.
        dropout_p: must be 0.
        is_causal: query i attends keys j <= i.
        scale: E ** -0.5 if None.
        enable_gqa: the heads of key and value serve groups of the query's.
        backend: see :func:`vitkit.flash_attention`.

    Returns:
        [..., H, L, Ev].

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> q, k, v = torch.randn(3, 2, 12, 197, 64)
        >>> vitkit.scaled_dot_product_attention(q, k, v).shape
        torch.Size([2, 12, 197, 64])
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{NAME}: {name} must be a tensor, got {type(t).__name__}")
        if t.dim() < 2 or t.dim() != query.dim():
            raise ValueError(
                f"{NAME}: {name} must have at least 2 dimensions, as many as query,"
                f" got {tuple(t.shape)}"
            )
    if dropout_p:
        raise ValueError(f"{NAME}: dropout_p must be 0: no kernel drops weights, got {dropout_p}")
    lead = query.shape[:-3]
    q, k, v = _four_dimensions(query), _four_dimensions(key), _four_dimensions(value)
    if enable_gqa and q.shape[1] != k.shape[1]:
        k, v = _grouped(q, k, v)
    if attn_mask is not None:
        attn_mask = _mask(attn_mask, query, key, q.shape[1])
    width = v.shape[-1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = equal_widths(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = flash_attention(q, k, v, bias=attn_mask, causal=is_causal, scale=scale, backend=backend)
    assert isinstance(out, torch.Tensor)
    out = out[..., :width].transpose(1, 2)
    if query.dim() == 4:
        return out
    return out.reshape(*lead, *out.shape[1 if query.dim() > 2 else 2 :])


def _four_dimensions(t: torch.Tensor) -> torch.Tensor:
    """[B, H, N, E]: leading dimensions joined, missing ones of size 1."""
    if t.dim() < 4:
        return t[(None,) * (4 - t.dim())]
    return t if t.dim() == 4 else t.flatten(0, -4)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    for name, t in (("key", k), ("value", v)):
        if t.shape[1] == 0 or q.shape[1] % t.shape[1]:
            raise ValueError(
                f"{NAME}: {name} must have a number of heads that divides the query's"
                f" {q.shape[1]}, got {t.shape[1]}"
            )
    return tuple(t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))


def _mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """A mask of [B, H, L, S] or of fewer dimensions."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{NAME}: attn_mask must be a tensor, got {type(mask).__name__}")
    if mask.dim() <= 4 and query.dim() <= 4:
        return mask
    full = (*query.shape[:-3], heads, query.shape[-2], key.shape[-2])
    try:
        return mask.expand(full).flatten(0, -4)
    except RuntimeError:
        raise ValueError(
            f"{NAME}: attn_mask must broadcast to [..., H, L, S] = {full}, got {tuple(mask.shape)}"
        ) from None


def equal_widths(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernels have one head dim: the narrower side gets zeros, which change no score and are
    cut off again."""
    missing = v.shape[-1] - q.shape[-1]
    if missing < 0:
        v = F.pad(v, (0, -missing))
    elif missing > 0:
        q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
    return q, k, v
