"""What patch_embed and its packed form share: how pixels become numbers, what follows the
projection, and the checks of their common arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vitkit._checks import check_floating, check_same_device, check_same_dtype, check_shape, name_of

OPTIONS = (
    "Tensor weight, Tensor? bias, float[]? mean, float[]? std, Tensor? norm_weight,"
    " Tensor? norm_bias, float norm_eps, Tensor? pos_embed"
)


def normalised(
    images: torch.Tensor,
    channel_dim: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    compute: torch.dtype,
) -> torch.Tensor:
    """Floating images as they are, bytes as (x / 255 - mean) / std."""
    x = images.to(compute)
    if images.dtype != torch.uint8:
        return x
    x = x / 255
    if mean is not None and std is not None:
        shape = [1] * x.dim()
        shape[channel_dim] = len(mean)
        x = (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)
    return x


def project(
    patches: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [E, ...], K elements a row
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float,
) -> torch.Tensor:
    """LayerNorm(patches @ weight^T + bias), in the dtype of patches."""
    compute = patches.dtype
    z = patches @ weight.to(compute).flatten(1).t()
    if bias is not None:
        z = z + bias.to(compute)
    if norm_weight is None:
        return z
    z = z - z.mean(-1, keepdim=True)
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + norm_eps)
    z = z * norm_weight.to(compute)
    return z if norm_bias is None else z + norm_bias.to(compute)


def check_images(op: str, arg: str, images: Any, weight: torch.Tensor) -> None:
    """Type, dtype and device of images; their shape is the op's concern."""
    if isinstance(images, torch.Tensor) and images.dtype == torch.uint8:
        check_same_device(op, arg, images, weight, "weight")
        return
    if isinstance(images, torch.Tensor) and not images.is_floating_point():
        raise TypeError(f"{op}: {arg} must be floating or uint8, got {name_of(images.dtype)}")
    check_floating(op, arg, images)
    check_same_device(op, arg, images, weight, "weight")
    check_same_dtype(op, arg, images, weight, "weight")


def check_options(
    op: str, channels: int, is_uint8: bool, weight: torch.Tensor, options: dict[str, Any]
) -> None:
    """bias, mean, std, norm_weight, norm_bias and norm_eps."""
    embed_dim = weight.shape[0]
    for arg in ("bias", "norm_weight", "norm_bias"):
        value = options[arg]
        if value is not None:
            check_floating(op, arg, value)
            check_same_device(op, arg, value, weight, "weight")
            check_shape(op, arg, value, (embed_dim,), "[E]")
    if options["norm_bias"] is not None and options["norm_weight"] is None:
        raise ValueError(f"{op}: norm_bias must be None without norm_weight, got a tensor")
    eps = options["norm_eps"]
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"{op}: norm_eps must be a finite number >= 0, got {eps!r}")
    mean, std = options["mean"], options["std"]
    if (mean is None) != (std is None):
        missing, value = ("mean", std) if mean is None else ("std", mean)
        raise ValueError(f"{op}: {missing} must be given together with its twin, got {value!r}")
    for arg, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if not is_uint8:
            raise ValueError(
                f"{op}: {arg} must be None for floating images (they are normalised already),"
                f" got {values!r}"
            )
        numbers = isinstance(values, (list, tuple)) and all(
            isinstance(v, (int, float)) and abs(v) < math.inf for v in values
        )
        if not numbers or len(values) != channels:
            raise ValueError(f"{op}: {arg} must be {channels} finite numbers, got {values!r}")
        if arg == "std" and min(values, default=1) <= 0:
            raise ValueError(f"{op}: std must be positive, got {values!r}")


def check_patch(op: str, sizes: Sequence[int], patch: Sequence[int], pad: bool) -> None:
    """Image sizes against patch sizes, both (T,) H, W."""
    if pad and min(sizes) > 0:
        return
    small = any(s < p for s, p in zip(sizes, patch, strict=True))
    if small or any(s % p for s, p in zip(sizes, patch, strict=True)):
        given, wanted = (" x ".join(map(str, n)) for n in (sizes, patch))
        rule = (
            "at least one patch of {} large" if small else "divisible by the patch {} (or pad=True)"
        )
        raise ValueError(f"{op}: images must be {rule.format(wanted)}, got {given}")


def floats(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(v) for v in values]
