"""How a row is measured: parity first, providers taking turns, medians, parity again.

Every provider of a case gets the same tensors. A provider whose numbers miss the tolerance is not
timed, before or after; a result beyond the measured roofline is refused; a slow-down is a row like
any other.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from vitkit._numerics import Parity, parity

Outputs = Sequence[torch.Tensor]


@dataclass
class Provider:
    """One way to compute a case. ``call`` returns the outputs (and gradients) to compare."""

    name: str
    call: Callable[[], Outputs]
    ours: bool = False


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


@dataclass
class Row:
    """One measured case, as it is stored."""

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

    @property
    def met(self) -> bool:
        return self.target is None or self.ratio >= self.target

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class WrongNumbers(RuntimeError):
    """A provider's outputs miss the tolerance."""


class BeyondRoofline(RuntimeError):
    """A time shorter than the machine can do: the measurement is wrong."""


@dataclass(frozen=True)
class Roofline:
    """What this machine does at best, measured in the same run."""

    gemm_gflops: dict[str, float]
    copy_gbytes: float

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of the fastest unit the dtype may use: bfloat16 may be computed in float32."""
        name = str(dtype).removeprefix("torch.")
        return 1e9 * max(self.gemm_gflops.get(name, 0.0), self.gemm_gflops["float32"])

    def floor(self, case: Case) -> float:
        """Seconds below which the case cannot go."""
        return max(case.flops / self.peak(case.dtype), case.bytes / (self.copy_gbytes * 1e9))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_roofline(device: str, dtypes: Sequence[torch.dtype]) -> Roofline:
    """GEMM peak per dtype and copy bandwidth."""
    gflops = {}
    for dtype in {torch.float32, *dtypes}:
        n = 8192 if device == "cuda" else 1024
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        samples = [_sample(lambda a=a, b=b: a @ b, device, 1)]
        while len(samples) < 5 and sum(samples) < 1:  # without a unit of its own a dtype takes long
            samples.append(_sample(lambda a=a, b=b: a @ b, device, 1))
        seconds = min(samples)
        gflops[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds / 1e9
    source = torch.randn((1 << 28) if device == "cuda" else (1 << 24), device=device)
    target = torch.empty_like(source)
    seconds = min(_sample(lambda: target.copy_(source), device, 1) for _ in range(5))
    return Roofline(gflops, 2 * source.nbytes / seconds / 1e9)


def _sample(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds per call over ``repeats`` calls."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


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


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ log lines would tear the table apart."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_bytes(call: Callable[[], Any], device: str) -> float:
    """Most memory allocated at once by one call, beyond what was there."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        result = call()
        del result
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return float(peak)


def half_on_cpu(dtype: torch.dtype, device: str) -> bool:
    """Whether rivals also run ``in_float32``: on a CPU without matrix instructions for half
    precision that is the quicker way, and what a user would do."""
    return device == "cpu" and dtype.itemsize == 2


def in_float32(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """``function`` with its tensors cast to float32 and its results to ``dtype``."""

    def call(*tensors: torch.Tensor | None) -> Any:
        results = function(*tree_map_only(torch.Tensor, torch.Tensor.float, tensors))
        return tree_map_only(torch.Tensor, lambda t: t.to(dtype), results)

    return call


# Seconds of a round of all providers beyond which two rounds have to do.
SLOW_ROUND = 20.0
# A rival so many times slower than the fastest provider is out of the race: one warm call of it is
# enough, and the first counts as warm if it takes so many seconds without a compiler.
OUT_OF_THE_RACE = 5.0
WARM_SECONDS = 1.0
# Rows that spread more are measured again: a neighbour on the machine was busy.
SPREAD = 0.15


def _rounds(
    providers: Sequence[Provider], device: str, seconds: float, first: dict[str, float]
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
            samples[p.name].append(_sample(p.call, device, repeats[p.name]))
        rounds += 1
    return samples


def _spread(samples: Sequence[float]) -> float:
    """Interquartile range over median."""
    quartiles = statistics.quantiles(samples, n=4)
    return (quartiles[2] - quartiles[0]) / statistics.median(samples)


def _calm_rounds(
    ours: Provider,
    providers: Sequence[Provider],
    device: str,
    seconds: float,
    first: dict[str, float],
) -> dict[str, list[float]]:
    """The calmest of up to three runs; one is enough if our own times and those of the best rival
    spread less than SPREAD. Which run is kept does not depend on who wins it."""
    runs = []
    for _ in range(3):
        samples = _rounds(providers, device, seconds, first)
        rivals = [p.name for p in providers if p is not ours]
        best = min(rivals, key=lambda name: statistics.median(samples[name]), default=ours.name)
        in_race = [name for name in (ours.name, best) if len(samples[name]) > 1]
        runs.append((max(_spread(samples[name]) for name in in_race), samples))
        if runs[-1][0] < SPREAD:
            break
    return min(runs, key=lambda run: run[0])[1]


def measure(case: Case, device: str, roofline: Roofline, seconds: float = 3.0) -> Row:
    """Measures one case.

    Raises:
        WrongNumbers: our own outputs miss the tolerance.
        BeyondRoofline: our own time is impossible.
    """
    providers, exact_of = case.make()
    exact = exact_of()
    ours = next(p for p in providers if p.ours)
    eager_provider = next(p for p in providers if p.name == "eager")
    first_call: dict[str, float] = {}

    def call_first(p: Provider) -> Outputs:
        synchronize(device)
        start = time.perf_counter()
        outputs = p.call()
        synchronize(device)
        first_call[p.name] = time.perf_counter() - start
        return outputs

    eager = [t.detach().clone() for t in call_first(eager_provider)]
    failed: dict[str, str] = {}
    running = []
    for p in providers:
        try:
            if p is not eager_provider:
                call_first(p)
            if p is ours:
                errors = _gate(p, eager, exact, case)
            elif p is not eager_provider:
                _gate(p, eager, exact, case)
            running.append(p)
        except Exception as error:
            if p.ours:
                raise
            failed[p.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    first = {}
    for p in running:
        warm = first_call[p.name] > WARM_SECONDS and "compile" not in p.name
        first[p.name] = first_call[p.name] if warm else _sample(p.call, device, 1)
    samples = _calm_rounds(ours, running, device, seconds, first)
    _gate(ours, eager, exact, case)
    medians = {name: statistics.median(s) for name, s in samples.items()}
    mine = medians.pop(ours.name)
    floor = roofline.floor(case)
    if mine < 0.8 * floor and case.bytes > 1e8:
        raise BeyondRoofline(
            f"{case.name}: {mine * 1e6:.1f} us is below the floor {floor * 1e6:.1f}"
        )
    best = min(medians, key=lambda name: medians[name])
    best_provider = next(p for p in running if p.name == best)
    worst = max(errors, key=lambda e: e.max_error / (e.max_limit or 1))
    return Row(
        op=case.op,
        name=case.name,
        mode=case.mode,
        dtype=str(case.dtype).removeprefix("torch."),
        layout=case.layout,
        shape=case.shape,
        provider=ours.name,
        microseconds=mine * 1e6,
        spread=_spread(samples[ours.name]),
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
        first_call_ms=first_call[ours.name] * 1e3,
        failed=failed,
    )


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values)) if values else math.nan
