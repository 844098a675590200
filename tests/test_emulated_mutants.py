"""The faults of mutants.py that are tried every time: each must be caught."""

from __future__ import annotations

import pytest
from emulation import mutated, sanitized
from mutants import DRIVERS, SILENT, TABLE

ALWAYS = [(d, m) for d in DRIVERS for m in TABLE[d] if m.always]


@pytest.mark.parametrize(("driver", "mutant"), ALWAYS, ids=[f"{d}-{m.name}" for d, m in ALWAYS])
def test_emulated_mutants_are_caught(driver, mutant, tmp_path):
    csrc = mutated(tmp_path, mutant.old, mutant.new)
    with pytest.raises(AssertionError):
        DRIVERS[driver].catch(csrc)


@pytest.mark.parametrize(
    ("sanitizer", "finding", "mutant"), SILENT, ids=[m.name for *_, m in SILENT]
)
def test_emulated_silent_mutants_are_caught(sanitizer, finding, mutant, tmp_path):
    csrc = mutated(tmp_path, mutant.old, mutant.new)
    code, output = sanitized("sanitized_attention", sanitizer, csrc)
    assert code != 0 and finding in output, output[-2000:]
