"""The emulated kernels under sanitizers, in programs with memory of exact size."""

from __future__ import annotations

import pytest
from emulation import PROGRAMS, SANITIZERS, sanitized


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_emulated_under_sanitizers(program, sanitizer):
    code, output = sanitized(program, sanitizer)
    assert code == 0 and "done" in output and "Sanitizer" not in output, output[-4000:]
