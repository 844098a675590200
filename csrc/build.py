"""Builds vitkit's native libraries with ninja.

Three shared libraries come out of ``csrc/``:

``_C_cpu``    CPU kernels. Every ``cpu/*_kernel.cpp`` is compiled once per instruction set, other
files once.
``_C_cuda``   CUDA kernels, when nvcc is found. No GPU is needed to build them.
``_runtime``  a pybind11 module with the facts of this build.

``_C_cpu`` and ``_C_cuda`` use LibTorch's stable ABI only (target 2.10), so one build serves every
later torch.
``setup.py`` calls :func:`plan` and :func:`build`; ``python csrc/build.py`` rebuilds in place.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # torch 2.10
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", *WARNINGS]
# No -ffast-math: kernels rely on NaN, infinities and signed zeros. These two change no result, only
# errno and traps.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"]
# GCC 12 and earlier warn about its own AVX-512 headers (GCC bug 105593).
WIDE = ["-mprefer-vector-width=512", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "base": [],
    "avx2": ["-march=x86-64-v3", "-mtune=haswell"],
    "avx512": ["-march=x86-64-v4", *WIDE],
    "amx": ["-march=sapphirerapids", *WIDE],
}
DEFAULT_CUDA_ARCHS = ["80", "90a", "100"]


@dataclass
class Plan:
    """What can be built here, and why the rest cannot."""

    torch_dir: Path | None = None
    cxx: str | None = None
    nvcc: str | None = None
    isas: list[str] = field(default_factory=list)
    cuda_archs: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        return [name for name in ("_C_cpu", "_C_cuda", "_runtime") if name not in self.missing]


def _find_torch() -> Path | None:
    """The installed torch, found without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(c) for c in candidates if c.exists()), None)


def _compiles(cxx: str, flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp) / "probe.cpp"
        source.write_text("int probe() { return 0; }\n")
        command = [cxx, *flags, "-c", str(source), "-o", str(Path(tmp) / "probe.o")]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:  # CXX names something that is not there
            return False


def _cuda_archs() -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a") where set, the default architectures otherwise."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    names = [a.removesuffix("+PTX") for a in listed.replace(";", " ").split()]
    return [a.replace(".", "") for a in names] or DEFAULT_CUDA_ARCHS


def plan() -> Plan:
    """Looks at this machine and says which libraries can be built."""
    p = Plan(
        torch_dir=_find_torch(),
        cxx=os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"),
    )
    if importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None:
        p.missing = dict.fromkeys(
            ("_C_cpu", "_C_cuda", "_runtime"), "ninja is not installed: pip install ninja"
        )
        return p
    if p.cxx is None or not _compiles(p.cxx, CXX_FLAGS):
        reason = "no C++20 compiler found: install g++ (Debian, Ubuntu: apt-get install g++)"
        p.missing = dict.fromkeys(("_C_cpu", "_C_cuda", "_runtime"), reason)
        return p
    x86 = platform.machine() in ("x86_64", "AMD64")
    p.isas = [
        isa
        for isa, flags in ISA_FLAGS.items()
        if isa == "base" or (x86 and _compiles(p.cxx, flags))
    ]
    if importlib.util.find_spec("pybind11") is None:
        p.missing["_runtime"] = "pybind11 is not installed: pip install pybind11"
    if p.torch_dir is None:
        reason = "torch is not visible to the build: build with --no-build-isolation"
        p.missing["_C_cpu"] = p.missing["_C_cuda"] = reason
        return p
    p.nvcc = _find_nvcc()
    if not list((CSRC / "cuda").glob("*.cu")):
        p.missing["_C_cuda"] = "this source tree has no CUDA sources"
    elif p.nvcc is None:
        p.missing["_C_cuda"] = "nvcc not found: install the CUDA toolkit, or set CUDA_HOME"
    else:
        p.cuda_archs = _cuda_archs()
    return p


def _include(*paths: Path | str) -> list[str]:
    return [f"-I{p}" for p in paths]


def _torch_flags(p: Plan) -> tuple[list[str], list[str]]:
    assert p.torch_dir is not None
    lib = p.torch_dir / "lib"
    compile_flags = [STABLE_ABI, f"-isystem{p.torch_dir / 'include'}"]
    return compile_flags, [
        "-Wl,--no-as-needed",
        f"-L{lib}",
        "-ltorch",
        "-ltorch_cpu",
        "-Wl,--as-needed",
    ]


def _cpu_objects(p: Plan, have: list[str]) -> list[tuple[Path, str, list[str]]]:
    """(source, object suffix, flags) of every translation unit of ``_C_cpu``."""
    units = []
    for source in sorted((CSRC / "cpu").glob("**/*.cpp")):
        if source.stem.endswith("_kernel"):
            for isa in p.isas:
                units.append((source, isa, [*KERNEL_FLAGS, *ISA_FLAGS[isa], f"-DVITKIT_ISA={isa}"]))
        else:
            units.append((source, "host", [*_torch_flags(p)[0], *have]))
    return units


