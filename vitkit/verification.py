"""What ``vitkit.verify`` found, as data and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from vitkit import backends
from vitkit._numerics import Parity
from vitkit.patch import Report

if TYPE_CHECKING:
    from rich.console import Group

# Beyond this relative L2 distance between the unpatched and the float64 run, twice that distance
# would let wrong numbers pass: the runs do not compute the same thing.
LOOSEST_YARDSTICK = 0.25
PROVES_NOTHING = "which proves nothing (does the model draw random numbers?)"

BEFORE, AFTER = "unpatched", "patched"
COMPILED = {BEFORE: "compiled", AFTER: "patched, compiled"}


@dataclass(frozen=True)
class OutputParity:
    """One tensor: errors of the patched and the unpatched run against float64-level truth.

    Attributes:
        eager_l2_error: relative L2 error of the unpatched run, the yardstick.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parity: Parity
    eager_l2_error: float

    @property
    def closeness(self) -> float:
        """Error over limit, the larger of the two norms'."""
        p = self.parity
        pairs = ((p.max_error, p.max_limit), (p.l2_error, p.l2_limit))
        return max(error / limit if limit else math.inf if error else 0.0 for error, limit in pairs)


@dataclass(frozen=True)
class Timing:
    """Speed and memory of one way to call the model.

    Attributes:
        seconds: median time of a call.
        speedup: median over the rounds of unpatched over this time: two calls one after the other
            share what the machine's neighbours do to them.
        spread: the least and the most of those ratios.
        peak_bytes: most memory allocated at once by a call, beyond what was there.
    """

    seconds: float
    speedup: float
    spread: tuple[float, float]
    peak_bytes: float


@dataclass(frozen=True)
class Verification:
    """Result of ``vitkit.verify``. ``ok`` is the verdict; printing it gives the whole table.

    Attributes:
        own: the model's modules of vitkit's own; "unpatched" means them on backend ``reference``.
        outputs: of a call; ``gradients``: of its parameters and inputs, if they were asked for.
        timings: "unpatched" and "patched", and, if asked for, "compiled" and "patched, compiled";
            empty if nothing was timed.
        rounds: calls timed of each, taking turns.
        kernel_calls: op -> backend -> kernels run by one patched call.
        failures: what patching broke: compiling.
        notes: what could not be run for other reasons.
    """

    report: Report
    own: dict[str, int]
    outputs: list[OutputParity]
    gradients: list[OutputParity]
    timings: dict[str, Timing]
    rounds: int
    kernel_calls: dict[str, dict[str, int]]
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Why the verdict is no; empty if it is yes."""
        found = list(self.failures)
        tensors = [*self.outputs, *self.gradients]
        found += [f"{o.name}: {o.parity}" for o in tensors if not o.parity.ok]
        found += [
            f"{o.name}: the unpatched run is {o.eager_l2_error:.2g} away from the float64 run,"
            f" {PROVES_NOTHING}"
            for o in self.outputs
            if not o.eager_l2_error <= LOOSEST_YARDSTICK
        ]
        # Single gradients are nothing but rounding in a narrow dtype: what is left of large terms.
        far = sum(not g.eager_l2_error <= LOOSEST_YARDSTICK for g in self.gradients)
        if 2 * far > len(self.gradients):
            count = f"{far} of {len(self.gradients)} gradients"
            found.append(f"{count} of the unpatched run are far from float64, {PROVES_NOTHING}")
        plain = self.report.backend == "reference" or backends.DEFAULT == "reference"
        if self.touched and not self.kernel_calls and not plain:
            found.append("modules were replaced, but no kernel ran")
        return found

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def touched(self) -> bool:
        """Whether there is anything that could run on a kernel."""
        return bool(self.report.replaced or self.own)

    @property
    def worst(self) -> OutputParity:
        """The output with the largest error relative to its largest value."""
        return max(self.outputs, key=lambda o: o.parity.relative)

    @property
    def closeness(self) -> float:
        """The largest error of any output or gradient over its limit."""
        return max(o.closeness for o in [*self.outputs, *self.gradients])

    @property
    def seconds_before(self) -> float:
        return self.timings[BEFORE].seconds

    @property
    def seconds_after(self) -> float:
        return self.timings[AFTER].seconds

    @property
    def speedup(self) -> float:
        return self.timings[AFTER].speedup

    @property
    def backend(self) -> str:
        """The backends whose kernels ran."""
        used = {backend for counts in self.kernel_calls.values() for backend in counts}
        return ", ".join(sorted(used)) or ("reference" if self.touched else "none")

    @property
    def baseline(self) -> str:
        """What "unpatched" means for this model."""
        if not self.own:
            return "the unpatched model"
        with_patch = "unpatched, " if self.report.replaced else ""
        return f"the same model {with_patch}with its modules of vitkit on backend reference"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what is derived from it."""
        derived = ("ok", "problems", "backend", "baseline", "closeness")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def _lines(self) -> list[str]:
        lines = []
        if self.own:
            parts = ", ".join(f"{n} {cls}" for cls, n in sorted(self.own.items()))
            lines += [f"modules of vitkit's own: {parts}", f"compared with {self.baseline}"]
        lines += [
            f"{count:>6} calls of {op} on {backend}"
            for op, by_backend in sorted(self.kernel_calls.items())
            for backend, count in by_backend.items()
        ]
        lines += [f"{o.name} {list(o.shape)} {o.dtype}: {o.parity}" for o in self.outputs]
        if self.gradients:
            worst = max(self.gradients, key=lambda g: g.closeness)
            lines.append(f"{len(self.gradients)} gradients; worst {worst.name}: {worst.parity}")
        for name, t in self.timings.items():
            text = f"{name:>17}  {t.seconds * 1e3:9.1f} ms  {t.speedup:5.2f}x"
            spread = f"({t.spread[0]:.2f} to {t.spread[1]:.2f})"
            lines.append(f"{text} {spread:<16}  {t.peak_bytes / 2**20:9.1f} MiB")
        if self.timings:
            lines.append(f"(medians of {self.rounds} rounds, and their range; memory at its peak)")
        return lines + [f"not run: {note}" for note in self.notes]

    def _verdict(self) -> list[str]:
        if not self.ok:
            return ["NOT the same numbers:", *self.problems]
        if not self.touched:
            return ["nothing to verify: no module has a kernel"]
        return ["same numbers"]

    def __str__(self) -> str:
        return "\n".join([str(self.report), *self._lines(), *self._verdict()])

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        style = "bold red" if not self.ok else "bold green" if self.touched else "bold yellow"
        facts = (Text(line) for line in self._lines())
        return Group(self.report, *facts, Text("\n".join(self._verdict()), style))
