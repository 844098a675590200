"""Compiles the CPU kernels without PyTorch.

``tests/native`` holds one driver per kernel file; it is compiled together with the kernel under the
flags of an instruction set, and checks every case against float64.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_library import cpu_library

ROOT = Path(__file__).resolve().parent.parent
# Driver -> the sources it is compiled with.
KERNELS = {
    "attention_forward": ("flash_attention_kernel.cpp",),
    "attention_backward": ("flash_attention_bwd_kernel.cpp",),
    "dilated_attention": ("dilated_attention_kernel.cpp", "dilated_attention_bwd_kernel.cpp"),
    "gated_activation": ("gated_activation_kernel.cpp",),
    "group_norm_silu": ("group_norm_silu_kernel.cpp", "scratch.cpp"),
    "rope_2d": ("rope_2d_kernel.cpp",),
    "layer_norm_modulate": ("layer_norm_modulate_kernel.cpp", "scratch.cpp"),
    "gated_residual": ("gated_residual_kernel.cpp", "scratch.cpp"),
    "patch_embed": ("patch_embed_kernel.cpp", "patch_embed_bwd_kernel.cpp"),
    "window_attention": ("window_attention_kernel.cpp", "window_attention_bwd_kernel.cpp"),
}
# Addresses are checked by calls and not inlined, and of undefined behaviour only what the address
# sanitizer does not see: everything inlined takes three times as long to compile.
SANITIZE = [
    "-fsanitize=address,bounds,shift,integer-divide-by-zero,signed-integer-overflow",
    "-fno-sanitize-recover=all",
    "--param=asan-instrumentation-with-call-threshold=0",
]
LANES = ["-DVITKIT_SIMD_LANES=16", "-Wno-maybe-uninitialized"]
TILES = [*LANES, "-DVITKIT_EMULATE_AMX"]


@functools.cache
def _build():
    spec = importlib.util.spec_from_file_location("vitkit_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _variants() -> dict[str, tuple[str, list[str]]]:
    """(instruction set whose code it is, flags)."""
    flags = _build().ISA_FLAGS
    wide = flags["avx2"] if has_isa("avx2") else []
    native = {isa: (isa, flags[isa]) for isa in flags}
    return native | {
        "avx512-emulated": ("avx512", [*wide, *LANES]),
        "amx-emulated": ("amx", [*wide, *TILES]),
        "amx-emulated-sanitized": ("amx", [*wide, *TILES, *SANITIZE]),
    }


@functools.cache
def has_isa(isa: str) -> bool:
    library = cpu_library()
    can = library.vitkit_force_cpu_isa(isa.encode()) == 0
    library.vitkit_force_cpu_isa(b"auto")
    return can


def compile_driver(
    target: Path, kernel: str, variant: str, csrc: Path = ROOT / "csrc", optimize: str = "-O1"
) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    build = _build()
    isa, flags = _variants()[variant]
    command = [compiler, *build.CXX_FLAGS, *build.KERNEL_FLAGS, *flags, optimize]
    command.remove("-fno-exceptions")  # of the driver's containers
    command += [f"-DVITKIT_ISA={isa}", f"-I{csrc / 'core'}", f"-I{csrc / 'cpu'}"]
    command += [str(ROOT / "tests" / "native" / f"{kernel}_driver.cpp")]
    command += [*(str(csrc / "cpu" / name) for name in KERNELS[kernel]), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([driver, *arguments], capture_output=True, text=True, timeout=300)
