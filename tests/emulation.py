"""Compiles CUDA kernels for the emulator in tests/emulator. Results are kept in build/emulated by a
hash of all they depend on, so that only changed kernels are compiled again."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
MACHINE = ("emulator", "warp_operations", "hopper")
FLAGS = ["-std=c++20", "-g", "-fPIC", "-w", "-Wno-attributes"]
# A GPU refuses an access that is not aligned to its size; this CPU mostly takes it.
ALIGNED = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment")


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
    machine = [str(_built(n, ["-O2", "-c"], [], [])) for n in MACHINE]
    kernels = [f for folder in ("core", "attention", "cuda") for f in (csrc / folder).glob("*.*h")]
    include = [f"-I{f}" for f in (csrc, csrc / "core", csrc / "cuda")]
    return _built(driver, ["-O1", *ALIGNED, *flags], kernels, [*include, *machine])


def _built(name: str, flags: list[str], sources: list[Path], rest: list[str]) -> Path:
    """What g++ makes of ``tests/emulator/<name>.cpp``, which depends on the emulator and
    ``sources``. ``rest`` holds paths, which do not count."""
    include = cuda_include()
    digest = hashlib.sha256(repr((FLAGS, flags, str(include))).encode())
    for source in sorted([*sources, *EMULATOR.glob("*.*")]):
        digest.update(source.name.encode() + source.read_bytes())
    target = ROOT / "build" / "emulated" / f"{name}-{digest.hexdigest()[:20]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = ["g++", *FLAGS, *flags, f"-I{EMULATOR}", f"-isystem{include}"]
        command += [str(EMULATOR / f"{name}.cpp"), *rest, "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.replace(target)
    return target


def mutated(folder: Path, old: str, new: str, header: str = "", nth: int = 0) -> Path:
    """A copy of csrc in which ``old``, which stands in one place, is ``new``. With ``header``, its
    ``nth`` occurrence there."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cpu", "runtime"))
    hits = 0
    for source in [csrc / header] if header else csrc.glob("*/*.*h"):
        parts = source.read_text().split(old)
        hits += 1 if header else len(parts) - 1
        if len(parts) > 1:
            before, after = old.join(parts[: nth + 1]), old.join(parts[nth + 1 :])
            source.write_text(before + new + after)
    assert hits == 1, "the mutation no longer fits the source"
    return csrc


def load_kernels(path: Path, *structs: type[ctypes.Structure], **results: type) -> ctypes.CDLL:
    """A driver's library. Its emulated_forward and emulated_backward return null or an error, other
    functions what ``results`` says; ``structs`` are as large as its emulated_size(i) says."""
    library = ctypes.CDLL(str(path))
    launches = dict.fromkeys(("emulated_forward", "emulated_backward"), ctypes.c_char_p)
    for name, result in {**launches, "emulated_size": ctypes.c_size_t, **results}.items():
        getattr(library, name).restype = result
    for i, struct in enumerate(structs):
        assert library.emulated_size(i) == ctypes.sizeof(struct), struct.__name__
    return library


# Of undefined behaviour what the address sanitizer does not see. Addresses are checked by calls:
# inlined, it would take twice as long to compile. The first finding ends the program.
SANITIZERS = {
    "address": (
        "-fsanitize=address,bounds,shift,integer-divide-by-zero,signed-integer-overflow",
        "-fno-sanitize-recover=all",
        "--param=asan-instrumentation-with-call-threshold=0",
    ),
    "thread": ("-fsanitize=thread", "-fno-builtin"),
}

ONE_DTYPE = ("-DEMULATED_BF16_ONLY",)


def one_kernel(head_dim: int) -> tuple[str, ...]:
    """Flags that leave only one instantiation of the attention kernels."""
    return (*ONE_DTYPE, f"-DEMULATED_HEAD_DIMS={head_dim}")


# Programs in tests/emulator over memory of exact size, for the sanitizers: their flags.
PROGRAMS = {
    "sanitized_attention": one_kernel(32),
    "sanitized_hopper": one_kernel(64),
    "sanitized_maps": one_kernel(32),  # windows, segments of slots, structured biases
    "sanitized_rows": ONE_DTYPE,  # patch_embed, layer_norm_modulate
    "sanitized_tiles": ONE_DTYPE,  # gated_residual, swiglu, rope_2d
}


def sanitized(program: str, sanitizer: str, csrc: Path = ROOT / "csrc") -> tuple[int, str]:
    """Exit code and output of one of PROGRAMS under a sanitizer."""
    path = emulated(program, csrc=csrc, flags=(*SANITIZERS[sanitizer], *PROGRAMS[program]))
    done = subprocess.run([path], capture_output=True, text=True, timeout=170)
    return done.returncode, done.stdout + done.stderr


def finding(program: str, csrc: Path) -> str | None:
    """What the first sanitizer that finds something says, None if none does."""
    for sanitizer in SANITIZERS:
        code, output = sanitized(program, sanitizer, csrc)
        if code != 0 or "Sanitizer" in output:
            lines = (x for x in output.splitlines() if "Sanitizer" in x or ".cuh" in x)
            return f"{sanitizer}: {next(lines, 'failed')}"
    return None


def assert_order_changes_nothing(
    run: Callable[[int], Iterable[torch.Tensor]], seeds: Iterable[int] = range(2, 6)
) -> None:
    """``run(seed)`` runs kernels with threads in an order drawn from the seed: to the bit the same
    tensors for all seeds."""
    first = list(run(1))
    for seed in seeds:
        assert all(torch.equal(a, b) for a, b in zip(first, run(seed), strict=True)), seed
