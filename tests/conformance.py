"""The primitives of csrc/core, on hardware and on the emulator.

    python tests/conformance.py        (a stage of make gpu)

builds tests/emulator/conformance.cu for the GPU that is there, runs it, and writes what came out to
tests/emulator/golden.json, which the emulator must reproduce in ``make test`` from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "emulator"
GOLDEN = EMULATOR / "golden.json"


def built(arch: str) -> Path:
    """The program for one architecture ("90a"). FileNotFoundError without nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not installed")
    sources = [*EMULATOR.glob("conformance*.cu*"), *(ROOT / "csrc" / "core").glob("*.*h")]
    digest = hashlib.sha256(arch.encode())
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    target = ROOT / "build" / "conformance" / f"{arch}-{digest.hexdigest()[:20]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [nvcc, "-std=c++20", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += [f"-I{ROOT / 'csrc' / 'core'}", str(EMULATOR / "conformance.cu")]
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.replace(target)
    return target


def output(program: Path, *arguments: str) -> dict[str, Any]:
    return json.loads(subprocess.check_output([str(program), *arguments], text=True))


def differences(golden: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Where two outputs disagree, a line for each primitive that does."""
    lines = []
    for name in golden["primitives"].keys() | found["primitives"].keys():
        want, got = (x["primitives"].get(name) for x in (golden, found))
        if want is None and name.startswith("hopper_"):
            continue  # the GPU was of another kind
        if want is None or got is None:
            lines.append(f"{name}: only one of both has it")
            continue
        a, b = (bytes.fromhex(x["words"]) for x in (want, got))
        words = [struct.unpack(f">{len(x) // 4}I", x) for x in (a, b)]
        tolerance = want["tolerance"]
        wrong = [i for i, (w, g) in enumerate(zip(*words, strict=False)) if w != g]
        if tolerance:
            x, y = (struct.unpack(f">{len(x) // 4}f", x) for x in (a, b))
            wrong = [i for i in wrong if not abs(x[i] - y[i]) <= tolerance * max(1, abs(x[i]))]
        if wrong or len(a) != len(b):
            i = wrong[0] if wrong else -1
            shown = ", ".join(f"{w[i]:08x}" for w in words)
            lines.append(f"{name}: {len(wrong)} of {len(words[0])} words, first {i}: {shown}")
    return sorted(lines)


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("conformance: no GPU is visible to torch")
        return 2
    major, minor = torch.cuda.get_device_capability()
    found = output(built(f"{major}{minor}{'a' if major >= 9 else ''}"))
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found['primitives'])} primitives of {found['hardware']}: {GOLDEN}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
