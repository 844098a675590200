"""Tokens from pixels: normalisation, patch projection, LayerNorm, positions and class tokens in one
pass.

    y[b, P + n] = LN(W . patch_n(x_b) + bias) + pos[n],   y[b, p] = prefix[p] (+ pos[p]),

written as [B, P + N, E]. The patches are those of a convolution whose stride is its kernel,
row-major over (frames,) rows, columns. uint8 pixels are normalised inside: (x / 255 - mean) / std
is folded into weight and bias after an integer is subtracted from x, so that what enters the
product is exact in every dtype. Sums, LayerNorm and additions are float32 (float64 in the
reference for float64 weights); the backward pass computes the projection again where LayerNorm
needs it, so that nothing but the inputs is kept. Deterministic: no atomics.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from vitkit import _library, _patches, backends
from vitkit._checks import (
    check_floating,
    check_same_device,
    why_not_dtype,
)

NAME = "patch_embed"
_memo = _library.Memo()


def reference(
    images: torch.Tensor,  # [B, C, (T,) H, W]
    weight: torch.Tensor,  # [E, C, (Pt,) Ph, Pw]
    bias: torch.Tensor | None,  # [E]
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    norm_weight: torch.Tensor | None,  # [E]
    norm_bias: torch.Tensor | None,  # [E]
    norm_eps: float,
    pos_embed: torch.Tensor | None,  # [N, E] or [P + N, E]
    prefix_tokens: torch.Tensor | None,  # [P, E]
    pad: bool,
) -> torch.Tensor:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    x = _patches.normalised(images, 1, mean, std, compute)
    patch = weight.shape[2:]
    if pad:
        missing = [(-s) % p for s, p in zip(x.shape[2:], patch, strict=True)]
        x = F.pad(x, [end for m in reversed(missing) for end in (0, m)])
    z = _patches.project(_unfold(x, patch), weight, bias, norm_weight, norm_bias, norm_eps)
    prefixes = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    pos = None if pos_embed is None else pos_embed.to(compute)
    late = pos is not None and pos.shape[0] == z.shape[1]  # for patches only
    if pos is not None and late:
        z = z + pos
    if prefix_tokens is not None and prefixes:
        first = prefix_tokens.to(compute).expand(z.shape[0], -1, -1)
        z = torch.cat([first, z], 1)
    if pos is not None and not late:
        z = z + pos
    return z.to(weight.dtype)


def _unfold(x: torch.Tensor, patch: Sequence[int]) -> torch.Tensor:
    """[B, C, (T,) H, W] -> [B, N, K], K in the order of the weight's elements."""
    grid = [s // p for s, p in zip(x.shape[2:], patch, strict=True)]
    split = [n for g, p in zip(grid, patch, strict=True) for n in (g, p)]
    x = x.reshape(*x.shape[:2], *split)
    dims = len(patch)
    order = (0, *(2 + 2 * d for d in range(dims)), 1, *(3 + 2 * d for d in range(dims)))
    return x.permute(order).reshape(x.shape[0], math.prod(grid), x.shape[1] * math.prod(patch))


# ---- operators ----

_TENSORS = f"Tensor images, {_patches.OPTIONS}, Tensor? prefix_tokens, bool pad"
_FWD_SCHEMA = f"({_TENSORS}) -> Tensor"
_BWD_SCHEMA = (
    f"(Tensor grad, {_TENSORS}, bool need_images, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _grid(image_shape: Sequence[int], weight_shape: Sequence[int]) -> list[int]:
    return [-(-s // p) for s, p in zip(image_shape[2:], weight_shape[2:], strict=True)]


def _fwd_fake(images, weight, bias, mean, std, norm_weight, norm_bias, norm_eps, pos, prefix, pad):
    tokens = math.prod(_grid(images.shape, weight.shape))
    if prefix is not None:
        tokens = tokens + prefix.shape[0]
    return weight.new_empty((images.shape[0], tokens, weight.shape[0]))


def _bwd_fake(grad, images, weight, bias, mean, std, norm_weight, norm_bias, norm_eps, *rest):
    pos, prefix, _, need_images, need_weight = rest
    return (
        torch.empty_like(images) if need_images else weight.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        *(
            weight.new_empty(0) if t is None else t.new_empty(t.shape)
            for t in (bias, norm_weight, norm_bias, pos, prefix)
        ),
    )


def _fwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.patch_embed").forward(*args)


def _bwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.patch_embed").backward(*args)


def _fwd_flops(images_shape, weight_shape, *args, **kwargs) -> int:
    """One product of [B N, K] and [K, E]."""
    patches = images_shape[0] * math.prod(_grid(images_shape, weight_shape))
    return 2 * patches * math.prod(weight_shape)


def _bwd_flops(grad_shape, images_shape, weight_shape, *args, **kwargs) -> int:
    """One product each for the gradients of images and weight."""
    return 2 * _fwd_flops(images_shape, weight_shape)


_library.define(
    "patch_embed_fwd", _FWD_SCHEMA, fake=_fwd_fake, triton=_fwd_triton, flops=_fwd_flops
)
_library.define(
    "patch_embed_bwd", _BWD_SCHEMA, fake=_bwd_fake, triton=_bwd_triton, flops=_bwd_flops
)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(overload, mean, std, eps, pad, images, weight, bias, nw, nb, pos, prefix):
        op = getattr(torch.ops.vitkit.patch_embed_fwd, overload)
        return op(images, weight, bias, mean, std, nw, nb, eps, pos, prefix, pad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.overload, ctx.mean, ctx.std, ctx.eps, ctx.pad, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        images, weight, bias, nw, nb, pos, prefix = tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():
            found = _library.differentiable_backward(
                lambda i, w, b, nw, nb, pos, prefix: (
                    reference(i, w, b, ctx.mean, ctx.std, nw, nb, ctx.eps, pos, prefix, ctx.pad),
                ),
                tensors,
                (grad,),
                needed,
            )
        else:
            op = getattr(torch.ops.vitkit.patch_embed_bwd, ctx.overload)
            found = op(
                grad.contiguous(), images, weight, bias, ctx.mean, ctx.std, nw, nb, ctx.eps,
                pos, prefix, ctx.pad, needed[0], needed[1] or needed[2],
            )  # fmt: skip
        return (None,) * 5 + tuple(g if n else None for g, n in zip(found, needed, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_PatchEmbed.apply, info, in_dims, args)


# ---- checks and choice of the backend
# ----------------------------------------------------------------------------


def _check(
    images,
    weight,
    bias=None,
    *,
    mean=None,
    std=None,
    norm_weight=None,
    norm_bias=None,
    norm_eps=1e-6,
    pos_embed=None,
    prefix_tokens=None,
    pad=False,
):
    """Validates a call; returns what backends.select needs."""
    check_floating(NAME, "weight", weight)
    if weight.dim() not in (4, 5) or 0 in weight.shape:
        raise ValueError(
            f"{NAME}: weight must have shape [E, C, (Pt,) Ph, Pw] without a 0,"
            f" got {tuple(weight.shape)}"
        )
    _patches.check_images(NAME, "images", images, weight)
    if images.dim() != weight.dim():
        layout = "[B, C, T, H, W]" if weight.dim() == 5 else "[B, C, H, W]"
        raise ValueError(
            f"{NAME}: images must have shape {layout} for a weight {tuple(weight.shape)},"
            f" got {tuple(images.shape)}"
        )
    channels = weight.shape[1]
    if images.shape[1] != channels:
        raise ValueError(
            f"{NAME}: images must have the {channels} channels of weight, got {images.shape[1]}"
            f" in {tuple(images.shape)}"
        )
    _patches.check_patch(NAME, images.shape[2:], weight.shape[2:], pad)
    options = {
        "bias": bias, "mean": mean, "std": std, "norm_weight": norm_weight,
        "norm_bias": norm_bias, "norm_eps": norm_eps,
    }  # fmt: skip
    _patches.check_options(NAME, channels, images.dtype == torch.uint8, weight, options)
    _check_tokens(images, weight, pos_embed, prefix_tokens)
    floating = [weight, bias, norm_weight, norm_bias, pos_embed, prefix_tokens]
    return weight.device.type, lambda backend: why_not(
        backend, [t for t in floating if t is not None]
    )


def _check_tokens(images, weight, pos_embed, prefix_tokens):
    """Shapes of what is added and put in front."""
    embed_dim = weight.shape[0]
    grid = _grid(images.shape, weight.shape)
    for arg, value in (("prefix_tokens", prefix_tokens), ("pos_embed", pos_embed)):
        if value is None:
            continue
        check_floating(NAME, arg, value)
        check_same_device(NAME, arg, value, weight, "weight")
        if value.dim() != 2 or value.shape[1] != embed_dim:
            raise ValueError(
                f"{NAME}: {arg} must have shape [rows, E = {embed_dim}], got {tuple(value.shape)}"
            )
    if pos_embed is None:
        return
    patches, rows = math.prod(grid), pos_embed.shape[0]
    prefixes = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    if rows not in (patches, prefixes + patches):
        here = " x ".join(map(str, grid))
        choice = f"{patches}" if prefixes == 0 else f"{patches} or {prefixes} + {patches}"
        raise ValueError(
            f"{NAME}: pos_embed must have {choice} rows for this {here} grid, got {rows},"
            f" which {_fits(rows, prefixes)}"
        )


def _fits(rows: int, prefixes: int) -> str:
    """Says which grids so many rows could be for."""
    found = [f"{h} x {w}" for h, w in _grids(rows)]
    if prefixes and rows > prefixes:
        found += [f"{h} x {w} after {prefixes} prefix rows" for h, w in _grids(rows - prefixes)]
    return f"fits a grid of {', '.join(found)}" if found else "fits no grid"


def _grids(n: int) -> list[tuple[int, int]]:
    """The square if n is one, otherwise the rectangle nearest to it."""
    height = next((h for h in range(math.isqrt(max(n, 0)), 0, -1) if n % h == 0), 0)
    return [(height, n // height)] if height else []


def why_not(backend: str, tensors: list[torch.Tensor]) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    device_type = tensors[0].device.type
    return why_not_dtype(*tensors) or backends.why_not_device(NAME, backend, device_type)


def patch_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    pos_embed: torch.Tensor | None = None,
    prefix_tokens: torch.Tensor | None = None,
    pad: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """``cat(prefix_tokens, LayerNorm(conv(images)) + pos_embed)`` as [B, P + N, E], in one pass.

    Semantics of a ``torch.nn.Conv2d`` (or Conv3d) whose stride is its kernel, flattened and
    transposed (Dosovitskiy et al. 2020), with what ViT, Swin, DiT and VideoMAE do around it.
    Gradients for floating images and every parameter.

    Args:
        images: [B, C, H, W] or [B, C, T, H, W], floating with the dtype of weight, or uint8.
            Contiguous, channels_last and other views with dense rows or pixels are read in place.
        weight: [E, C, Ph, Pw] or [E, C, Pt, Ph, Pw], the convolution's.
        bias: [E].
        mean, std: C numbers each, for uint8 images only: a pixel x enters as
            (x / 255 - mean) / std; as x / 255 without them.
        norm_weight, norm_bias: [E]; with norm_weight the projection passes a LayerNorm over E.
        norm_eps: of that LayerNorm.
        pos_embed: [N, E], added to the patch tokens, or [P + N, E], added to all.
        prefix_tokens: [P, E], class and register tokens put in front of every image's tokens.
        pad: fill images that the patch does not divide with zeros (after normalisation) at the
            right, the bottom and the end of time, as timm's dynamic_img_pad does.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Parameters other than weight may have any floating dtype: they are added in float32. Under
    autocast images, weight and bias are cast as for a convolution.

    Returns:
        [B, P + N, E] in the dtype of weight.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> weight, cls = torch.randn(8, 3, 16, 16), torch.zeros(1, 8)
        >>> vitkit.patch_embed(images, weight, prefix_tokens=cls, pos_embed=torch.randn(5, 8)).shape
        torch.Size([2, 5, 8])
    """
    tensors = (images, weight, bias, norm_weight, norm_bias, pos_embed, prefix_tokens)
    casting = torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()
    if casting and isinstance(images, torch.Tensor) and isinstance(weight, torch.Tensor):
        weight, bias = _library.autocast(weight, bias)
        (images,) = _library.autocast(images)  # bytes stay bytes
        tensors = (images, weight, bias, *tensors[3:])
    mean, std = _listed(mean), _listed(std)
    plan = _plan(tensors, mean, std, norm_eps, pad, backend)
    if not torch.compiler.is_compiling():
        _library.register_flops()
    if plan.fwd is None:
        with torch.autocast(weight.device.type, enabled=False):
            return reference(
                images, weight, bias, mean, std, norm_weight, norm_bias, norm_eps,
                pos_embed, prefix_tokens, pad,
            )  # fmt: skip
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    # Its gradient is written in the layout of the images, which must then be dense.
    if plan.copy or (training and images.requires_grad and not _dense(images)):
        images = images.contiguous()
    weight = weight.contiguous()
    pos_embed, prefix_tokens = (
        None if t is None else t.contiguous() for t in (pos_embed, prefix_tokens)
    )
    rest = (bias, norm_weight, norm_bias, pos_embed, prefix_tokens)
    if training:
        given: tuple[Any, ...] = (images, weight, *rest)
        if torch.compiler.is_compiling():
            given = _library.distinct(*given)
        return _library.apply(_PatchEmbed, plan.overload, mean, std, float(norm_eps), pad, *given)
    return plan.fwd(
        images, weight, bias, mean, std, norm_weight, norm_bias, norm_eps, *rest[3:], pad
    )


def _listed(values: Any) -> Any:
    """A tuple as a list of floats; anything else goes to the checks as it is."""
    if isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values):
        return _patches.floats(values)
    return values


def _dense(x: torch.Tensor) -> bool:
    """Whether x is contiguous as [B, C, *] or as [B, *, C]."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def _readable(x: torch.Tensor) -> bool:
    """Whether the pixels of a row, or the channels of a pixel and the pixels of a row, are
    neighbours in memory."""
    rows = x.shape[-1] == 1 or x.stride(-1) == 1
    return rows or (x.stride(1) == 1 and x.stride(-1) == x.shape[1])


class _Plan(NamedTuple):
    """All that shapes, strides, dtypes and devices decide about a call."""

    fwd: Any  # the operator, None for the reference
    overload: str
    copy: bool  # images cannot be read in place


def _plan(tensors, mean, std, norm_eps, pad, backend) -> _Plan:
    """Validates the call and chooses its backend, once for calls of the same layout."""
    parts = [tuple(v) if isinstance(v, list) else v for v in (mean, std)]
    key = _library.layout_key(norm_eps, pad, backend, *parts, *tensors)
    plan = _memo.get(key)
    if plan is not None:
        return plan
    images, weight, bias, norm_weight, norm_bias, pos_embed, prefix_tokens = tensors
    device_type, reasons = _check(
        images,
        weight,
        bias,
        mean=mean,
        std=std,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        pos_embed=pos_embed,
        prefix_tokens=prefix_tokens,
        pad=pad,
    )
    chosen = backends.select(NAME, backend, device_type, reasons)
    overload = "triton" if chosen == "triton" else "default"
    plan = _Plan(
        None if chosen == "reference" else getattr(torch.ops.vitkit.patch_embed_fwd, overload),
        overload,
        not _readable(images),
    )
    _memo.put(key, plan)
    return plan


backends.OPS[NAME] = backends.Op(patch_embed, _check)
