"""How a row is measured: parity first, providers taking turns, medians, parity again.

Every provider of a case gets the same tensors. A provider whose numbers miss the tolerance is not
timed, before or after; a result beyond the measured roofline is refused; a slow-down is a row like
any other.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from vitkit._checks import name_of
from vitkit._memory import peak_bytes
from vitkit._numerics import Parity, parity

from .ceilings import Roofline
from .timing import Clock, interval, spread, synchronize

Outputs = Sequence[torch.Tensor]
MAX_AUTOTUNE = "max-autotune"


@dataclass
class Provider:
    """One way to compute a case. ``call`` returns the outputs (and gradients) to compare."""

    name: str
    call: Callable[[], Outputs]
    ours: bool = False

    @property
    def thorough(self) -> bool:
        """Whether it takes so long to tune that it runs only where that is asked for."""
        return MAX_AUTOTUNE in self.name


@dataclass
class Case:
    """One shape of one op.

    Args:
        op, name: the op, and the model the shape comes from.
        mode: "forward" or "forward+backward".
        dtype, layout: as printed.
        shape: as printed.
        providers: ours and the rivals, made lazily: ``make()`` allocates and compiles.
        exact: the outputs in float64.
        eager: the provider whose error is the yardstick.
        flops, bytes: of the mathematical operation; bytes are inputs and outputs touched once.
        terms: of the longest sum, for the tolerance.
        target: the least acceptable ratio of the best rival's time to ours, None without one.
        sets: which sets it belongs to; "fast forward": to the fast set if it is a forward pass,
            "fast float32": if it is of that dtype.
        curve, size: the scaling curve it is a point of and its place there; "" without one.
    """

    op: str
    name: str
    mode: str
    dtype: torch.dtype
    layout: str
    shape: str
    make: Callable[[], tuple[list[Provider], Callable[[], Outputs]]]
    flops: float
    bytes: float
    terms: int
    target: float | None = None
    sets: tuple[str, ...] = ("full",)
    curve: str = ""
    size: float = 0.0


@dataclass
class Row:
    """One measured case, as it is stored. ``interval``: 20th and 80th percentile of our times and
    those of the best rival, in microseconds. ``scale``: largest exact output. ``modelled``: not
    measured, but computed from another point of its curve. ``commit``: what it was measured at, if
    that is not the run's."""

    op: str
    name: str
    mode: str
    dtype: str
    layout: str
    shape: str
    provider: str
    microseconds: float
    spread: float
    rivals: dict[str, float]
    best_rival: str
    ratio: float
    target: float | None
    max_error: float
    error_limit: float
    eager_error: float
    gflops: float
    gbytes: float
    floor_fraction: float
    peak_mbytes: float
    best_rival_peak_mbytes: float
    first_call_ms: float
    failed: dict[str, str] = field(default_factory=dict)
    interval: tuple[float, float] = (math.nan, math.nan)
    rival_interval: tuple[float, float] = (math.nan, math.nan)
    rival_first_calls_ms: dict[str, float] = field(default_factory=dict)
    scale: float = math.nan
    curve: str = ""
    size: float = 0.0
    modelled: bool = False
    commit: str = ""

    @property
    def met(self) -> bool:
        return self.target is None or self.ratio >= self.target

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class WrongNumbers(RuntimeError):
    """A provider's outputs miss the tolerance."""


# Seconds of one call at torch's own rate for the dtype beyond which a row is left out: its rivals
# take a dozen such calls.
LONGEST_CALL = 50.0


class LeftOut(RuntimeError):
    """A case that takes too long on this machine to be measured, and why."""


class BeyondRoofline(RuntimeError):
    """A time shorter than the machine can do: the measurement is wrong."""


class _Poisoned:
    """Fills uninitialised memory with NaN, so that an output nobody wrote cannot pass."""

    def __enter__(self) -> None:
        self._before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: Any) -> None:
        torch.use_deterministic_algorithms(self._before)


def _gate(provider: Provider, eager: Outputs, exact: Outputs, case: Case) -> list[Parity]:
    with _Poisoned():
        outputs = provider.call()
    results = [
        parity(a, e, x, dtype=case.dtype, terms=case.terms)
        for a, e, x in zip(outputs, eager, exact, strict=True)
    ]
    worst = next((r for r in results if not r.ok), None)
    if worst is not None:
        raise WrongNumbers(f"{provider.name}: {worst}")
    return results


