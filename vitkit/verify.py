"""The proof beside the speed: a model's outputs and times, unpatched and patched, against
float64."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from vitkit import backends
from vitkit._numerics import Parity, parity
from vitkit.patch import Report, is_patched, patch, unpatch

if TYPE_CHECKING:
    from rich.console import Group

# Beyond this relative L2 distance between the unpatched and the float64 run, twice that distance
# would let wrong numbers pass: the runs do not compute the same thing.
LOOSEST_YARDSTICK = 0.25


class KernelCalls(TorchDispatchMode):
    """Counts, while entered, the vitkit kernels that really run: op -> backend -> calls.

    Example:
        >>> import torch, vitkit
        >>> with KernelCalls() as calls:
        ...     y = vitkit.group_norm_silu(torch.randn(1, 8, 4, 4), 2, backend="cpu")
        >>> calls.counts
        {'group_norm_silu_fwd': {'cpu': 1}}
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, dict[str, int]] = {}

    def total(self, op: str) -> int:
        return sum(self.counts.get(op, {}).values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitkit":
            op = func._schema.name.removeprefix("vitkit::")
            device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
            backend = func._overloadname if func._overloadname != "default" else device
            by_backend = self.counts.setdefault(op, {})
            by_backend[backend] = by_backend.get(backend, 0) + 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class OutputParity:
    """One output tensor: errors of the patched and the unpatched run against float64-level truth.

    Attributes:
        eager_l2_error: relative L2 error of the unpatched run, the yardstick.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parity: Parity
    eager_l2_error: float


@dataclass(frozen=True)
class Verification:
    """Result of ``vitkit.verify``. ``ok`` is the verdict; printing it gives the whole table.

    Attributes:
        seconds_before, seconds_after: median time of a call, unpatched and patched.
        speedup: median over the rounds of unpatched over patched time: two calls one after the
            other share what the machine's neighbours do to them.
        rounds: calls timed of each, taking turns.
        kernel_calls: op -> backend -> kernels run by one patched call.
    """

    report: Report
    outputs: list[OutputParity]
    seconds_before: float
    seconds_after: float
    speedup: float
    rounds: int
    kernel_calls: dict[str, dict[str, int]]

    @property
    def problems(self) -> list[str]:
        """Why the verdict is no; empty if it is yes."""
        found = []
        for o in self.outputs:
            if not o.parity.ok:
                found.append(f"output{o.name}: {o.parity}")
            if not o.eager_l2_error <= LOOSEST_YARDSTICK:
                found.append(
                    f"output{o.name}: the unpatched run is {o.eager_l2_error:.2g} away from the"
                    " float64 run, which proves nothing (is the model random in eval mode?)"
                )
        plain = self.report.backend == "reference" or backends.DEFAULT == "reference"
        if self.report.replaced and not self.kernel_calls and not plain:
            found.append("modules were replaced, but no kernel ran")
        return found

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> OutputParity:
        """The output with the largest error relative to its largest value."""
        return max(self.outputs, key=lambda o: o.parity.relative)

    @property
    def backend(self) -> str:
        """The backends whose kernels ran."""
        used = {backend for counts in self.kernel_calls.values() for backend in counts}
        return ", ".join(sorted(used)) or ("reference" if self.report.replaced else "none")

    def to_dict(self) -> dict[str, Any]:
        derived = {"ok": self.ok, "problems": self.problems}
        return {**asdict(self), **derived, "backend": self.backend}

    def _lines(self) -> list[str]:
        lines = [
            f"{count:>6} calls of {op} on {backend}"
            for op, by_backend in sorted(self.kernel_calls.items())
            for backend, count in by_backend.items()
        ]
        lines += [f"output{o.name} {list(o.shape)} {o.dtype}: {o.parity}" for o in self.outputs]
        before, after = self.seconds_before * 1e3, self.seconds_after * 1e3
        lines.append(
            f"time {before:.1f} ms -> {after:.1f} ms, {self.speedup:.2f}x"
            f" (medians of {self.rounds} rounds)"
        )
        verdict = ["same numbers"] if self.ok else ["NOT the same numbers:", *self.problems]
        return lines + verdict

    def __str__(self) -> str:
        return "\n".join([str(self.report), *self._lines()])

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        *facts, verdict = self._lines() if self.ok else [*self._lines(), ""]
        style = "bold green" if self.ok else "bold red"
        return Group(self.report, *(Text(line) for line in facts), Text(verdict, style))


def _tensors(outputs: Any) -> list[tuple[str, torch.Tensor]]:
    leaves, _ = tree_flatten_with_path(dict(outputs) if isinstance(outputs, dict) else outputs)
    found = [
        (keystr(path), t)
        for path, t in leaves
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]
    if not found:
        raise ValueError(
            f"verify: model must return floating point tensors, got {type(outputs).__name__}"
        )
    return found


def _to_double(values: Any) -> Any:
    def convert(t):
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return tree_map(convert, values)


def longest_sum(model: torch.nn.Module) -> int:
    """Terms of the longest sum any layer computes: the rounding a correct model may show."""
    layers = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    weights = [m.weight for m in model.modules() if isinstance(m, layers)]
    return max((w.numel() // w.shape[0] for w in weights if w.numel()), default=1)


def _compare(
    name: str, after: torch.Tensor, before: torch.Tensor, exact: torch.Tensor, terms: int
) -> OutputParity:
    distance = (before.to(exact.device).double() - exact).norm().item()
    norm = exact.norm().item()
    return OutputParity(
        name,
        tuple(after.shape),
        str(after.dtype).removeprefix("torch."),
        parity(after, before, exact, terms=terms),
        distance / norm if norm else distance,
    )


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
    The model is put in eval mode for the comparison and left as it was; a copy of it in float64
    must fit in memory. It must compute the same on every call: no random numbers.

    Args:
        model: unpatched; it is patched and unpatched again here.
        backend: see ``vitkit.patch``.
        seconds: time spent on measuring speed, unpatched and patched calls taking turns; at least
            five of each.
        progress: called with the name of each step.

    Returns:
        The verification; ``print(result)`` shows it, ``result.ok`` is the verdict.

    Raises:
        ValueError: the model is patched already, or returns no floating point tensor.

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
            with KernelCalls() as calls:
                after = _tensors(model(*inputs, **kwargs))
            tell("timing")
            times = _take_turns(model, backend, lambda: model(*inputs, **kwargs), seconds)
    finally:
        unpatch(model)
        for m, mode in training.items():
            m.training = mode
    terms = longest_sum(model)
    outputs = [
        _compare(name, a, b, t, terms)
        for (name, a), (_, b), (_, t) in zip(after, before, truth, strict=True)
    ]
    return Verification(report, outputs, *times, calls.counts)


def _take_turns(
    model: torch.nn.Module, backend: str, call: Callable[[], Any], seconds: float
) -> tuple[float, float, float, int]:
    """Median times unpatched and patched, median of their ratios, and the number of rounds; the
    model arrives and leaves patched."""
    on_gpu = any(p.is_cuda for p in model.parameters())

    def timed() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    before: list[float] = []
    after: list[float] = []
    stop = time.perf_counter() + seconds
    while len(after) < 5 or (time.perf_counter() < stop and len(after) < 101):
        # First one, then the other first: what drifts favours neither.
        if len(after) % 2:
            after.append(timed())
        unpatch(model)
        before.append(timed())
        patch(model, backend=backend)
        if len(after) < len(before):
            after.append(timed())
    ratios = [b / a for b, a in zip(before, after, strict=True)]
    medians = [statistics.median(values) for values in (before, after, ratios)]
    return medians[0], medians[1], medians[2], len(ratios)
