"""The native CPU library's own entry points."""

from __future__ import annotations

import ctypes

from vitkit import _library


def cpu_library() -> ctypes.CDLL:
    """``vitkit_force_cpu_isa(name)`` and ``vitkit_cpu_isa()``: which instruction set the kernels
    run with."""
    path = _library.native_path("_C_cpu")
    assert path is not None, "the tests need the native CPU library: python csrc/build.py"
    _library.native_error("_C_cpu")  # loads it with its dependencies
    return ctypes.CDLL(str(path))
