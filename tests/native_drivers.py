"""Compiles the CPU kernels without PyTorch.

``tests/native`` holds one driver per kernel file; it is linked with the kernel under the flags of
an instruction set, and checks every case against float64. Objects are kept in build/native_drivers
by a hash of all they depend on: builds and broken kernels share what is the same in them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
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
    "conv3x3": ("conv3x3_kernel.cpp",),
    "dilated_attention": ("dilated_attention_kernel.cpp", "dilated_attention_bwd_kernel.cpp"),
    "gated_activation": ("gated_activation_kernel.cpp",),
    "group_norm_silu": ("group_norm_silu_kernel.cpp", "scratch.cpp"),
    "linear": ("linear_kernel.cpp",),
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
TILES = ["-DVITKIT_EMULATE_AMX"]


@functools.cache
def _build():
    spec = importlib.util.spec_from_file_location("vitkit_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _variants() -> dict[str, tuple[str, list[str], list[str]]]:
    """(namespace of the kernels, flags, flags of the kernels alone). Emulated builds share a
    namespace, and with it their drivers."""
    flags = _build().ISA_FLAGS
    wide = ("amx", [*(flags["avx2"] if has_isa("avx2") else []), *LANES])
    native = {isa: (isa, flags[isa], []) for isa in flags}
    return native | {
        "avx512-emulated": (*wide, []),
        "amx-emulated": (*wide, TILES),
        "amx-emulated-sanitized": (*wide, [*TILES, *SANITIZE]),
    }


@functools.cache
def has_isa(isa: str) -> bool:
    library = cpu_library()
    can = library.vitkit_force_cpu_isa(isa.encode()) == 0
    library.vitkit_force_cpu_isa(b"auto")
    return can


def copied(folder: Path, dtype: str) -> Path:
    """A copy of csrc whose CPU kernels know one dtype ("f32", "bf16", "f16"), as far as a switch
    calls what is compiled for each: a third of the time."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cuda", "runtime"))
    # What is left out of norm/rows.h: weights and biases may have another dtype.
    call = r"\s*return (?:f|given|dispatch<\w+>|with_\w+)\((?!static_cast<const )[^;]*;"
    either = rf"\s*#if defined\(VITKIT_AMX\){call}\s*#else{call}\s*#endif"
    others = re.compile(rf"(case \w+::(?!{dtype}:)(?:f32|bf16|f16):)(?:{either}|{call})")
    for source in [csrc / "cpu/norm/rows.h", *(csrc / "cpu").glob("*_kernel.cpp")]:
        source.write_text(others.sub(r"\1 __builtin_trap();", source.read_text()))
    return csrc


def compile_driver(
    target: Path, kernel: str, variant: str, csrc: Path = ROOT / "csrc", optimize: str = "-O1"
) -> Path:
    """Only kernels, those in ``csrc``, are compiled with ``optimize`` and sanitizers: the driver's
    arithmetic in float64 would take most of the time."""
    build = _build()
    isa, flags, of_kernels = _variants()[variant]
    flags = [*build.CXX_FLAGS, *build.KERNEL_FLAGS, f"-DVITKIT_ISA={isa}", *flags]
    of_driver = [f for f in flags if f != "-fno-exceptions"]  # of its containers
    driver = ROOT / "tests" / "native" / f"{kernel}_driver.cpp"
    objects = [_object(driver, [*of_driver, "-O1"], ROOT / "csrc")]
    for name in KERNELS[kernel]:
        shipped = _shipped(name, variant) if csrc == ROOT / "csrc" else None
        of_kernel = [*flags, optimize, *of_kernels]
        objects.append(shipped or _object(csrc / "cpu" / name, of_kernel, csrc))
    sanitize = [f for f in of_kernels if f.startswith("-fsanitize")]
    _compile(*sanitize, *map(str, objects), "-o", str(target))
    return target


def _shipped(name: str, isa: str) -> Path | None:
    """The object in the library itself, where it was built here and nothing changed since."""
    folder, target = ROOT / "build" / "native", f"cpu/{Path(name).stem}.{isa}.o"
    if not (folder / target).exists():
        return None
    command = [*_build()._ninja(), "-C", str(folder), "-n", target]
    done = subprocess.run(command, capture_output=True, text=True)
    return folder / target if "no work to do" in done.stdout else None


def _object(source: Path, flags: list[str], csrc: Path) -> Path:
    """``source`` compiled with headers of ``csrc``."""
    command = [*flags, f"-I{csrc / 'core'}", f"-I{csrc / 'cpu'}", str(source)]
    rule = _compile(*command, "-MM").replace("\\\n", " ")
    digest = hashlib.sha256(repr(flags).encode())
    for file in map(Path, rule.split(":", 1)[1].split()):
        digest.update(file.name.encode() + file.read_bytes())
    target = ROOT / "build" / "native_drivers" / f"{source.stem}-{digest.hexdigest()[:20]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        _compile(*command, "-c", "-o", str(partial))
        partial.replace(target)
    return target


def _compile(*arguments: str) -> str:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([driver, *arguments], capture_output=True, text=True, timeout=300)