def write_ninja(p: Plan, build_dir: Path, out_dir: Path) -> Path:
    """Writes ``build.ninja`` for everything in ``p.targets``."""
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $label",
        # What ptxas says of each kernel goes to $out.log, everything else to the terminal.
        "rule nvcc",
        "  command = $nvcc -MD -MF $out.d $flags -Xptxas -v -c $in -o $out 2> $out.log; code=$$?;"
        " grep -v -e '^ptxas info' -e 'bytes stack frame' $out.log >&2; exit $$code",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $label",
        "rule attributes",
        f"  command = {sys.executable} {CSRC / 'machine_code.py'} --header $out $in",
        "  description = read what ptxas says",
        "rule link",
        "  command = $linker $in $flags -o $out",
        "  description = link $out",
    ]
    defaults = []

    def unit(
        rule: str, compiler: str, source: Path, tag: str, flags: list[str], after: str = ""
    ) -> str:
        relative = source.relative_to(CSRC)
        obj = f"{relative.with_suffix('')}.{tag}.o"
        log = f" | {obj}.log" if rule == "nvcc" else ""
        lines.extend(
            [
                f"build {obj}{log}: {rule} {source}{after}",
                f"  {'nvcc' if rule == 'nvcc' else 'cxx'} = {compiler}",
                f"  flags = {' '.join(flags)}",
                f"  label = {relative} [{tag}]",
            ]
        )
        return obj

    def link(name: str, linker: str, objects: list[str], flags: list[str]) -> None:
        out = out_dir / f"{name}{EXT_SUFFIX}"
        lines.extend(
            [
                f"build {out}: link {' '.join(objects)}",
                f"  linker = {linker}",
                f"  flags = {' '.join(flags)}",
            ]
        )
        defaults.append(str(out))

    assert p.cxx is not None
    have = [f"-DVITKIT_HAVE_{isa.upper()}" for isa in p.isas if isa != "base"]
    common = _include(CSRC / "core", CSRC / "cpu")
    if "_C_cpu" in p.targets:
        objects = [
            unit("cxx", p.cxx, source, tag, [*CXX_FLAGS, *common, *flags])
            for source, tag, flags in _cpu_objects(p, have)
        ]
        link("_C_cpu", p.cxx, objects, ["-shared", *_torch_flags(p)[1], "-lpthread"])
    logs: list[str] = []
    if "_C_cuda" in p.targets:
        assert p.nvcc is not None and p.torch_dir is not None
        gencode = [f"-gencode arch=compute_{a},code=sm_{a}" for a in p.cuda_archs]
        flags = [
            "-O3",
            "-std=c++20",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "-lineinfo",
            "-DUSE_CUDA",
            *(["-DVITKIT_SM_90A"] if "90a" in p.cuda_archs else []),
            *gencode,
        ]
        # No --threads: the logs of architectures would mix, and files keep the cores busy.
        flags += [
            f"-ccbin {p.cxx}",
            STABLE_ABI,
            f"-isystem {p.torch_dir / 'include'}",
        ]
        flags += _include(CSRC / "core", CSRC / "cuda", CSRC)
        objects = [
            unit("nvcc", p.nvcc, s, "cuda", flags) for s in sorted((CSRC / "cuda").glob("*.cu"))
        ]
        logs = [f"{o}.log" for o in objects]
        torch_link = [f"-Xlinker {f}" if f.startswith("-Wl") else f for f in _torch_flags(p)[1]]
        link(
            "_C_cuda",
            p.nvcc,
            objects,
            ["-shared", "-cudart static", *(f.replace("-Wl,", "") for f in torch_link)],
        )
    if "_runtime" in p.targets:
        import pybind11

        facts = json.dumps(
            {
                "compiler": _version(p.cxx),
                "nvcc": _version(p.nvcc) if p.nvcc else None,
                "cpu_isas": p.isas if "_C_cpu" in p.targets else [],
                "cuda_archs": [f"sm_{a}" for a in p.cuda_archs],
                "missing": p.missing,
            }
        )
        header = build_dir / "build_facts.h"
        text = f'#define VITKIT_BUILD_FACTS R"json({facts})json"\n'
        if not header.exists() or header.read_text() != text:
            header.write_text(text)
        flags = [
            *CXX_FLAGS,
            *_include(build_dir, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]),
        ]
        lines.append(f"build kernel_attributes.h: attributes {' '.join(logs)}")
        after = " | kernel_attributes.h"
        objects = [
            unit("cxx", p.cxx, s, "py", flags, after)
            for s in sorted((CSRC / "runtime").glob("*.cpp"))
        ]
        link("_runtime", p.cxx, objects, ["-shared"])
    lines.append(f"default {' '.join(defaults)}")
    path = build_dir / "build.ninja"
    path.write_text("\n".join(lines) + "\n")
    return path


def _version(tool: str) -> str:
    text = (
        subprocess.run([tool, "--version"], capture_output=True, text=True)
        .stdout.strip()
        .splitlines()
    )
    return next((line for line in text if "release" in line), text[0] if text else tool)


def _ninja() -> list[str]:
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    assert found is not None
    return [found]


def _jobs() -> int:
    """One job per core, but at least 3 GB of memory each (nvcc and AVX-512 units are the hungry
    ones)."""
    try:
        gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        gigabytes = 8.0
    return max(1, min(os.cpu_count() or 1, int(gigabytes / 3)))


@contextmanager
def _alone(build_dir: Path) -> Iterator[None]:
    """Waits for whoever builds in that folder: two ninjas at once lose their records, and then
    everything is built again."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    with (build_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(out_dir: Path, build_dir: Path, p: Plan | None = None) -> Plan:
    """Builds what can be built into ``out_dir``; raises CalledProcessError when a compiler
    fails."""
    p = p or plan()
    for name, reason in p.missing.items():
        print(f"vitkit: {name} is not built: {reason}", file=sys.stderr)
    if p.targets:
        build_dir.mkdir(parents=True, exist_ok=True)
        out_dir.mkdir(parents=True, exist_ok=True)
        with _alone(build_dir):
            write_ninja(p, build_dir.resolve(), out_dir.resolve())
            # -k 0: a CUDA file that fails to compile must not cost the CPU library.
            command = [*_ninja(), "-C", str(build_dir), "-j", str(_jobs()), "-k", "0"]
            subprocess.run(command, check=True)
    return p


if __name__ == "__main__":
    build(ROOT / "vitkit", ROOT / "build" / "native")
