"""What this installation has, what it lacks, and the command that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import torch

from vitkit import _library, backends
from vitkit._version import __version__

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps vitkit"


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``ok`` False with ``needed`` means broken; without, only missing."""

    name: str
    ok: bool
    text: str
    mend: str = ""
    needed: bool = False


def build_facts() -> dict[str, Any]:
    """Facts of the native build, empty without one."""
    if importlib.util.find_spec("vitkit._runtime") is None:
        return {}
    return importlib.import_module("vitkit._runtime").build_facts()


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """Versions, devices, build facts and the backends of every op, as plain data."""
    libraries = ("torch", "triton", "timm", "diffusers", "transformers", "torchvision", "xformers")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "vitkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version_of(name) for name in libraries},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu_isa": _library.cpu_isa(),
        "build": build_facts(),
        "ops": {
            op: {
                device: {
                    b: backends.why_not_device(op, b, device) or "can run"
                    for b in backends.ORDER[device]
                }
                for device in ("cpu", "cuda")
                if device == "cpu" or torch.cuda.is_available()
            }
            for op in sorted(backends.OPS)
        },
        "cuda_kernels": {
            op: kernels for op in sorted(backends.OPS) if (kernels := backends.kernels_of(op))
        },
    }


def examine() -> list[Finding]:
    """Everything worth checking, in the order a person would."""
    return [
        Finding("python", sys.version_info >= (3, 10), platform.python_version(), needed=True),
        Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        _native_cpu(),
        _native_cuda(),
        _triton(),
        *_tools(),
        *_hosts(),
    ]


def _missing_reason(library: str) -> tuple[str, str]:
    """Why a native library was not built, and what to do, from the build's own record or anew."""
    recorded = build_facts().get("missing", {}).get(library)
    if recorded:
        return recorded, f"then: {REBUILD}"
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "no C++ compiler", f"apt-get install g++ ninja-build, then: {REBUILD}"
    return "the build left it out", f"{REBUILD} -v (its output names the reason)"


def _native_cpu() -> Finding:
    error = _library.native_error("_C_cpu")
    if error is None:
        isas = ", ".join(build_facts().get("cpu_isas", []))
        return Finding(
            "CPU kernels", True, f"using {_library.cpu_isa()} (built for {isas})", needed=True
        )
    if _library.native_path("_C_cpu") is None:
        reason, mend = _missing_reason("_C_cpu")
        return Finding("CPU kernels", False, reason, mend, needed=True)
    return Finding("CPU kernels", False, error, REBUILD, needed=True)


def _native_cuda() -> Finding:
    gpu = torch.cuda.is_available()
    if _library.native_path("_C_cuda") is None:
        reason, mend = _missing_reason("_C_cuda")
        return Finding("CUDA kernels", False, reason, mend if gpu else "", needed=gpu)
    archs = ", ".join(build_facts().get("cuda_archs", []))
    if not gpu:
        return Finding("CUDA kernels", True, f"built for {archs}; no GPU is visible here")
    error = _library.native_error("_C_cuda")
    return Finding(
        "CUDA kernels", error is None, error or f"built for {archs}", REBUILD if error else "", True
    )


def _triton() -> Finding:
    version = version_of("triton")
    if version is None:
        needed = torch.cuda.is_available()
        return Finding("triton", False, "not installed", "pip install triton", needed)
    return Finding("triton", True, version)


def _tools() -> list[Finding]:
    tools = {
        "C++ compiler": (shutil.which("g++") or shutil.which("clang++"), "apt-get install g++"),
        "ninja": (
            shutil.which("ninja") or importlib.util.find_spec("ninja"),
            "pip install ninja",
        ),
        "nvcc": (shutil.which("nvcc"), "install the CUDA toolkit (only to build CUDA kernels)"),
    }
    return [
        Finding(name, bool(found), "found" if found else "not found (only needed to build)", mend)
        if not found
        else Finding(name, True, "found")
        for name, (found, mend) in tools.items()
    ]


def _hosts() -> list[Finding]:
    found = []
    for name in ("timm", "diffusers", "transformers"):
        version = version_of(name)
        mend = "" if version else f"pip install {name} (only to patch its models)"
        found.append(Finding(name, version is not None, version or "not installed", mend))
    return found


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
