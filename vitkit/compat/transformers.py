"""vitkit in transformers' registries of attention implementations.

    import vitkit.compat.transformers as hf
    hf.register()
    model.set_attn_implementation("vitkit")

Every model that asks transformers for its attention function then calls :func:`attention_forward`;
``vitkit.patch`` does the same module by module, and undoes it. Masks are those of ``sdpa``.
"""

from __future__ import annotations

from typing import Any

import torch

from vitkit import backends
from vitkit.ops.flash_attention import why_not
from vitkit.sdpa import scaled_dot_product_attention

IMPLEMENTATION = "vitkit"


def register() -> None:
    """Makes ``attn_implementation="vitkit"`` known to transformers: the function and its masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function. What vitkit has no kernel for (dropout, position biases,
    paged caches, odd head dims) is left to its ``sdpa``.

    Args:
        query, key, value: [B, H, N, D]; fewer heads of key and value serve groups of the query's.
        attention_mask: bool or added to the scores, broadcastable to [B, H, Nq, Nk].

    Returns:
        ([B, N, H, D], None): there are no attention weights to return.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    backend = getattr(module, "vitkit_backend", "auto")
    if dropout or _is_foreign(query, key, value, backend, kwargs):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    out = scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=causal, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1], backend=backend,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _is_foreign(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    backend: str,
    kwargs: dict[str, Any],
) -> bool:
    """Whether the call is one for transformers' own function."""
    asked = ("position_bias", "cache", "softcap")
    if any(kwargs.get(name) is not None for name in asked) or kwargs.get("output_attentions"):
        return True
    if query.shape[0] != key.shape[0]:
        return True
    if backend != "auto":
        return False
    width = max(query.shape[-1], value.shape[-1])
    found = backends.first_kernel(
        query.device.type, lambda candidate: why_not(candidate, [query, key, value], width)
    )
    return found is None
