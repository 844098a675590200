"""Compiles CUDA kernels for the emulator in tests/emulator. Results are kept in build/emulated by a
hash of all they depend on, so that only changed kernels are compiled again."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
FLAGS = ["-std=c++20", "-g", "-fPIC", "-w", "-Wno-attributes"]


def cuda_include() -> Path:
    """The folder of the CUDA headers; skips the test where there is none."""
    nvcc = shutil.which("nvcc")
    candidates = [Path("/usr/local/cuda/include")]
    if nvcc:
        candidates.insert(0, Path(nvcc).resolve().parent.parent / "include")
    found = next((c for c in candidates if (c / "cuda_bf16.h").exists()), None)
    if found is None:
        pytest.skip("the CUDA headers are not installed")
    return found


def emulated(driver: str, *, csrc: Path = ROOT / "csrc", flags: tuple[str, ...] = ()) -> Path:
    """The emulated library of ``tests/emulator/<driver>.cpp`` over the kernels in ``csrc``; an
    executable where ``flags`` lack -shared. Only the kernels are compiled with sanitizers."""
    include = cuda_include()
    folders = (EMULATOR, csrc, csrc / "core", csrc / "cuda")
    command = ["g++", *FLAGS, *(f"-I{f}" for f in folders), f"-isystem{include}"]
    digest = hashlib.sha256(repr((driver, FLAGS, flags, str(include))).encode())
    sources = [f for folder in ("core", "attention", "cuda") for f in (csrc / folder).glob("*.*h")]
    for source in sorted([*sources, *EMULATOR.glob("*.*")]):
        digest.update(source.name.encode() + source.read_bytes())
    target = ROOT / "build" / "emulated" / f"{driver}-{digest.hexdigest()[:20]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = []
        for name, options in (("emulator", ["-O2"]), (driver, ["-O1", *flags])):
            objects.append(target.with_suffix(f".{os.getpid()}.{name}.o"))
            source = str(EMULATOR / f"{name}.cpp")
            options = [o for o in options if o != "-shared"]
            subprocess.run([*command, *options, "-c", source, "-o", str(objects[-1])], check=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        subprocess.run(["g++", *flags, *map(str, objects), "-o", str(partial)], check=True)
        partial.replace(target)
        for o in objects:
            o.unlink()
    return target


def mutated(folder: Path, old: str, new: str) -> Path:
    """A copy of csrc in which ``old``, which stands in one place, is ``new``."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cpu", "runtime"))
    hits = 0
    for source in csrc.glob("*/*.*h"):
        text = source.read_text()
        hits += text.count(old)
        source.write_text(text.replace(old, new))
    assert hits == 1, "the mutation no longer fits the source"
    return csrc
