"""Argument checks shared by the ops. Messages read ``"<op>: <arg> must <rule>, got <value>"``."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE_FLOATING = FLOATING[:3]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, arg: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {arg} must be a tensor, got {type(value).__name__}")


def check_floating(op: str, arg: str, value: Any) -> None:
    check_tensor(op, arg, value)
    if value.dtype not in FLOATING:
        allowed = ", ".join(name_of(d) for d in FLOATING)
        raise TypeError(f"{op}: {arg} must be one of {allowed}, got {name_of(value.dtype)}")


def why_not_dtype(*tensors: torch.Tensor) -> str | None:
    """The reason no kernel takes these (valid) tensors, None if their dtypes have kernels."""
    wide = next((t.dtype for t in tensors if t.dtype not in NATIVE_FLOATING), None)
    if wide is None:
        return None
    return f"its kernels take float32, bfloat16 and float16, got {name_of(wide)}"


def check_same_device(
    op: str, arg: str, value: torch.Tensor, like: torch.Tensor, like_name: str
) -> None:
    if value.device != like.device:
        raise ValueError(
            f"{op}: {arg} must be on the device of {like_name} ({like.device}), got {value.device}"
        )


def check_same_dtype(
    op: str, arg: str, value: torch.Tensor, like: torch.Tensor, like_name: str
) -> None:
    if value.dtype != like.dtype:
        raise TypeError(
            f"{op}: {arg} must have the dtype of {like_name} ({name_of(like.dtype)}),"
            f" got {name_of(value.dtype)}"
        )


def check_shape(op: str, arg: str, value: torch.Tensor, shape: tuple[int, ...], names: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {arg} must have shape {names} = {tuple(shape)}, got {tuple(value.shape)}"
        )


def check_cu_seqlens(op: str, arg: str, value: Any, q: torch.Tensor) -> None:
    """Type, shape and device of the offsets of packed sequences."""
    check_tensor(op, arg, value)
    if value.dtype != torch.int32:
        raise TypeError(f"{op}: {arg} must be int32, got {name_of(value.dtype)}")
    check_same_device(op, arg, value, q, "q")
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{op}: {arg} must have shape [S + 1], got {tuple(value.shape)}")


# id -> (weak reference, version, tokens) of offsets found right
_checked_values: dict[int, tuple[weakref.ref, int, int]] = {}


def check_cu_seqlens_values(op: str, arg: str, value: torch.Tensor, tokens: int) -> None:
    """Reads the offsets once per tensor and version: the layers of a model share one cu_seqlens,
    and on a GPU reading it waits for the device. Kernels clamp the values as well, so skipping the
    check under capture is safe."""
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    # Tensors made in inference mode have no version: they are read on every call.
    version = None if value.is_inference() else value._version
    seen = _checked_values.get(id(value))
    if seen is not None and seen[0]() is value and seen[1:] == (version, tokens):
        return
    offsets = value.tolist()
    increasing = all(a <= b for a, b in itertools.pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != tokens or not increasing:
        shown = offsets if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise ValueError(
            f"{op}: {arg} must start at 0, never decrease and end at the number of tokens"
            f" {tokens}, got {shown}"
        )
    if version is not None:
        if len(_checked_values) > 256:
            _checked_values.clear()
        _checked_values[id(value)] = (weakref.ref(value), version, tokens)
