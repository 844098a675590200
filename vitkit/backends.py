"""Choice of the backend of a call.

An op offers four backends: ``cuda`` (C++), ``triton``, ``cpu`` (C++) and ``reference`` (plain
PyTorch). ``auto`` takes the first that can run, in the order of :data:`ORDER`; naming one that
cannot run raises its reason and never falls back. The environment variable ``VITKIT_BACKEND``, read
when vitkit is imported, replaces ``auto``.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vitkit import _library

BACKENDS = ("cuda", "triton", "cpu", "reference")
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
DEFAULT = os.environ.get("VITKIT_BACKEND", "auto")

FORWARD_MODE = "only the reference has forward-mode derivatives (torch.func.jvp)"

WhyNot = Callable[[str], "str | None"]
"""Takes a backend name, returns the reason it cannot run the call at hand, None if it can."""


@dataclass(frozen=True)
class Op:
    """What :func:`explain` needs to know of an op; ``check`` validates a call and returns (device
    type, why_not)."""

    public: Callable[..., Any]
    check: Callable[..., tuple[str, WhyNot]]
    cuda_path: Callable[..., str] | None = None
    """Which of its kernels a call on backend ``cuda`` takes, and why, where there is a choice."""


OPS: dict[str, Op] = {}


def why_not_device(op: str, backend: str, device_type: str) -> str | None:
    """The reasons every op shares: forward-mode derivatives, wrong device, library not built or not
    loadable, no such kernel, Triton missing."""
    if backend == "reference":
        return None
    if _library.in_forward_mode():
        return FORWARD_MODE
    if backend in ("cpu", "cuda"):
        if device_type != backend:
            return f"it runs on {backend} tensors, these are on {device_type}"
        return _library.native_kernel_error(op, device_type)
    return _library.triton_error(device_type)


def select(op: str, backend: str, device_type: str, why_not: WhyNot) -> str:
    """The backend that runs this call.

    Raises:
        ValueError: unknown backend, or the backend asked for cannot run; the message holds the
            reason.
    """
    if backend == "auto":
        backend = DEFAULT
    if backend == "auto":
        for candidate in ORDER.get(device_type, ("reference",)):
            if why_not(candidate) is None:
                return candidate
        raise ValueError(f"{op}: no backend can run on {device_type}")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reason = why_not(backend)
    if reason is not None:
        raise ValueError(f"{op}: backend {backend!r} cannot run: {reason}")
    return backend


def first_kernel(device_type: str, why_not: WhyNot) -> str | None:
    """The backend that ``auto`` takes, None if that is the reference."""
    candidates = (c for c in ORDER.get(device_type, ()) if c != "reference")
    return next((c for c in candidates if why_not(c) is None), None)


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would take and why each other one would not."""

    op: str
    backend: str
    reasons: dict[str, str | None]
    kernels: list[dict[str, Any]] = field(default_factory=list)
    """Of backend ``cuda``, as they were compiled: one entry per kernel and architecture."""
    cuda_path: str | None = None
    """Which of them this call takes, and why, where backend ``cuda`` has a choice."""

    def __str__(self) -> str:
        width = max(len(name) for name in self.reasons)
        lines = [f"vitkit.{self.op} would run on {self.backend!r}"]
        for name, reason in self.reasons.items():
            state = (
                "chosen"
                if name == self.backend
                else "can run"
                if reason is None
                else f"cannot: {reason}"
            )
            lines.append(f"  {name:<{width}}  {state}")
        if self.cuda_path:
            lines.append(f"CUDA forward pass: {self.cuda_path}")
        if self.kernels:
            lines.append("CUDA kernels of this build:")
            lines += [f"  {describe(kernel)}" for kernel in self.kernels]
        return "\n".join(lines)


def describe(kernel: dict[str, Any]) -> str:
    """A line about an entry of :func:`kernels_of`."""
    low, high = kernel["registers"]
    registers = f"{low}" if low == high else f"{low} to {high}"
    spilled = f"{kernel['spilled_bytes']} bytes spilled" if kernel["spilled_bytes"] else "no spills"
    return (
        f"{kernel['kernel']} x {kernel['instantiations']}, {kernel['arch']}: {registers} registers,"
        f" {spilled}"
    )


def kernels_of(op: str) -> list[dict[str, Any]]:
    """What the compiler made of the CUDA kernels of ``op``; empty without them. Sources are named
    after their op, and may say more after its name."""

    def owner(source: str) -> str:
        names = [n for n in OPS if source == n or source.startswith(f"{n}_")]
        return max(names, key=len, default="")

    return [k for k in _library.kernel_attributes() if owner(k["source"]) == op]


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend ``vitkit.<op>(*args, **kwargs)`` would run on, and why each other one
    would not.

    Nothing is computed. Bad arguments raise what the op itself would raise.

    Example:
        >>> import torch, vitkit
        >>> x = torch.zeros(1, 8, 4, 4, dtype=torch.float64)
        >>> vitkit.explain("group_norm_silu", x, 4).backend
        'reference'
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {sorted(OPS)}, got {op!r}")
    entry = OPS[op]
    bound = inspect.signature(entry.public).bind(*args, **kwargs)
    bound.apply_defaults()
    backend = bound.arguments.pop("backend")
    device_type, why_not = entry.check(**bound.arguments)
    chosen = select(op, backend, device_type, why_not)
    path = entry.cuda_path(**bound.arguments) if entry.cuda_path and chosen == "cuda" else None
    reasons = {name: why_not(name) for name in BACKENDS}
    return Explanation(op, chosen, reasons, kernels_of(op), path)
