"""What modules compute: a vitkit op where one of its kernels can run, torch's own function where
none can (float64, an odd head dim, a device or an install without kernels).

The attribute ``vitkit_backend`` of a module (``vitkit.patch`` sets it) names its backend. A backend
other than ``"auto"`` is taken at its word: if it cannot run, the op says why.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vitkit import _library, backends
from vitkit._checks import NATIVE_FLOATING, name_of
from vitkit.ops import flash_attention as _attention
from vitkit.ops import group_norm_silu as _norm
from vitkit.ops import layer_norm_modulate as _layer_norm
from vitkit.ops import patch_embed as _patch
from vitkit.score_bias import DecomposedBias, DistanceBias

# Elements below which torch is faster with a LayerNorm on a CPU: (float32, narrower types),
# without gradients and with them (docs/performance.md).
SMALL_LAYER_NORM = ((1 << 17, 1 << 14), (1 << 22, 1 << 18))

_reasons: dict[tuple[str, str, torch.dtype, int | None], str | None] = {}


@_library._constant_when_traced
def why_no_kernel(
    op: str, device_type: str, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """None if a kernel of ``op`` can run on such tensors, otherwise the reason that none can."""
    if _library.in_forward_mode():
        return backends.FORWARD_MODE
    key = (op, device_type, dtype, head_dim)
    if key not in _reasons:
        _reasons[key] = _why_no_kernel(*key)
    return _reasons[key]


def _why_no_kernel(
    op: str, device_type: str, dtype: torch.dtype, head_dim: int | None
) -> str | None:
    if dtype not in NATIVE_FLOATING:
        return f"kernels take float32, bfloat16 and float16, not {name_of(dtype)}"
    if head_dim is not None and (head_dim % 8 or head_dim > _attention.MAX_HEAD_DIM):
        limit = _attention.MAX_HEAD_DIM
        return f"kernels take head dims that are a multiple of 8 up to {limit}, not {head_dim}"
    if device_type == "meta":
        return None
    kernels = [b for b in backends.ORDER.get(device_type, ()) if b != "reference"]
    reasons = {b: backends.why_not_device(op, b, device_type) for b in kernels}
    if None in reasons.values():
        return None
    listed = "; ".join(f"{b}: {r}" for b, r in reasons.items())
    return f"no kernel can run on {device_type} ({listed or 'vitkit has none for it'})"


def _backend(module: torch.nn.Module) -> str:
    return getattr(module, "vitkit_backend", "auto")


def _on_torch(
    op: str, module: torch.nn.Module, x: torch.Tensor, head_dim: int | None = None
) -> bool:
    if _backend(module) != "auto" or backends.DEFAULT != "auto":
        return False
    return why_no_kernel(op, x.device.type, x.dtype, head_dim) is not None


def attend(
    module: torch.nn.Module,
    q: torch.Tensor,  # [B, Nq, H, D]
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | DecomposedBias | DistanceBias | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """``vitkit.flash_attention`` (bias=mask) on the backend of ``module``: [B, Nq, H, D]."""
    if _on_torch(_attention.NAME, module, q, q.shape[-1]):
        if isinstance(mask, DecomposedBias | DistanceBias):
            mask = mask.dense(q.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        return out.transpose(1, 2)
    return _attention.flash_attention(
        q, k, v, bias=mask, causal=causal, scale=scale, backend=_backend(module)
    )  # type: ignore[return-value]


def group_norm_silu(
    norm: torch.nn.GroupNorm,
    x: torch.Tensor,
    *,
    activation: str | None = "silu",
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """``vitkit.group_norm_silu`` with the parameters, and on the backend, of ``norm``."""
    if not _on_torch(_norm.NAME, norm, x):
        return _norm.group_norm_silu(
            x,
            norm.num_groups,
            norm.weight,
            norm.bias,
            norm.eps,
            activation=activation,
            add=add,
            scale=scale,
            shift=shift,
            backend=_backend(norm),
        )
    per_channel = (*x.shape[:2], *(1,) * (x.dim() - 2))
    if add is not None:
        x = x + add.view(per_channel)
    x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if scale is not None:
        x = x * (1 + scale.view(per_channel))
    if shift is not None:
        x = x + shift.view(per_channel)
    return F.silu(x) if activation == "silu" else x


def layer_norm(
    norm: torch.nn.LayerNorm,
    x: torch.Tensor,  # [B, *, E]
    *,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``vitkit.layer_norm_modulate`` with the parameters, and on the backend, of ``norm``."""
    modulated = shift is not None or scale is not None
    if not (_on_torch(_layer_norm.NAME, norm, x) or _is_small(norm, x, modulated)):
        return _layer_norm.layer_norm_modulate(
            x,
            shift=shift,
            scale=scale,
            weight=norm.weight,
            bias=norm.bias,
            eps=norm.eps,
            backend=_backend(norm),
        )
    x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    tokens = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    if scale is not None:
        x = x * (1 + (scale if scale.dim() == x.dim() else scale.view(tokens)))
    if shift is not None:
        x = x + (shift if shift.dim() == x.dim() else shift.view(tokens))
    return x


def _is_small(norm: torch.nn.LayerNorm, x: torch.Tensor, modulated: bool) -> bool:
    """Whether calling an operator of one's own costs more than its kernel saves: torch's own
    LayerNorm is called, and differentiated, without leaving C++. In float32 both are bound by
    memory and the difference is small."""
    if modulated or _backend(norm) != "auto" or backends.DEFAULT != "auto" or not x.is_cpu:
        return False
    given = (x, norm.weight, norm.bias)
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return x.numel() < SMALL_LAYER_NORM[gradients][x.dtype != torch.float32]


def patch_embed(
    module: torch.nn.Module,
    images: torch.Tensor,
    proj: torch.nn.Conv2d | torch.nn.Conv3d,
    norm: torch.nn.LayerNorm | None = None,
    **options: Any,
) -> torch.Tensor:
    """``vitkit.patch_embed`` with the parameters of ``proj`` and ``norm``, on the backend of
    ``module``: [B, P + N, E]. Plain calls that no kernel can run are the convolution's."""
    plain = not any(v is not None and v is not False for v in options.values())
    if plain and images.is_floating_point() and _on_torch(_patch.NAME, module, images):
        tokens = proj(images).flatten(2).transpose(1, 2)
        return tokens if norm is None else norm(tokens)
    affine: dict[str, Any] = {}
    if norm is not None:
        gain = norm.weight
        if gain is None:
            gain = torch.ones(proj.out_channels, device=images.device)
        affine = {"norm_weight": gain, "norm_bias": norm.bias, "norm_eps": norm.eps}
    return _patch.patch_embed(
        images, proj.weight, proj.bias, **affine, **options, backend=_backend(module)
    )
