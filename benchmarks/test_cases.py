"""The cases under pytest-benchmark: ``pytest benchmarks/ --benchmark-enable``.

Without that option each case of the smoke set runs once behind the parity gate.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from vitkit.benchmarks.harness import _gate
from vitkit.benchmarks.run import OPS
from vitkit.benchmarks.timing import Clock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = [importlib.import_module(f"vitkit.benchmarks.cases.{op}") for op in OPS]
CASES = [c for module in MODULES for c in module.cases(DEVICE) if "smoke" in c.sets]


def label(case):
    return f"{case.op}-{case.name}-{case.mode}-{str(case.dtype)[6:]}-{case.layout}".replace(
        " ", "_"
    )


@pytest.mark.parametrize("case", CASES, ids=label)
def test_case(case, benchmark):
    providers, exact_of = case.make()
    ours = next(p for p in providers if p.ours)
    eager = next(p for p in providers if p.name == "eager")
    errors = _gate(ours, eager.call(), exact_of(), case)
    benchmark.group = f"{case.op} {case.name} {case.mode}"
    benchmark.extra_info["max_error"] = max(e.max_error for e in errors)
    benchmark.extra_info["shape"] = case.shape
    benchmark.extra_info["device_microseconds"] = 1e6 * Clock(DEVICE).sample(ours.call)
    benchmark(lambda: (ours.call(), torch.cuda.synchronize() if DEVICE == "cuda" else None))
