"""Clocks: what a call takes, on a warm or a cold cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

CACHES = ("warm", "cold")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Seconds per call of a function: device time by events on a GPU, wall time on a CPU.

    On a ``warm`` cache the same tensors are used call after call. On a ``cold`` one a buffer twice
    the size of the last-level cache is written before each call, outside the time.
    """

    def __init__(self, device: str, cache: str = "warm") -> None:
        if cache not in CACHES:
            raise ValueError(f"bench: cache must be one of {', '.join(CACHES)}, got {cache!r}")
        self.device = device
        self.cache = cache
        self._sweep: torch.Tensor | None = None
        if cache == "cold":
            size = 2 * last_level_cache(device)
            self._sweep = torch.empty(size, dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], Any], repeats: int = 1) -> float:
        """Mean over ``repeats`` calls."""
        if self.device == "cuda":
            return self._device_seconds(call, repeats)
        if self._sweep is None:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        total = 0.0
        for _ in range(repeats):
            self._sweep.add_(1)
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return total / repeats

    def _device_seconds(self, call: Callable[[], Any], repeats: int) -> float:
        torch.cuda.synchronize()
        spans = []
        for _ in range(1 if self._sweep is None else repeats):
            if self._sweep is not None:
                self._sweep.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats if self._sweep is None else 1):
                call()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize()
        return sum(a.elapsed_time(b) for a, b in spans) / repeats / 1e3


def last_level_cache(device: str) -> int:
    """Bytes; 64 MiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sizes = [64 << 10]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes) if len(sizes) > 1 else 64 << 20


def spread(samples: Sequence[float]) -> float:
    """Interquartile range over median."""
    if len(samples) < 2:
        return 0.0
    quartiles = statistics.quantiles(samples, n=4)
    return (quartiles[2] - quartiles[0]) / statistics.median(samples)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    if len(samples) < 2:
        return samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], fifths[3]
