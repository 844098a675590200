"""Tokens of images of different sizes, packed one after the other (NaViT, FiT, SigLIP 2).

    y[cu_seqlens[i] + r * columns_i + c] = LN(W . patch_rc(x_i) + bias) + pos_embed[r, c]

Everything else is as in patch_embed. The kernels see pixels, a flat tensor, and places, one row per
token: (first pixel of its patch, stride of channels, stride of rows, rows and columns inside the
image, row of the position embedding). Patches at the right and bottom end that are not whole are
filled with zeros (after normalisation) if pad is true. Of places outside the pixels, the C++
operators touch nothing: the CPU refuses them, on CUDA their tokens are NaN.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from vitkit import _library, _patches, backends
from vitkit._checks import (
    check_floating,
    check_same_device,
    check_tensor,
    name_of,
    why_not_dtype,
)

NAME = "patch_embed_packed"
Size = tuple[int, int]


def reference(
    pixels: torch.Tensor,  # [any number]
    places: torch.Tensor,  # [T, 6]
    weight: torch.Tensor,  # [E, C, Ph, Pw]
    bias: torch.Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float,
    pos_embed: torch.Tensor | None,  # [G, E]
) -> torch.Tensor:
    """The specification, in plain PyTorch: any device, any floating dtype, differentiable twice."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    _, channels, height, width = weight.shape
    c, y, x = torch.meshgrid(
        *(torch.arange(n, device=pixels.device) for n in (channels, height, width)), indexing="ij"
    )
    first, channel_stride, row_stride, rows, columns, position = (
        places[:, i].view(-1, 1, 1, 1) for i in range(6)
    )
    inside = ((y < rows) & (x < columns)).expand(-1, channels, -1, -1)
    index = first + c * channel_stride + y * row_stride + x
    patches = pixels[torch.where(inside, index, torch.zeros_like(index))]
    patches = _patches.normalised(patches, 1, mean, std, compute).masked_fill(~inside, 0)
    z = _patches.project(patches.flatten(1), weight, bias, norm_weight, norm_bias, norm_eps)
    if pos_embed is not None:
        z = z + pos_embed.to(compute)[position.flatten()]
    return z.to(weight.dtype)


# ---- operators ----

