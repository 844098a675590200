"""Structured biases, windows and segments of slots on the emulator, under sanitizers: what these
find need not change a number."""

from __future__ import annotations

import pytest
from emulated_attention import SANITIZERS, run_sanitized
from emulation import mutated


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_emulated_maps_under_sanitizers(sanitizer):
    code, output = run_sanitized("sanitized_maps", sanitizer)
    assert code == 0 and "done" in output and "Sanitizer" not in output, output[-4000:]


# Sanitizer, what it says, text in the kernels, replacement.
MUTANTS = {
    "columns_of_the_grid_added_at_once": (
        "thread", "data race", "if (r == round && key < keys)", "if (r == 0 && key < keys)"
    ),
    "slots_read_behind_the_last_token": (
        "address", "heap-buffer-overflow", "const { return min(s.n_q, s.n_k); }",
        "const { return s.slots; }",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_emulated_silent_mutants_are_caught(mutant, tmp_path):
    sanitizer, finding, old, new = MUTANTS[mutant]
    code, output = run_sanitized("sanitized_maps", sanitizer, csrc=mutated(tmp_path, old, new))
    assert code != 0 and finding in output, output[-2000:]
