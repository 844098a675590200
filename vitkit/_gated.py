"""What ``swiglu`` and ``geglu`` share: y = value * activation(gate), of the halves of one tensor
or of two tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vitkit import _library, backends
from vitkit._checks import (
    NATIVE_FLOATING,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    name_of,
)

_memo = _library.Memo()


def value_and_gate(
    x: torch.Tensor, gate: torch.Tensor | None, gate_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the two halves of a packed x, or the two tensors given, in float32 or wider."""
    if gate is None:
        first, second = x.chunk(2, -1)
        value, gate = (first, second) if gate_last else (second, first)
    else:
        value = x
    compute = torch.promote_types(x.dtype, torch.float32)
    return value.to(compute), gate.to(compute)


def fwd_fake(x, gate, gate_last, *options):
    width = x.shape[-1] // 2 if gate is None else x.shape[-1]
    return x.new_empty((*x.shape[:-1], width))


def bwd_fake(grad, x, gate, gate_last, *options):
    return x.new_empty(x.shape), x.new_empty(0 if gate is None else gate.shape)


def fwd_flops(activation: int) -> Callable[..., int]:
    """Of ``activation`` FLOPs and one product per element of the output."""

    def flops(x_shape, gate_shape, *args, **kwargs) -> int:
        return (1 + activation) * (math.prod(x_shape) // (2 if gate_shape is None else 1))

    return flops


def bwd_flops(activation: int) -> Callable[..., int]:
    """Twice the forward pass."""

    def flops(grad_shape, *args, **kwargs) -> int:
        return 2 * (1 + activation) * math.prod(grad_shape)

    return flops


def has_rows(x: torch.Tensor) -> bool:
    """Whether x is rows of consecutive elements at one distance, as a half of a packed tensor is:
    what the kernels read."""
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return False
    dims = [(x.shape[d], x.stride(d)) for d in range(x.dim() - 1) if x.shape[d] != 1]
    return all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(dims))


def check(name: str, x: Any, gate: Any, gate_last: Any) -> None:
    """Raises what is wrong with a call."""
    check_floating(name, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{name}: x must have at least one dimension, got shape ()")
    if not isinstance(gate_last, bool):
        raise TypeError(f"{name}: gate_last must be a bool, got {type(gate_last).__name__}")
    if gate is None:
        if x.shape[-1] % 2:
            raise ValueError(
                f"{name}: x must have an even last dimension, its halves being value and gate"
                f" (or give gate), got {tuple(x.shape)}"
            )
        return
    check_floating(name, "gate", gate)
    check_same_device(name, "gate", gate, x, "x")
    check_same_dtype(name, "gate", gate, x, "x")
    check_shape(name, "gate", gate, tuple(x.shape), "of x")


def why_not(name: str, backend: str, x: torch.Tensor) -> str | None:
    """The reason ``backend`` cannot run a (valid) call, None if it can."""
    if backend == "reference":
        return None
    if x.dtype not in NATIVE_FLOATING:
        return f"its kernels take float32, bfloat16 and float16, got {name_of(x.dtype)}"
    return backends.why_not_device(name, backend, x.device.type)


class Plan(NamedTuple):
    """All that shapes, strides, dtypes and devices decide about a call."""

    fwd: Any  # the operator, None for the reference
    overload: str
    copy: tuple[bool, bool]  # whether x and gate are not rows


def plan(
    name: str,
    x: Any,
    gate: Any,
    options: tuple[Any, ...],
    backend: str,
    checked: Callable[[], tuple[str, backends.WhyNot]],
) -> Plan:
    """Chooses the backend of a call after ``checked()``, once for calls of the same layout."""
    # True == 1, but only one of them is a bool.
    kinds = tuple(map(type, options))
    key = _library.layout_key(name, backend, *options, kinds, x, gate)
    found = _memo.get(key)
    if found is None:
        device_type, reasons = checked()
        chosen = backends.select(name, backend, device_type, reasons)
        overload = "triton" if chosen == "triton" else "default"
        operator = getattr(getattr(torch.ops.vitkit, f"{name}_fwd"), overload)
        copy = (not has_rows(x), gate is not None and not has_rows(gate))
        found = Plan(None if chosen == "reference" else operator, overload, copy)
        _memo.put(key, found)
    return found


def promoted(x: Any, gate: Any) -> tuple[Any, Any]:
    """Both in the wider dtype where autocast left them different, as a product of them would be."""
    tensors = isinstance(x, torch.Tensor) and isinstance(gate, torch.Tensor)
    if tensors and x.dtype != gate.dtype and torch.is_autocast_enabled(x.device.type):
        dtype = torch.promote_types(x.dtype, gate.dtype)
        return x.to(dtype), gate.to(dtype)
    return x, gate
