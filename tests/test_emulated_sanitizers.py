"""Structured biases, windows and segments of slots on the emulator, under sanitizers."""

from __future__ import annotations

import pytest
from emulated_attention import ONE_KERNEL
from emulation import SANITIZERS, sanitized


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_emulated_maps_under_sanitizers(sanitizer):
    code, output = sanitized("sanitized_maps", sanitizer, flags=ONE_KERNEL)
    assert code == 0 and "done" in output and "Sanitizer" not in output, output[-4000:]
