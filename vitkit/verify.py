"""The proof beside the speed: a model's outputs and times, unpatched and patched, against
float64."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from vitkit._numerics import Parity, parity
from vitkit.patch import Report, is_patched, patch, unpatch


@dataclass(frozen=True)
class OutputParity:
    """One output tensor: errors of the patched and the unpatched run against float64-level
    truth."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parity: Parity


@dataclass(frozen=True)
class Verification:
    """Result of ``vitkit.verify``; ``ok`` is the verdict, printing it gives the table."""

    report: Report
    outputs: list[OutputParity]
    seconds_before: float
    seconds_after: float
    kernel_calls: dict[str, int]

    @property
    def ok(self) -> bool:
        return all(o.parity.ok for o in self.outputs) and bool(self.outputs)

    @property
    def speedup(self) -> float:
        return self.seconds_before / self.seconds_after

    @property
    def max_error(self) -> float:
        return max((o.parity.max_error for o in self.outputs), default=0.0)

    @property
    def relative_error(self) -> float:
        return max((o.parity.relative for o in self.outputs), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "speedup": self.speedup}

    def __str__(self) -> str:
        lines = [str(self.report)]
        for op, count in sorted(self.kernel_calls.items()):
            lines.append(f"  {count:>4} calls of {op}")
        for o in self.outputs:
            lines.append(f"output{o.name} {tuple(o.shape)} {o.dtype}: {o.parity}")
        before, after = self.seconds_before * 1e3, self.seconds_after * 1e3
        lines.append(f"time {before:.1f} ms -> {after:.1f} ms, {self.speedup:.2f}x")
        lines.append("same numbers" if self.ok else "NOT the same numbers")
        return "\n".join(lines)


class _CallCounter(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitkit":
            name = f"{func._schema.name}.{func._overloadname}".replace(".default", "")
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _tensors(outputs: Any) -> list[tuple[str, torch.Tensor]]:
    leaves, _ = tree_flatten_with_path(dict(outputs) if isinstance(outputs, dict) else outputs)
    return [
        (keystr(path), t)
        for path, t in leaves
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]


def _to_double(values: Any) -> Any:
    def convert(t):
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return tree_map(convert, values)


def _longest_sum(model: torch.nn.Module) -> int:
    """Terms of the longest sum any layer computes: the rounding a correct model may show."""
    return max((p.numel() // p.shape[0] for p in model.parameters() if p.dim() > 1), default=1)


def _timed(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def verify(
    model: torch.nn.Module,
    *inputs: Any,
    backend: str = "auto",
    seconds: float = 3.0,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Verification:
    """Runs ``model(*inputs, **kwargs)`` in float64, unpatched and patched, and compares.

    The patched run must keep the project's tolerance (``vitkit/_numerics.py``): no output may be
    further from the float64 run than twice the unpatched run is, plus the rounding of its dtype.
    The model is put in eval mode for the comparison and left as it was.

    Args:
        model: unpatched; it is patched and unpatched again here.
        backend: see ``vitkit.patch``.
        seconds: time spent on measuring speed, unpatched and patched runs taking turns.
        progress: called with the name of each step.

    Returns:
        The verification; ``print(result)`` shows it, ``result.ok`` is the verdict.

    Raises:
        ValueError: the model is patched already.

    Example:
        >>> import torch, vitkit
        >>> vitkit.verify(torch.nn.GroupNorm(2, 8), torch.randn(1, 8, 4, 4), seconds=0.01).ok
        True
    """
    if is_patched(model):
        raise ValueError("verify: model must not be patched already")
    tell = progress or (lambda step: None)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            tell("float64 run")
            exact = copy.deepcopy(model).double()
            truth = _tensors(exact(*_to_double(inputs), **_to_double(kwargs)))
            del exact
            tell("unpatched run")
            before = _tensors(model(*inputs, **kwargs))
            report = patch(model, backend=backend)
            tell("patched run")
            with _CallCounter() as counter:
                after = _tensors(model(*inputs, **kwargs))
            tell("timing")
            times = _interleave(model, backend, lambda: model(*inputs, **kwargs), seconds)
    finally:
        unpatch(model)
        for m, mode in training.items():
            m.training = mode
    terms = _longest_sum(model)
    outputs = [
        OutputParity(
            name,
            tuple(a.shape),
            str(a.dtype).removeprefix("torch."),
            parity(a, b, t, terms=terms),
        )
        for (name, a), (_, b), (_, t) in zip(after, before, truth, strict=True)
    ]
    return Verification(report, outputs, *times, counter.calls)


def _interleave(
    model: torch.nn.Module, backend: str, call: Callable[[], Any], seconds: float
) -> tuple[float, float]:
    """Median times unpatched and patched; the model arrives and leaves patched."""
    unpatched_times: list[float] = []
    patched_times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(patched_times) < 3 or (time.perf_counter() < stop and len(patched_times) < 101):
        unpatch(model)
        unpatched_times.append(_timed(call))
        patch(model, backend=backend)
        patched_times.append(_timed(call))
    return statistics.median(unpatched_times), statistics.median(patched_times)
