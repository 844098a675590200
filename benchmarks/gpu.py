"""``make gpu``: build for the visible GPU, run every device primitive and every op's tests on it,
sanitise, benchmark, store the results.

Needs no network and no virtual environment where torch, triton, ninja, pybind11, pytest,
pytest-benchmark and hypothesis are installed. Every stage has a time limit, a failing stage does
not stop the others, and the exit code says at the end whether one failed. The whole takes under ten
minutes.
``make gpu-full`` has no such limit: all op tests, the full set and the scaling curves with every
rival.

``python benchmarks/gpu.py --collect DIR`` (``make gpu COLLECT=DIR``) also copies to DIR what a
machine that is given back would take with it: results, pages, golden data, a log and a summary.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GOLDEN = ROOT / "tests" / "emulator" / "golden.json"
LOG = ROOT / "build" / "gpu" / "gpu.log"
NEEDED = ("torch", "ninja", "pybind11", "pytest", "pytest_benchmark", "hypothesis")


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


SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
HOUR = 3600


def stages(device: str, gpu_name: str, full: bool = False) -> list[Stage]:
    """What runs, in order. Build first: everything after needs it."""
    python = sys.executable
    slug = "".join(c if c.isalnum() else "-" for c in gpu_name.lower()).strip("-")
    tests = [python, "-m", "pytest", "-q", f"--device={device}"]
    if importlib.util.find_spec("xdist") is not None:  # Triton's compiler runs on the CPU
        tests += ["-n", str(min(8, max(1, (os.cpu_count() or 2) // 2)))]
    found = [
        Stage("build", [python, "csrc/build.py"], HOUR if full else 150),
        # Writes tests/emulator/golden.json, which the emulator must reproduce from then on.
        Stage("primitives", [python, "tests/conformance.py"], 30),
        Stage("tests", [*tests, *OP_TESTS], HOUR if full else 100),
    ]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if device == "cuda" and sanitizer:
        for tool in SANITIZERS:
            # torch asks CUDA questions that it expects to fail.
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
            command += ["--report-api-errors", "no"]
            # Only our kernels, except where torch's writes must be seen for ours to read them.
            if tool != "initcheck":
                command += ["--kernel-name", "kns=vitkit"]
            command += [python, "tests/sanitized_ops.py"]
            found.append(Stage(tool, command, HOUR if full else 40))
    bench = [python, "-m", "vitkit.benchmarks", f"--device={device}"]
    for which in ("full", "scaling") if full else ("fast",):
        name = RESULTS / (f"{slug}.json" if which == "fast" else f"{slug}-{which}.json")
        store = ["--json", str(name), "--report", str(name.with_suffix(".html"))]
        manner = (
            ["--rivals", "all", "--cache", "cold"]
            if full
            else ["--seconds", "0.3", "--budget", "100"]
        )
        command = [*bench, "--set", which, *manner, *store]
        found.append(Stage(f"benchmarks, {which} set", command, HOUR if full else 160))
    return found


OP_TESTS = [
    "tests/test_flash_attention.py",
    "tests/test_flash_attention_inputs.py",
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


def run(found: list[Stage], env: dict[str, str], log: Path = LOG) -> dict[str, str]:
    """Runs the stages, their output going to ``log`` and its end to the terminal; returns what
    became of each."""
    outcome: dict[str, str] = {}
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    for stage in found:
        header = f"== {stage.name}: {' '.join(stage.command)}"
        print(header, flush=True)
        start = time.monotonic()
        with log.open("a") as out:
            print(header, file=out, flush=True)
            begun = out.tell()
            code = _finish(stage, env, out)
        verdict = "ok" if code == 0 else f"failed (exit code {code})"
        if code is None:
            verdict = f"stopped after {stage.seconds} s"
        with log.open(errors="replace") as written:
            written.seek(begun)
            print("\n".join(written.read().splitlines()[-LAST_LINES:]), flush=True)
        outcome[stage.name] = f"{verdict}, {time.monotonic() - start:.0f} s"
        if stage.name == "build":
            env |= environment(env.get("TORCH_CUDA_ARCH_LIST"))
    return outcome


LAST_LINES = 30


def _finish(stage: Stage, env: dict[str, str], out: TextIO) -> int | None:
    """The exit code, None if time was up. Then all the command started is ended with it: compilers
    left behind would take the cores of the benchmarks."""
    try:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        print(error, file=out, flush=True)
        return 127
    try:
        return process.wait(timeout=stage.seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def missing() -> list[str]:
    """Packages without which stages cannot run."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def summary(gpu: tuple[str, str], outcome: dict[str, str]) -> dict[str, Any]:
    import torch

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version}
    return {"gpu": gpu[0], "arch": gpu[1], "versions": versions, "stages": outcome}


def collect(folder: Path, facts: dict[str, Any], since: float) -> list[str]:
    """Copies what this run wrote to one flat folder; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(facts, indent=1) + "\n")
    for path in (LOG, GOLDEN, *RESULTS.iterdir()):
        if path.is_file() and path.stat().st_mtime >= since:
            shutil.copyfile(path, folder / path.name)
    return sorted(p.name for p in folder.iterdir())


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="make gpu")
    parser.add_argument("--full", action="store_true", help="no ten-minute limit, every rival")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="copy all that was written")
    given = parser.parse_args(arguments)
    gpu = visible_gpu()
    if gpu is None:
        print("make gpu: no GPU is visible to torch; `make test` checks what can be without one")
        return 2
    if lacking := missing():
        print(f"make gpu: not installed: {', '.join(lacking)}; stages that need them will fail")
    RESULTS.mkdir(parents=True, exist_ok=True)
    since = time.time() - 1  # file systems round
    outcome = run(stages("cuda", gpu[0], given.full), environment(gpu[1]))
    print("\n".join(f"{name}: {verdict}" for name, verdict in outcome.items()))
    if given.collect:
        names = collect(given.collect, summary(gpu, outcome), since)
        print(f"{given.collect}: {', '.join(names)}")
    return 0 if all(verdict.startswith("ok") for verdict in outcome.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
