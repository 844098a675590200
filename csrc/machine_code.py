"""What the compiler made of the CUDA kernels, read without a GPU.

    python csrc/machine_code.py [--arch 80 ...] [--out FILE.md]      (make cuda-report)

compiles every kernel for every architecture, by the ninja files of build.py and into a folder of
its own, and writes a table: registers, spills, stack, static shared memory, the warps of a
multiprocessor that registers and static shared memory leave, tensor-core instructions, and how many
of the accesses to global memory move 16 bytes. The build uses :func:`summary` to put the compiler's
own counts into vitkit._runtime, the tests read single kernels.

cuobjdump comes with the CUDA toolkit and with Triton's wheel.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "build" / "cuda-report"

TENSOR = re.compile(r"\b(HMMA|HGMMA|QGMMA|UTC\w*MMA)\b")
_GLOBAL = re.compile(r"\b(?:LDG|STG|LDGSTS)\.[\w.]*|\bUTMA(?:LDG|STG)\b")
_WIDE = re.compile(r"\.(?:128|256)\b|UTMA")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")

# Of a multiprocessor (CUDA C programming guide, compute capabilities): registers, bytes of shared
# memory, of which a block takes one KiB for the system, warps and blocks.
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32
_SHARED = {"80": 164 << 10, "86": 100 << 10, "89": 100 << 10, "90": 228 << 10, "100": 228 << 10}


@dataclass
class Kernel:
    """One instantiation for one architecture."""

    arch: str
    mangled: str
    registers: int
    stack: int  # bytes, of which spills are a part
    shared: int  # bytes, static
    local: int  # bytes
    threads: int = 0  # of a block at most
    tensor: int = 0  # tensor-core instructions
    accesses: int = 0  # loads, stores and asynchronous copies of global memory
    wide: int = 0  # of them, of 16 bytes a thread
    boxes: int = 0  # of them, copies of boxes (TMA)
    spills: int = 0  # instructions that touch local memory

    @property
    def name(self) -> str:
        """The function's own name, without namespaces and template arguments."""
        return kernel_name(self.mangled)

    @property
    def warps(self) -> int:
        """Resident on a multiprocessor, by registers and static shared memory."""
        if self.threads == 0:
            return 0
        of_block = -(-self.threads // 32)
        of_warp = -(-self.registers * 32 // 256) * 256
        version = re.sub(r"\D", "", self.arch)
        # The system's KiB is part of what is reported from sm_90 on.
        of_system = 0 if int(version) >= 90 else 1024
        blocks = min(
            _REGISTERS // (of_warp * of_block),
            _SHARED.get(version, 100 << 10) // max(1, self.shared + of_system),
            _WARPS // of_block,
            _BLOCKS,
        )
        return blocks * of_block


def kernel_name(mangled: str) -> str:
    """``attention_fwd_kernel`` of its mangled name."""
    name, rest = mangled, mangled
    while (match := re.search(r"\d+", rest)) and not name.endswith("_kernel"):
        end = match.end() + int(match[0])
        name, rest = rest[match.end() : end], rest[end:]
    return name


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Names with template arguments, without namespaces and parameters; as they are without
    c++filt."""
    names = list(names)
    tool = shutil.which("c++filt")
    if tool is None:
        return {n: n for n in names}
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout
    found = {}
    for mangled, line in zip(names, text.splitlines(), strict=True):
        line = re.sub(r"^void ", "", line.replace("(anonymous namespace)::", ""))
        line = re.sub(r"\b(?:\w+::)+", "", re.sub(r"\((?:int|bool)\)", "", line))
        depth = 0
        for i, c in enumerate(line):  # up to the parameters
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                line = line[:i]
                break
        found[mangled] = line
    return found


def cuobjdump(*arguments: object, folder: str | None = None) -> str:
    """Its output; it writes files into ``folder``. FileNotFoundError without it."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent if spec and spec.origin else Path()
    tools = [shutil.which("cuobjdump"), str(bundled / "backends" / "nvidia" / "bin" / "cuobjdump")]
    tool = next((t for t in tools if t and Path(t).exists()), None)
    if tool is None:
        raise FileNotFoundError("cuobjdump is not installed")
    return subprocess.check_output([tool, *map(str, arguments)], text=True, cwd=folder)


def usage(library: Path) -> dict[tuple[str, str], Kernel]:
    """(architecture, mangled name) -> what ``library`` says of itself."""
    found, arch, kernel = {}, "", ""
    pattern = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    for line in cuobjdump("-res-usage", library).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\w+):", line):
            kernel = match[1]
        elif match := pattern.search(line):
            found[arch, kernel] = Kernel(arch, kernel, *map(int, match.groups()))
    return found


def disassembled(
    library: Path, arch: str, kernels: Iterable[str] = ()
) -> Iterator[tuple[str, str]]:
    """(mangled name, machine code) of ``kernels`` for one architecture, of all if there are
    none."""
    only = ["-fun", ",".join(kernels)] if kernels else []
    text = cuobjdump("-sass", "-arch", arch, *only, library)
    for section in text.split("Function : ")[1:]:
        name, _, code = section.partition("\n")
        yield name.strip(), code


def count(kernel: Kernel, code: str) -> None:
    """Instructions of a kernel's machine code."""
    accesses = _GLOBAL.findall(code)
    kernel.tensor = len(TENSOR.findall(code))
    kernel.accesses = len(accesses)
    kernel.wide = sum(bool(_WIDE.search(a)) for a in accesses)
    kernel.boxes = sum(a.startswith("UTMA") for a in accesses)
    kernel.spills = len(_LOCAL.findall(code))


def block_threads(library: Path) -> dict[tuple[str, str], int]:
    """(architecture, mangled name) -> threads that the launch bounds allow, from the embedded
    ELF files."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cuobjdump("-xelf", "all", library.resolve(), folder=folder)
        for cubin in Path(folder).glob("*.cubin"):
            arch = next(p for p in cubin.name.split(".") if p.startswith("sm_"))
            for section, content in _sections(cubin.read_bytes()):
                if section.startswith(".nv.info."):
                    threads = _max_threads(content)
                    found[arch, section.removeprefix(".nv.info.")] = threads
    return found


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a 64-bit ELF file's sections."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, number, names = struct.unpack_from("<HHH", elf, 0x3A)

    def header(i: int) -> tuple[int, int, int, int]:
        name, kind = struct.unpack_from("<II", elf, start + i * size)
        offset, length = struct.unpack_from("<QQ", elf, start + i * size + 0x18)
        return name, kind, offset, length

    _, _, table, _ = header(names)
    for i in range(number):
        name, kind, offset, length = header(i)
        end = elf.index(b"\0", table + name)
        if kind != 8:  # without content
            yield elf[table + name : end].decode(), elf[offset : offset + length]


def _max_threads(info: bytes) -> int:
    """EIATTR_MAX_THREADS of an .nv.info section: three sizes of a block."""
    at = 0
    while at + 4 <= len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        if form == 4 and attribute == 5:
            x, y, z = struct.unpack_from("<III", info, at + 4)
            return x * y * z
        at += 4 + (value if form == 4 else 0)
    return 0


# ---- the compiler's own counts, for vitkit._runtime ----


def summary(logs: Iterable[Path]) -> list[dict[str, Any]]:
    """One entry per source, kernel and architecture from what ptxas -v said, over all its
    instantiations."""
    entries: dict[tuple[str, str, str], dict[str, Any]] = {}
    for log in logs:
        source = log.name.split(".")[0]
        entry: dict[str, Any] = {}
        for line in log.read_text().splitlines():
            if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                key = (source, kernel_name(match[1]), match[2])
                blank = {
                    "source": key[0], "kernel": key[1], "arch": key[2], "instantiations": 0,
                    "registers": [999, 0], "spilled_bytes": 0, "shared_bytes": 0,
                }  # fmt: skip
                entry = entries.setdefault(key, blank)
                entry["instantiations"] += 1
            elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                if entry:  # functions that are no kernels come before any
                    entry["spilled_bytes"] += int(match[1]) + int(match[2])
            elif match := re.search(r"Used (\d+) registers", line):
                low, high = entry["registers"]
                used = int(match[1])
                entry["registers"] = [min(low, used), max(high, used)]
                shared = re.search(r"(\d+) bytes smem", line)
                entry["shared_bytes"] = max(entry["shared_bytes"], int(shared[1]) if shared else 0)
    return [entries[key] for key in sorted(entries)]


def write_header(out: Path, logs: list[Path]) -> None:
    """The summary as a C++ header: JSON in string literals of one entry each."""
    entries = [json.dumps(e) for e in summary(logs)]
    parts = ["[", *(e + "," for e in entries[:-1]), *entries[-1:], "]"]
    literals = " \\\n  ".join(f'R"json({part})json"' for part in parts)
    out.write_text(f"#define VITKIT_KERNEL_ATTRIBUTES \\\n  {literals}\n")


# ---- the report ----


def compiled(archs: list[str]) -> Path:
    """The library for ``archs``, built where it is out of date."""
    spec = importlib.util.spec_from_file_location("vitkit_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = native
    spec.loader.exec_module(native)
    plan = native.plan()
    if "_C_cuda" in plan.missing:
        raise SystemExit(f"cuda-report: {plan.missing['_C_cuda']}")
    plan.cuda_archs = archs
    plan.missing |= dict.fromkeys(("_C_cpu", "_runtime"), "not part of the report")
    native.build(REPORT, REPORT / "objects", plan)
    return REPORT / f"_C_cuda{native.EXT_SUFFIX}"


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of a library with all its counts."""
    found = usage(library)
    for key, threads in block_threads(library).items():
        if key in found:
            found[key].threads = threads
    for arch in sorted({a for a, _ in found}):
        for name, code in disassembled(library, arch):
            if (arch, name) in found:
                count(found[arch, name], code)
    return sorted(found.values(), key=lambda k: (k.name, k.mangled, k.arch))


COLUMNS = (
    "arch", "kernel", "registers", "spills", "stack", "shared", "threads", "warps", "tensor",
    "16 bytes", "boxes",
)  # fmt: skip


def _rows(found: list[Kernel]) -> list[tuple[str, ...]]:
    labels = demangled({k.mangled for k in found})
    return [
        (
            k.arch, f"`{labels[k.mangled]}`", str(k.registers), str(k.spills), str(k.stack),
            str(k.shared), str(k.threads), str(k.warps), str(k.tensor), f"{k.wide}/{k.accesses}",
            str(k.boxes),
        )
        for k in found
    ]  # fmt: skip


def _range(values: Iterable[int]) -> str:
    low, high = min(values := list(values)), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _families(found: list[Kernel]) -> list[tuple[str, ...]]:
    """One row per kernel template and architecture."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for k in found:
        groups.setdefault((k.name, k.arch), []).append(k)
    return [
        (
            arch, f"`{name}` x {len(of)}", _range(k.registers for k in of),
            str(sum(k.spills for k in of)), _range(k.stack for k in of),
            _range(k.shared for k in of), _range(k.threads for k in of),
            _range(k.warps for k in of), _range(k.tensor for k in of),
            f"{sum(k.wide for k in of)}/{sum(k.accesses for k in of)}",
            _range(k.boxes for k in of),
        )
        for (name, arch), of in sorted(groups.items())
    ]  # fmt: skip


def markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", action="append", help="80, 90a, 100; default: all three")
    parser.add_argument("--out", type=Path, default=REPORT / "report.md")
    parser.add_argument("--header", type=Path, help="for the build: write a C++ header instead")
    parser.add_argument("logs", nargs="*", type=Path, help="for --header: what ptxas -v said")
    options = parser.parse_args()
    if options.header:
        write_header(options.header, options.logs)
        return
    found = kernels(compiled(options.arch or ["80", "90a", "100"]))
    text = (
        "# CUDA kernels, as compiled\n\n"
        "`warps`: resident on a multiprocessor by registers and static shared memory. `spills`:\n"
        "instructions that touch local memory. `tensor`: tensor-core instructions. `16 bytes`: of\n"
        "all accesses to global memory in the machine code. `boxes`: of them, copies by the copy\n"
        "engine (TMA).\n\n"
        f"{markdown(_families(found))}\n\n## Every instantiation\n\n{markdown(_rows(found))}\n"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(markdown(_families(found)))
    spilled = [k for k in found if k.spills]
    print(f"{len(found)} kernels, {len(spilled)} touch local memory: {options.out}")


if __name__ == "__main__":
    main()
