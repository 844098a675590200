"""What the machine does at best, measured in the same run: every row is a share of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vitkit._checks import name_of

from .timing import Clock


@dataclass(frozen=True)
class Roofline:
    """Fastest product per dtype, in GFLOP/s, and copy bandwidth (read + write), in GB/s."""

    gemm_gflops: dict[str, float]
    copy_gbytes: float

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of the fastest unit the dtype may use: bfloat16 may be computed in float32."""
        name = name_of(dtype)
        return 1e9 * max(self.gemm_gflops.get(name, 0.0), self.gemm_gflops["float32"])

    def floor(self, flops: float, bytes: float, dtype: torch.dtype) -> float:
        """Seconds below which no call can go that does these operations and moves these bytes."""
        return max(flops / self.peak(dtype), bytes / (self.copy_gbytes * 1e9))


def measure_roofline(device: str, dtypes: Sequence[torch.dtype]) -> Roofline:
    """GEMM peak per dtype and copy bandwidth."""
    clock = Clock(device)
    gflops = {}
    for dtype in {torch.float32, *dtypes}:
        n = 8192 if device == "cuda" else 1024
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        samples = [clock.sample(lambda a=a, b=b: a @ b)]
        while len(samples) < 5 and sum(samples) < 1:  # without a unit of its own a dtype takes long
            samples.append(clock.sample(lambda a=a, b=b: a @ b))
        gflops[name_of(dtype)] = 2 * n**3 / min(samples) / 1e9
    source = torch.randn((1 << 28) if device == "cuda" else (1 << 24), device=device)
    target = torch.empty_like(source)
    seconds = min(clock.sample(lambda: target.copy_(source)) for _ in range(5))
    return Roofline(gflops, 2 * source.nbytes / seconds / 1e9)