_TENSORS = f"Tensor pixels, Tensor places, {_patches.OPTIONS}"
_FWD_SCHEMA = f"({_TENSORS}) -> Tensor"
_BWD_SCHEMA = (
    f"(Tensor grad, {_TENSORS}, bool need_pixels, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fwd_fake(pixels, places, weight, *rest):
    return weight.new_empty((places.shape[0], weight.shape[0]))


def _bwd_fake(grad, pixels, places, weight, bias, mean, std, norm_weight, norm_bias, eps, *rest):
    pos, need_pixels, need_weight = rest
    return (
        torch.empty_like(pixels) if need_pixels else weight.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        *(
            weight.new_empty(0) if t is None else t.new_empty(t.shape)
            for t in (bias, norm_weight, norm_bias, pos)
        ),
    )


def _fwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.patch_embed").forward_packed(*args)


def _bwd_triton(*args: Any):
    return importlib.import_module("vitkit.kernels.patch_embed").backward_packed(*args)


def _fwd_flops(pixels_shape, places_shape, weight_shape, *args, **kwargs) -> int:
    """One product of [T, K] and [K, E]."""
    return 2 * places_shape[0] * math.prod(weight_shape)


def _bwd_flops(grad_shape, *shapes, **kwargs) -> int:
    """One product each for the gradients of pixels and weight."""
    return 2 * _fwd_flops(*shapes)


_library.define(
    "patch_embed_packed_fwd", _FWD_SCHEMA, fake=_fwd_fake, triton=_fwd_triton, flops=_fwd_flops
)
_library.define(
    "patch_embed_packed_bwd", _BWD_SCHEMA, fake=_bwd_fake, triton=_bwd_triton, flops=_bwd_flops
)


class _PatchEmbedPacked(torch.autograd.Function):
    @staticmethod
    def forward(overload, mean, std, eps, pixels, places, weight, bias, nw, nb, pos):
        op = getattr(torch.ops.vitkit.patch_embed_packed_fwd, overload)
        return op(pixels, places, weight, bias, mean, std, nw, nb, eps, pos)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.overload, ctx.mean, ctx.std, ctx.eps, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        pixels, places, weight, bias, nw, nb, pos = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            found = _library.differentiable_backward(
                lambda x, w, b, nw, nb, pos: (
                    reference(x, places, w, b, ctx.mean, ctx.std, nw, nb, ctx.eps, pos),
                ),
                (pixels, weight, bias, nw, nb, pos),
                (grad,),
                (needed[0], *needed[2:]),
            )
        else:
            op = getattr(torch.ops.vitkit.patch_embed_packed_bwd, ctx.overload)
            found = op(
                grad.contiguous(), pixels, places, weight, bias, ctx.mean, ctx.std, nw, nb,
                ctx.eps, pos, needed[0], needed[2] or needed[3],
            )  # fmt: skip
        grads = (found[0], None, *found[1:])  # places have none
        return (None,) * 4 + tuple(g if n else None for g, n in zip(grads, needed, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_PatchEmbedPacked.apply, info, in_dims, args)


# ---- checks and choice of the backend
# ----------------------------------------------------------------------------


def _check(
    images,
    weight,
    bias=None,
    *,
    sizes=None,
    mean=None,
    std=None,
    norm_weight=None,
    norm_bias=None,
    norm_eps=1e-6,
    pos_embed=None,
    pad=False,
):
    """Validates a call; returns what backends.select needs."""
    check_floating(NAME, "weight", weight)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"{NAME}: weight must have shape [E, C, Ph, Pw] without a 0, got {tuple(weight.shape)}"
        )
    found = _check_images(images, sizes, weight)
    patch = tuple(weight.shape[2:])
    for size in found:
        if min(size) > 0:
            _patches.check_patch(NAME, size, patch, pad)
    is_uint8 = _dtype_of(images) == torch.uint8
    options = {
        "bias": bias, "mean": mean, "std": std, "norm_weight": norm_weight,
        "norm_bias": norm_bias, "norm_eps": norm_eps,
    }  # fmt: skip
    _patches.check_options(NAME, weight.shape[1], is_uint8, weight, options)
    if pos_embed is not None:
        _check_positions(pos_embed, weight, [_grid(s, patch) for s in found])
    floating = [t for t in (weight, bias, norm_weight, norm_bias, pos_embed) if t is not None]
    return weight.device.type, lambda backend: why_not(backend, floating)


def _dtype_of(images: Any) -> torch.dtype | None:
    if isinstance(images, torch.Tensor):
        return images.dtype
    return images[0].dtype if images else None


def _check_images(images, sizes, weight) -> list[Size]:
    """The sizes of the images."""
    channels = weight.shape[1]
    if isinstance(images, torch.Tensor):
        _patches.check_images(NAME, "images", images, weight)
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(
                f"{NAME}: images must have shape [B, {channels}, H, W], got {tuple(images.shape)}"
            )
        return _check_sizes(sizes, images)
    if not isinstance(images, (list, tuple)):
        raise TypeError(
            f"{NAME}: images must be a tensor or a list of tensors, got {type(images).__name__}"
        )
    if sizes is not None:
        raise ValueError(f"{NAME}: sizes must be None for a list of images, got {sizes!r}")
    for i, image in enumerate(images):
        check_tensor(NAME, f"images[{i}]", image)
        _patches.check_images(NAME, f"images[{i}]", image, weight)
        if image.dtype != images[0].dtype:
            raise TypeError(
                f"{NAME}: images must have one dtype, got {name_of(image.dtype)}"
                f" after {name_of(images[0].dtype)}"
            )
        if image.dim() != 3 or image.shape[0] != channels:
            raise ValueError(
                f"{NAME}: images[{i}] must have shape [{channels}, H, W], got {tuple(image.shape)}"
            )
    return [tuple(image.shape[1:]) for image in images]


def _listed_sizes(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes


def _check_sizes(sizes, images) -> list[Size]:
    batch, _, height, width = images.shape
    if sizes is None:
        return [(height, width)] * batch
    rows = _listed_sizes(sizes)
    shaped = isinstance(rows, (list, tuple)) and all(
        isinstance(r, (list, tuple)) and len(r) == 2 and all(isinstance(n, int) for n in r)
        for r in rows
    )
    if not shaped or len(rows) != batch:
        raise ValueError(f"{NAME}: sizes must be {batch} pairs (height, width), got {sizes!r}")
    for h, w in rows:
        if not (0 <= h <= height and 0 <= w <= width):
            raise ValueError(
                f"{NAME}: sizes must lie between 0 and those of the batch"
                f" {(height, width)}, got {(h, w)}"
            )
    return [(h, w) for h, w in rows]


def _check_positions(pos_embed, weight, grids):
    check_floating(NAME, "pos_embed", pos_embed)
    check_same_device(NAME, "pos_embed", pos_embed, weight, "weight")
    if pos_embed.dim() != 3 or pos_embed.shape[2] != weight.shape[0]:
        raise ValueError(
            f"{NAME}: pos_embed must have shape [rows, columns, E = {weight.shape[0]}],"
            f" got {tuple(pos_embed.shape)}"
        )
    for i, (rows, columns) in enumerate(grids):
        if rows > pos_embed.shape[0] or columns > pos_embed.shape[1]:
            raise ValueError(
                f"{NAME}: pos_embed must cover the grid {rows} x {columns} of image {i},"
                f" got {pos_embed.shape[0]} x {pos_embed.shape[1]}"
            )


def why_not(backend: str, tensors: list[torch.Tensor]) -> str | None:
    """The reason ``backend`` cannot run this (valid) call, None if it can."""
    if backend == "reference":
        return None
    device_type = tensors[0].device.type
    return why_not_dtype(*tensors) or backends.why_not_device(NAME, backend, device_type)


# ---- layout ----


def _grid(size: Size, patch: Size) -> Size:
    return -(-size[0] // patch[0]), -(-size[1] // patch[1])


def _places(
    sizes: Sequence[Size],
    strides: Sequence[tuple[int, int, int]],  # first pixel of each image, of channels, of rows
    patch: Size,
    columns_of_positions: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """places [T, 6], cu_seqlens [S + 1] and positions [T, 2], on the CPU."""
    places, positions, offsets = [torch.empty(0, 6, dtype=torch.int64)], [], [0]
    for size, (start, channel_stride, row_stride) in zip(sizes, strides, strict=True):
        rows, columns = _grid(size, patch)
        row = torch.arange(rows).view(-1, 1).expand(-1, columns).flatten()
        column = torch.arange(columns).view(1, -1).expand(rows, -1).flatten()
        y, x = row * patch[0], column * patch[1]
        places.append(
            torch.stack(
                [
                    start + y * row_stride + x,
                    torch.full_like(x, channel_stride),
                    torch.full_like(x, row_stride),
                    (size[0] - y).clamp(max=patch[0]),
                    (size[1] - x).clamp(max=patch[1]),
                    row * columns_of_positions + column if columns_of_positions else row * 0,
                ],
                1,
            )
        )
        positions.append(torch.stack([row, column], 1).int())
        offsets.append(offsets[-1] + rows * columns)
    at = torch.cat([torch.empty(0, 2, dtype=torch.int32), *positions])
    return torch.cat(places), torch.tensor(offsets, dtype=torch.int32), at


def _flatten(images: Any, sizes: Any, like: torch.Tensor) -> tuple[Any, list[Size], list[Any]]:
    """Pixels as one flat tensor, the size of each image, and where it lies in them."""
    if isinstance(images, torch.Tensor):
        batch, channels, height, width = images.shape
        if sizes is None:
            listed = [(height, width)] * batch
        else:
            listed = [(h, w) for h, w in _listed_sizes(sizes)]
        plane = height * width
        strides = [(i * channels * plane, plane, width) for i in range(batch)]
        return images.contiguous().view(-1), listed, strides
    listed = [(image.shape[1], image.shape[2]) for image in images]
    strides, start = [], 0
    for image, (h, w) in zip(images, listed, strict=True):
        strides.append((start, h * w, w))
        start += image.numel()
    flat = [image.reshape(-1) for image in images]
    pixels = flat[0] if len(flat) == 1 else torch.cat(flat) if flat else like.new_empty(0)
    return pixels.contiguous(), listed, strides


def patch_embed_packed(
    images: torch.Tensor | Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    sizes: Sequence[Size] | torch.Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    pos_embed: torch.Tensor | None = None,
    pad: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``vitkit.patch_embed`` for images of different sizes, their tokens packed for attention.

    Tokens of an image follow those of the one before, row by row, as ``vitkit.flash_attention``
    takes them with ``cu_seqlens_q`` and ``cu_seqlens_k`` (Dehghani et al. 2023, NaViT). Gradients
    for floating images and every parameter.

    Args:
        images: a list of [C, H_i, W_i], or a batch [B, C, H, W] padded at the right and bottom;
            floating with the dtype of weight, or uint8.
        weight, bias, mean, std, norm_weight, norm_bias, norm_eps: as in ``vitkit.patch_embed``.
        sizes: (height, width) of every image of a padded batch; the batch's own size if None. A
            tensor is read on the host, which waits for a GPU.
        pos_embed: [rows, columns, E]; the token at (r, c) of any image gets pos_embed[r, c].
        pad: fill images that the patch does not divide with zeros (after normalisation).
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        (tokens [T, E] in the dtype of weight, cu_seqlens int32 [S + 1], positions int32 [T, 2]: row
        and column of every token in the grid of its image). An image without pixels is a sequence
        without tokens.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or the backend asked for cannot run.

    Example:
        >>> import torch, vitkit
        >>> images = [torch.randn(3, 32, 48), torch.randn(3, 16, 64)]
        >>> weight = torch.randn(8, 3, 16, 16)
        >>> tokens, cu_seqlens, positions = vitkit.patch_embed_packed(images, weight)
        >>> tokens.shape, cu_seqlens.tolist(), positions[-1].tolist()
        (torch.Size([10, 8]), [0, 6, 10], [0, 3])
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        images, weight, bias = _autocast(images, weight, bias)
    device_type, reasons = _check(
        images, weight, bias, sizes=sizes, mean=mean, std=std, norm_weight=norm_weight,
        norm_bias=norm_bias, norm_eps=norm_eps, pos_embed=pos_embed, pad=pad,
    )  # fmt: skip
    chosen = backends.select(NAME, backend, device_type, reasons)
    pixels, listed, strides = _flatten(images, sizes, weight)
    columns = 0 if pos_embed is None else pos_embed.shape[1]
    patch = (weight.shape[2], weight.shape[3])
    tables = _places(listed, strides, patch, columns)
    places, cu_seqlens, positions = (t.to(weight.device) for t in tables)
    if not torch.compiler.is_compiling():
        _library.register_flops()
    mean, std = _patches.floats(mean), _patches.floats(std)
    pos = None if pos_embed is None else pos_embed.flatten(0, 1).contiguous()
    weight = weight.contiguous()
    eps = float(norm_eps)
    tensors: tuple[Any, ...] = (pixels, places, weight, bias, norm_weight, norm_bias, pos)
    if chosen == "reference":
        with torch.autocast(weight.device.type, enabled=False):
            tokens = reference(
                pixels, places, weight, bias, mean, std, norm_weight, norm_bias, eps, pos
            )
        return tokens, cu_seqlens, positions
    overload = "triton" if chosen == "triton" else "default"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if torch.compiler.is_compiling():
            tensors = _library.distinct(*tensors)
        tokens = _library.apply(_PatchEmbedPacked, overload, mean, std, eps, *tensors)
    else:
        op = getattr(torch.ops.vitkit.patch_embed_packed_fwd, overload)
        tokens = op(pixels, places, weight, bias, mean, std, norm_weight, norm_bias, eps, pos)
    return tokens, cu_seqlens, positions


def _autocast(images: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """As a convolution's arguments are cast; bytes stay bytes. Bad types are left to the checks."""
    if not isinstance(weight, torch.Tensor):
        return images, weight, bias
    weight, bias = _library.autocast(weight, bias)
    if isinstance(images, torch.Tensor):
        return _library.autocast(images)[0], weight, bias
    if isinstance(images, (list, tuple)) and all(isinstance(i, torch.Tensor) for i in images):
        return [_library.autocast(i)[0] for i in images], weight, bias
    return images, weight, bias


backends.OPS[NAME] = backends.Op(patch_embed_packed, _check)
