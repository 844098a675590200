"""The CPU kernels without PyTorch: every instruction set this machine has, and stand-ins for those
it lacks.

Code for 16 lanes and for AMX tiles runs everywhere in two more builds: vectors of 16 lanes made of
narrower ones, and tiles in plain C++, under the address and undefined behaviour sanitizers.
"""

from __future__ import annotations

import pytest
from native_drivers import KERNELS, compile_driver, has_isa, run

# Not avx2: what make test runs everything else on.
VARIANTS = ("base", "avx512", "amx", "avx512-emulated", "amx-emulated-sanitized")
# Only these know tiles: the emulated builds of the others are the same.
TILED = (
    "attention_forward", "attention_backward", "dilated_attention", "patch_embed",
    "window_attention",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "variant"),
    [(k, v) for v in VARIANTS for k in KERNELS if v != "avx512-emulated" or k in TILED],
)
def test_every_case(tmp_path, kernel, variant):
    if "-" not in variant and not has_isa(variant):
        pytest.skip(f"this CPU has no {variant}")
    done = run(compile_driver(tmp_path / "driver", kernel, variant))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert ", 0 failed" in done.stdout
