"""What all Triton kernels share: launching, device facts, exp2 and Chan's merge of moments.

A launcher builds :class:`Launch` objects and runs them. The same objects, built from meta tensors,
are compiled ahead of time by ``_aot.py``: what is checked is what runs, down to the divisibility of
each stride.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import triton
import triton.language as tl

INTERPRET = bool(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Multiprocessors of the GPU each class is compiled for ahead of time (A100, H100, B200, MI300X);
# a launcher on a real device asks the device. "cpu" is the interpreter: one program after another.
_TYPICAL_UNITS = {"sm80": 108, "sm86": 84, "sm90": 132, "sm100": 148, "hip": 304, "cpu": 4}


@dataclass(frozen=True)
class Device:
    """What tile tables are keyed by. ``arch`` is one of sm80, sm86 (99 KB of shared memory: 8.6,
    8.9, 12.x), sm90, sm100, hip, cpu (interpreter)."""

    arch: str
    units: int

    @classmethod
    def typical(cls, arch: str) -> Device:
        """A device of class ``arch`` that need not be present."""
        return cls(arch, _TYPICAL_UNITS[arch])


@functools.cache
def _cuda_device(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device("hip", facts.multi_processor_count)
    major, minor = facts.major, facts.minor
    arch = {8: "sm80", 9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm86")
    if major == 8 and minor in (6, 9):
        arch = "sm86"
    return Device(arch, facts.multi_processor_count)


def device_of(tensor: torch.Tensor) -> Device:
    """Class and size of the device ``tensor`` is on."""
    if tensor.is_cuda:
        return _cuda_device(tensor.device.index)
    return Device.typical("cpu")


@dataclass
class Launch:
    """One kernel launch: run it by calling it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        # Multiply-add contraction is asked for: Triton 3.10 turns it off by default, and the
        # exponent of every softmax element is one multiply-add.
        self.options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants, **self.options)


def run(launches: list[Launch], on: torch.Tensor) -> None:
    """Runs ``launches`` in order on the device of ``on``; meta tensors run nothing."""
    if on.is_meta:
        return
    if INTERPRET and any(_is_bf16(a) for launch in launches for a in launch.args):
        _require_bf16_in_interpreter()
    elsewhere = on.is_cuda and on.device.index != torch.cuda.current_device()
    with torch.cuda.device(on.device) if elsewhere else contextlib.nullcontext():
        for launch in launches:
            launch()


def _is_bf16(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16


@functools.cache
def _require_bf16_in_interpreter() -> None:
    """Triton's interpreter (3.6 to 3.9 at least) computes bfloat16 on its bit patterns and says
    nothing: refuse instead of returning garbage."""
    one = torch.ones(1, dtype=torch.bfloat16)
    _add_kernel[(1,)](one)
    if one.item() != 2:
        raise NotImplementedError(
            "triton: this version's interpreter computes wrong bfloat16 results without an error;"
            " use float32 or float16, or repair it as tests/triton_interpreter.py does"
        )


@triton.jit
def _add_kernel(x_ptr):
    x = tl.load(x_ptr)
    tl.store(x_ptr, x + x)


@dataclass(frozen=True)
class AotSpec:
    """A representative call, for compiling without a GPU.

    ``launches(device)`` returns what the launcher would run for meta tensors on a device.
    ``matmul``: the machine code must contain tensor core instructions.
    """

    name: str
    launches: Callable[[Device], list[Launch]]
    matmul: bool = False


def token_strides(*tensors: torch.Tensor) -> tuple[int, list[tuple[int, int, int]]]:
    """(unit, [(batch, head, token) in units of ``unit`` elements]) of [B, N, H, D] or [T, H, D]."""
    triples = [(t.stride(0) if t.dim() == 4 else 0, t.stride(-2), t.stride(-3)) for t in tensors]
    unit = 8 if all(s % 8 == 0 for triple in triples for s in triple) else 1
    return unit, [(b // unit, h // unit, n // unit) for b, h, n in triples]


def row_stride(t: torch.Tensor | None) -> int:
    """Elements between neighbouring rows of a tensor whose rows lie one stride apart; 0 if there is
    one row only."""
    outer = [] if t is None else [t.stride(d) for d in range(t.dim() - 1) if t.shape[d] != 1]
    return outer[-1] if outer else 0


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def largest_power_of_2(n: int) -> int:
    """Largest power of two <= n (n >= 1)."""
    return 1 << (n.bit_length() - 1)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def sigmoid(x):
    """exp(-x) may overflow to inf, 1 / inf is the right 0."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def merge_moments(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Moments (count, mean, sum of squared deviations) of two sets united, by Chan's formula.
    Either set may be empty."""
    count = count_a + count_b
    share = tl.where(count > 0, count_b / tl.maximum(count, 1.0), 0.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def unite_moments(count, mean, m2, AXIS: tl.constexpr):
    """Moments of the union of the sets along AXIS, in two passes over them."""
    total = tl.sum(count, AXIS)
    whole = tl.sum(count * mean, AXIS) / tl.maximum(total, 1.0)
    delta = mean - tl.expand_dims(whole, AXIS)
    return total, whole, tl.sum(m2 + count * delta * delta, AXIS)
