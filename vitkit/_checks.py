"""Argument checks shared by the ops. Messages read ``"<op>: <arg> must <rule>, got <value>"``."""

from __future__ import annotations

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
