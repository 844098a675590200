"""The CPU kernels without PyTorch: every instruction set this machine has, and stand-ins for those
it lacks.

Code for 16 lanes and for AMX tiles runs everywhere in two more builds: vectors of 16 lanes made of
narrower ones, and tiles in plain C++, under the address and undefined behaviour sanitizers. Where
there are tiles, bfloat16 is what differs without them.
"""

from __future__ import annotations

import pytest
from native_drivers import KERNELS, compile_driver, copied, has_isa, run

# Not avx2: what make test runs everything else on.
VARIANTS = ("base", "avx512", "amx", "amx-emulated-sanitized")
# Only these know tiles: the emulated builds of the others are the same.
TILED = (
    "attention_forward", "attention_backward", "dilated_attention", "patch_embed",
    "window_attention",
)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_case(tmp_path, kernel, variant):
    if "-" not in variant and not has_isa(variant):
        pytest.skip(f"this CPU has no {variant}")
    passes(run(compile_driver(tmp_path / "driver", kernel, variant)))


@pytest.mark.parametrize("kernel", TILED)
def test_bfloat16_without_tiles(tmp_path, kernel):
    csrc = copied(tmp_path, "bf16")
    passes(run(compile_driver(tmp_path / "driver", kernel, "avx512-emulated", csrc), "bf16/"))


def passes(done):
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert ", 0 failed" in done.stdout
