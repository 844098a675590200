"""The cases under pytest-benchmark: ``pytest benchmarks/ --benchmark-enable``.

Without that option each case of the smoke set runs once behind the parity gate.
"""

from __future__ import annotations

import pytest
import torch

from vitkit.benchmarks.cases import (
    dilated_attention,
    flash_attention,
    gated_residual,
    geglu,
    gelu,
    group_norm_silu,
    layer_norm_modulate,
    patch_embed,
    rope_2d,
    swiglu,
    window_attention,
)
from vitkit.benchmarks.harness import _gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = (
    group_norm_silu,
    flash_attention,
    window_attention,
    dilated_attention,
    patch_embed,
    layer_norm_modulate,
    gated_residual,
    swiglu,
    geglu,
    gelu,
    rope_2d,
)
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
    benchmark(lambda: (ours.call(), torch.cuda.synchronize() if DEVICE == "cuda" else None))