def half_on_cpu(dtype: torch.dtype, device: str) -> bool:
    """Whether rivals also run ``in_float32``: on a CPU without matrix instructions for half
    precision that is the quicker way, and what a user would do."""
    return device == "cpu" and dtype.itemsize == 2


def in_float32(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """``function`` with its floating tensors cast to float32 and its results to ``dtype``."""

    def widen(t: torch.Tensor) -> torch.Tensor:
        return t.float() if t.is_floating_point() else t

    def call(*tensors: torch.Tensor | None) -> Any:
        results = function(*tree_map_only(torch.Tensor, widen, tensors))
        return tree_map_only(torch.Tensor, lambda t: t.to(dtype), results)

    return call


def compiled(function: Callable[..., Any], kind: str = "") -> dict[str, Callable[..., Any]]:
    """torch.compile's rivals of ``function``, by name; ``kind`` says which function it is."""
    return {
        f"torch.compile{kind and ' '}{kind}": torch.compile(function),
        f"torch.compile {MAX_AUTOTUNE}{kind and ' '}{kind}": torch.compile(
            function, mode=f"{MAX_AUTOTUNE}-no-cudagraphs"
        ),
    }


# Seconds of a round of all providers beyond which two rounds have to do.
SLOW_ROUND = 20.0
# A rival so many times slower than the fastest provider is out of the race: one warm call of it is
# enough, and the first counts as warm if it takes so many seconds without a compiler.
OUT_OF_THE_RACE = 5.0
WARM_SECONDS = 1.0
# Rows that spread more are measured again: a neighbour on the machine was busy.
SPREAD = 0.15


def _rounds(
    providers: Sequence[Provider], clock: Clock, seconds: float, first: dict[str, float]
) -> dict[str, list[float]]:
    """Providers take turns until the time is used up, at least five rounds (two of slow ones);
    ``first`` holds the seconds of a warm call of each."""
    limit = OUT_OF_THE_RACE * min(first.values())
    racing = [p for p in providers if p.ours or first[p.name] <= limit]
    samples = {p.name: [] if p in racing else [first[p.name]] for p in providers}
    repeats = {name: max(1, min(64, int(1e-3 / max(t, 1e-7)))) for name, t in first.items()}
    stop = time.perf_counter() + seconds
    rounds = 0
    least = 5 if sum(first[p.name] for p in racing) < SLOW_ROUND else 2
    while rounds < least or (time.perf_counter() < stop and rounds < 200):
        for p in racing:
            samples[p.name].append(clock.sample(p.call, repeats[p.name]))
        rounds += 1
    return samples


def _calm_rounds(
    ours: Provider,
    providers: Sequence[Provider],
    clock: Clock,
    seconds: float,
    first: dict[str, float],
) -> dict[str, list[float]]:
    """The calmest of up to three runs; one is enough if our own times and those of the best rival
    spread less than SPREAD. Which run is kept does not depend on who wins it."""
    runs = []
    for _ in range(3):
        samples = _rounds(providers, clock, seconds, first)
        rivals = [p.name for p in providers if p is not ours]
        best = min(rivals, key=lambda name: statistics.median(samples[name]), default=ours.name)
        runs.append((max(spread(samples[name]) for name in (ours.name, best)), samples))
        if runs[-1][0] < SPREAD:
            break
    return min(runs, key=lambda run: run[0])[1]


@dataclass
class _Gated:
    """The providers of a case whose numbers are right, and what was learned on the way."""

    ours: Provider
    providers: list[Provider]
    check: Callable[[Provider], list[Parity]]
    errors: list[Parity]
    first_call: dict[str, float]
    failed: dict[str, str]


def _pass_gate(case: Case, device: str, thorough: bool) -> _Gated:
    """Calls every provider once and compares; raises WrongNumbers for our own."""
    providers, exact_of = case.make()
    providers = [p for p in providers if thorough or not p.thorough]
    ours = next(p for p in providers if p.ours)
    eager_provider = next(p for p in providers if p.name == "eager")
    exact = exact_of()
    first_call: dict[str, float] = {}

    def call_first(p: Provider) -> Outputs:
        synchronize(device)
        start = time.perf_counter()
        outputs = p.call()
        synchronize(device)
        first_call[p.name] = time.perf_counter() - start
        return outputs

    eager = [t.detach().clone() for t in call_first(eager_provider)]
    found = _Gated(ours, [], lambda p: _gate(p, eager, exact, case), [], first_call, {})
    for p in providers:
        try:
            if p is not eager_provider:
                call_first(p)
                errors = found.check(p)
                found.errors = errors if p is ours else found.errors
            found.providers.append(p)
        except Exception as error:
            if p.ours:
                raise
            found.failed[p.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found


def measure(
    case: Case,
    device: str,
    roofline: Roofline,
    seconds: float = 3.0,
    cache: str = "warm",
    thorough: bool = False,
) -> Row:
    """Measures one case; ``cache`` as Clock has it, ``thorough`` with the rivals that take long to
    compile.

    Raises:
        WrongNumbers: our own outputs miss the tolerance.
        BeyondRoofline: our own time is impossible.
    """
    clock = Clock(device, cache)
    gated = _pass_gate(case, device, thorough)
    ours, first_call = gated.ours, gated.first_call
    first = {}
    for p in gated.providers:
        warm = first_call[p.name] > WARM_SECONDS and "compile" not in p.name
        first[p.name] = first_call[p.name] if warm else clock.sample(p.call)
    samples = _calm_rounds(ours, gated.providers, clock, seconds, first)
    gated.check(ours)
    medians = {name: statistics.median(s) for name, s in samples.items()}
    mine = medians.pop(ours.name)
    floor = roofline.floor(case.flops, case.bytes, case.dtype)
    if mine < 0.8 * floor and case.bytes > 1e8:
        raise BeyondRoofline(
            f"{case.name}: {mine * 1e6:.1f} us is below the floor {floor * 1e6:.1f}"
        )
    best = min(medians, key=lambda name: medians[name])
    best_provider = next(p for p in gated.providers if p.name == best)
    worst = max(gated.errors, key=lambda e: e.max_error / (e.max_limit or 1))
    return Row(
        op=case.op,
        name=case.name,
        mode=case.mode,
        dtype=name_of(case.dtype),
        layout=case.layout,
        shape=case.shape,
        provider=ours.name,
        microseconds=mine * 1e6,
        spread=spread(samples[ours.name]),
        rivals={name: value * 1e6 for name, value in sorted(medians.items())},
        best_rival=best,
        ratio=medians[best] / mine,
        target=case.target,
        max_error=worst.max_error,
        error_limit=worst.max_limit,
        eager_error=worst.eager_max_error,
        gflops=case.flops / mine / 1e9,
        gbytes=case.bytes / mine / 1e9,
        floor_fraction=floor / mine,
        peak_mbytes=peak_bytes(ours.call, device) / 2**20,
        best_rival_peak_mbytes=peak_bytes(best_provider.call, device) / 2**20,
        first_call_ms=first_call.pop(ours.name) * 1e3,
        failed=gated.failed,
        interval=_microseconds(samples[ours.name]),
        rival_interval=_microseconds(samples[best]),
        rival_first_calls_ms={name: value * 1e3 for name, value in sorted(first_call.items())},
        scale=worst.scale,
        curve=case.curve,
        size=case.size,
    )


def _microseconds(samples: Sequence[float]) -> tuple[float, float]:
    low, high = interval(samples)
    return low * 1e6, high * 1e6


def modelled(case: Case, measured: Row) -> Row:
    """The point of a curve that takes too long to measure: time in proportion to the operations,
    memory to the size, from the largest measured point. It has no rivals and no error."""
    work = case.flops / (measured.gflops * 1e9)
    row = Row(**(measured.to_dict() | {"rivals": {}, "rival_first_calls_ms": {}, "failed": {}}))
    row.name, row.shape, row.size, row.modelled = case.name, case.shape, case.size, True
    row.microseconds = work * 1e6
    row.gbytes = case.bytes / work / 1e9
    row.peak_mbytes = measured.peak_mbytes * case.size / measured.size
    row.best_rival, row.target = "", None
    for unknown in ("ratio", "spread", "max_error", "error_limit", "eager_error", "scale",
                    "floor_fraction", "best_rival_peak_mbytes", "first_call_ms"):  # fmt: skip
        setattr(row, unknown, math.nan)
    row.interval = row.rival_interval = (math.nan, math.nan)
    return row


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values)) if values else math.nan
