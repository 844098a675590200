"""Rules for torch's own modules, in whatever model they are."""

from __future__ import annotations

from typing import Any

import torch

from vitkit import nn
from vitkit.nn import convolution, products
from vitkit.nn.multihead import attend_heads
from vitkit.patch.rules import Replacement, Rule, swap_class


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch's MultiheadAttention on flash attention, wherever no weights are asked for."""

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        dropping = self.training and self.dropout > 0
        # torch takes is_causal for the mask it is given, unless keys are padding too.
        causal = is_causal and attn_mask is not None and key_padding_mask is None
        odd = is_causal and not (causal and query.shape == key.shape)
        plain = query.dim() == 3 and not any(t.is_nested for t in (query, key, value))
        if need_weights or dropping or odd or not plain:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        if not self.batch_first:
            same = query is key and key is value
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
            # They stay one tensor, of which one product makes all three.
            key, value = (query, query) if same else (key, value)
        mask = None if causal else self._mask(query, attn_mask, key_padding_mask)
        out = attend_heads(self, query, key, value, mask, causal)
        out = products.linear(self, out, self.out_proj.weight, self.out_proj.bias)
        return out if self.batch_first else out.transpose(0, 1), None

    def _mask(self, query, attn_mask, key_padding_mask):
        """[B or 1, H or 1, Nq or 1, Nk], added to the scores, of torch's two masks."""
        masks = []
        if attn_mask is not None:
            given = _added(attn_mask, query.dtype)
            masks.append(
                given.unflatten(0, (len(query), -1)) if given.dim() == 3 else given[None, None]
            )
        if key_padding_mask is not None:
            masks.append(_added(key_padding_mask, query.dtype)[:, None, None])
        return sum(masks) if masks else None


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As a term of the scores; in torch's boolean masks True is what may not be attended."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def _multihead(module: torch.nn.MultiheadAttention) -> Replacement | str:
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds a key and value of its own (add_bias_kv or add_zero_attn)"
    reason = nn.why_no_kernel("flash_attention", "meta", torch.float32, module.head_dim)
    if reason:
        return reason
    dropout = " or dropout is active" if module.dropout else ""
    note = f"torch's own forward where weights are asked for{dropout}"
    return Replacement("flash_attention", (swap_class(module, MultiheadAttention),), note=note)


def _encoder_layer(module: Any) -> str | None:
    """Nothing to do for the layer, but torch's fast path does not call the attention in it."""
    attention = module.self_attn
    fast = attention.batch_first and attention.num_heads % 2 == 0
    fast = fast and attention.in_proj_bias is not None and module.activation_relu_or_gelu
    if not (fast and torch.backends.mha.get_fastpath_enabled()):
        return None
    return (
        "its fast path, in eval mode without gradients, computes attention past its self_attn:"
        " torch.backends.mha.set_fastpath_enabled(False) first"
    )


def _group_norm(module: torch.nn.Module) -> Replacement:
    return Replacement("group_norm_silu (no activation)", (swap_class(module, nn.GroupNorm),))


def _gelu(module: torch.nn.GELU) -> Replacement:
    return Replacement(
        f"gelu ({'tanh' if module.approximate == 'tanh' else 'erf'})",
        (swap_class(module, nn.GELU),),
    )


def _layer_norm(module: torch.nn.LayerNorm) -> Replacement | str:
    if len(module.normalized_shape) != 1:
        return (
            f"it normalises over {len(module.normalized_shape)} dimensions, kernels over the last"
        )
    return Replacement("layer_norm_modulate (no modulation)", (swap_class(module, nn.LayerNorm),))


def _is_linear(module: Any) -> bool:
    """Of a dtype and on a device where torch's product is not the quickest."""
    if type(module) is not torch.nn.Linear:
        return False
    where = module.weight.dtype, module.weight.device.type
    return products.has_kernel(*where) or products.products_are_slow(*where)


def _linear(module: torch.nn.Linear) -> Replacement:
    if products.has_kernel(module.weight.dtype, module.weight.device.type):
        change = swap_class(module, products.Linear)
        return Replacement("linear", (change,), note="torch's own where gradients are wanted")
    return _widened(module, products.Linear)


def _is_conv2d(module: Any) -> bool:
    """Of a kind, dtype and device where torch's convolution is not the quickest."""
    if type(module) is not torch.nn.Conv2d:
        return False
    slow = products.products_are_slow(module.weight.dtype, module.weight.device.type)
    return slow or convolution.has_kernel(module)


def _conv2d(module: torch.nn.Conv2d) -> Replacement:
    if convolution.has_kernel(module):
        change = swap_class(module, convolution.Conv2d)
        return Replacement("conv3x3", (change,), note="gradients of the weight are torch's own")
    return _widened(module, convolution.Conv2d)


def _widened(module: torch.nn.Module, twin: type[torch.nn.Module]) -> Replacement:
    return Replacement("products in float32", (swap_class(module, twin),))


def _in_float32(cls: type[torch.nn.Module], twin: type[torch.nn.Module]) -> Rule:
    """For half precision where the machine has no instructions for it; no concern elsewhere."""

    def applies(module: Any) -> bool:
        if type(module) is not cls:
            return False
        return products.products_are_slow(module.weight.dtype, module.weight.device.type)

    return Rule(cls, None, lambda module: _widened(module, twin), applies=applies)


RULES = [
    Rule(torch.nn.GroupNorm, "group_norm_silu", _group_norm),
    Rule(torch.nn.GELU, "gelu", _gelu),
    Rule(torch.nn.LayerNorm, "layer_norm_modulate", _layer_norm),
    Rule(torch.nn.MultiheadAttention, "flash_attention", _multihead),
    Rule(torch.nn.TransformerEncoderLayer, "flash_attention", _encoder_layer),
    Rule(torch.nn.Linear, None, _linear, applies=_is_linear),
    Rule(torch.nn.Conv2d, None, _conv2d, applies=_is_conv2d),
    _in_float32(torch.nn.Conv1d, convolution.Conv1d),
    _in_float32(torch.nn.Conv3d, convolution.Conv3d),
]
