"""``make gpu``: build for the visible GPU, run every device primitive and every op's tests on it,
sanitise, benchmark, store the results.

Needs no network and no virtual environment where torch, triton, ninja, pybind11, pytest and
pytest-benchmark are installed. Every stage has a time limit, a failing stage does not stop the
others, and the exit code says at the end whether one failed. The whole takes under ten minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Stage:
    """One command with its time limit in seconds."""

    name: str
    command: list[str]
    seconds: int


def visible_gpu() -> tuple[str, str] | None:
    """(name, architecture as TORCH_CUDA_ARCH_LIST wants it) of the first GPU, None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    # From Hopper on, the fast instructions belong to the exact architecture.
    return torch.cuda.get_device_name(), f"{major}.{minor}{'a' if major >= 9 else ''}"


def stages(device: str, gpu_name: str) -> list[Stage]:
    """What runs, in order. Build first: everything after needs it."""
    python = sys.executable
    slug = "".join(c if c.isalnum() else "-" for c in gpu_name.lower()).strip("-")
    result = RESULTS / f"{slug}.json"
    found = [
        Stage("build", [python, "csrc/build.py"], 180),
        # Writes tests/emulator/golden.json, which the emulator must reproduce from then on.
        Stage("primitives", [python, "tests/conformance.py"], 60),
        Stage("tests", [python, "-m", "pytest", "-q", "-x", f"--device={device}", *OP_TESTS], 240),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if device == "cuda" and sanitizer:
        subset = "head_dim_64 or unet_corner or packed"
        command = [python, "-m", "pytest", "-q", "-x", "--device=cuda", "-k", subset, *OP_TESTS[:2]]
        found.append(Stage("memcheck", [sanitizer, "--error-exitcode", "9", *command], 120))
    bench = [python, "-m", "vitkit.benchmarks", f"--device={device}", "--set", "fast"]
    page = RESULTS / f"{slug}.html"
    limit = ["--seconds", "1", "--json", str(result), "--report", str(page)]
    found.append(Stage("benchmarks", [*bench, *limit], 240))
    return found


OP_TESTS = [
    "tests/test_flash_attention.py",
    "tests/test_group_norm_silu.py",
    "tests/test_window_attention.py",
    "tests/test_dilated_attention.py",
    "tests/test_layer_norm_modulate.py",
    "tests/test_gated_residual.py",
    "tests/test_patch_embed.py",
    "tests/test_score_bias.py",
    "tests/test_swiglu.py",
    "tests/test_geglu.py",
    "tests/test_gelu.py",
    "tests/test_rope_2d.py",
    "tests/test_library.py",
]


def environment(arch: str | None) -> dict[str, str]:
    """The checkout importable as ``vitkit`` without installing it: a link per mapped package."""
    env = dict(os.environ)
    if arch:
        env["TORCH_CUDA_ARCH_LIST"] = arch
    links = ROOT / "build" / "importable"
    (links / "vitkit").mkdir(parents=True, exist_ok=True)
    for entry in (ROOT / "vitkit").iterdir():
        _link(links / "vitkit" / entry.name, entry)
    _link(links / "vitkit" / "kernels", ROOT / "kernels" / "triton")
    _link(links / "vitkit" / "benchmarks", ROOT / "benchmarks")
    env["PYTHONPATH"] = os.pathsep.join([str(links), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return env


def _link(link: Path, target: Path) -> None:
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target)


def run(found: list[Stage], env: dict[str, str]) -> dict[str, str]:
    """Runs the stages; returns what became of each."""
    outcome: dict[str, str] = {}
    for stage in found:
        print(f"== {stage.name}: {' '.join(stage.command)}", flush=True)
        start = time.monotonic()
        try:
            code = subprocess.run(
                stage.command, cwd=ROOT, env=env, timeout=stage.seconds
            ).returncode
            verdict = "ok" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            verdict = f"stopped after {stage.seconds} s"
        outcome[stage.name] = f"{verdict}, {time.monotonic() - start:.0f} s"
        if stage.name == "build":
            env |= environment(env.get("TORCH_CUDA_ARCH_LIST"))
    return outcome


def main() -> int:
    gpu = visible_gpu()
    if gpu is None:
        print("make gpu: no GPU is visible to torch; `make test` checks what can be without one")
        return 2
    RESULTS.mkdir(parents=True, exist_ok=True)
    outcome = run(stages("cuda", gpu[0]), environment(gpu[1]))
    print("\n".join(f"{name}: {verdict}" for name, verdict in outcome.items()))
    return 0 if all(verdict.startswith("ok") for verdict in outcome.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
