"""Compiles the kernels for GPUs that are not there, and reads what the compiler made of them.

    python -m vitkit.kernels._aot [--arch sm90 ...] [--json] [name part ...]

Each op module lists representative calls in ``aot_specs()``. They run through the launcher's own
planning with meta tensors, so signature, divisibility, tiles and stages are those of a real call.
Registers, spills and instructions come from the machine code (cuobjdump and nvdisasm are bundled
with Triton; AMD's assembly is text), not from the compiler's own report. Needs a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ._primitives import INTERPRET, Device, Launch

MODULES = (
    "dilated_attention",
    "flash_attention",
    "window_attention",
    "group_norm_silu",
    "gated_activation",
    "rope_2d",
    "layer_norm_modulate",
    "gated_residual",
    "patch_embed",
)
# A launch with one of these constants is one of a product.
_PRODUCT = {"D0", "BLOCK_K"}
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "hip": GPUTarget("hip", "gfx942", 64),
}
# What nvdisasm calls them.
_NVDISASM = {"sm80": "SM80", "sm86": "SM86", "sm90": "SM90a", "sm100": "SM100a"}
# Bytes one block may use: CUDA C programming guide, compute capabilities; LDS of CDNA 3.
SHARED_LIMIT = {
    "sm80": 163 << 10,
    "sm86": 99 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "hip": 64 << 10,
}
_MATMUL = re.compile(r"HMMA|HGMMA|QGMMA|UTC\w*MMA|v_mfma")
_SPILL = re.compile(r"LDL|STL|scratch_")
_LOAD = re.compile(r"LDG(?!DEPBAR)|UTMALDG|UBLKCP|(global|buffer)_load")
_WIDE = re.compile(r"\.(64|128)\b|x[24]\b|UTMALDG|UBLKCP")
# Address, name and operands of nvdisasm's instructions; where a branch goes; labels and names of
# AMD's assembler.
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;\n]*)", re.M)
_BRANCH = re.compile(r"(?:BRA|BSSY|CALL|JMP)\b")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_GCN = re.compile(r"^(?:(\.LBB\w+):|\s+([a-z]\w+))", re.M)
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Row:
    """One kernel of one call on one architecture."""

    spec: str
    kernel: str
    arch: str
    warps: int
    registers: int  # per thread
    spills: int  # instructions that save or restore a register
    hot_spills: int  # of them, in the blocks with matrix instructions: the inner loops
    shared: int  # bytes
    matmul: int  # matrix instructions
    loads: int  # loads from global memory, asynchronous copies included
    wide: int  # of them, of 8 bytes and more per thread
    expects_matmul: bool


def source_of(launch: Launch, arch: str) -> tuple[ASTSource, Any]:
    """(what ``launch`` would compile on ``arch``, options). Its ``hash()`` tells calls apart that
    are compiled separately."""
    if INTERPRET:
        raise RuntimeError("ahead-of-time compilation needs a process without TRITON_INTERPRET=1")
    backend = make_backend(TARGETS[arch])
    kernel = launch.kernel
    keywords = {**launch.constants, **launch.options}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options


def compile_launch(launch: Launch, arch: str) -> Any:
    """The kernel as ``launch`` would compile it on ``arch``."""
    source, options = source_of(launch, arch)
    return triton.compile(source, target=TARGETS[arch], options=options.__dict__)


def _tool(name: str, *arguments: str) -> str:
    command = [str(_BIN / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _registers(compiled: Any, arch: str) -> int:
    if arch == "hip":
        return int(re.findall(r"\.vgpr_count:\s+(\d+)", compiled.asm["amdgcn"])[0])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+)", _tool("cuobjdump", "-res-usage", file.name))
    if usage is None:
        raise RuntimeError("cuobjdump -res-usage: no register count in its output")
    return int(usage.group(1))


def _text(cubin: bytes) -> bytes:
    """The instructions in an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, of_names = struct.unpack_from("<HH", cubin, 0x3C)
    # name, type, flags, address, offset, size, ...
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    names = cubin[sections[of_names][4] :]
    code = [s for s in sections if names.startswith(b".text.", s[0])]
    return b"".join(cubin[offset : offset + size] for *_, offset, size in code)


def _sass(cubins: list[bytes], arch: str) -> Iterator[list[list[str]]]:
    """Instruction names of each block of each kernel. One call of nvdisasm for all: it takes longer
    to start than to disassemble."""
    codes = [_text(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        listing = _SASS.findall(_tool("nvdisasm", "--binary", _NVDISASM[arch], file.name))
    branches = (_TARGET.search(rest) for _, name, rest in listing if _BRANCH.match(name))
    targets = {int(target.group(1), 16) for target in branches if target}
    at = end = 0
    for code in codes:
        end += len(code)
        blocks: list[list[str]] = [[]]
        while at < len(listing) and int(listing[at][0], 16) < end:
            if int(listing[at][0], 16) in targets:
                blocks.append([])
            blocks[-1].append(listing[at][1])
            at += 1
        yield blocks


def _gcn(assembly: str) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for label, name in _GCN.findall(assembly):
        if label:
            blocks.append([])
        else:
            blocks[-1].append(name)
    return blocks


def inspect(kernels: list[Any], arch: str) -> Iterator[dict[str, int]]:
    """The counts of a :class:`Row` for each compiled kernel."""
    if arch == "hip":
        of_kernels = iter([_gcn(compiled.asm["amdgcn"]) for compiled in kernels])
    else:
        of_kernels = _sass([compiled.asm["cubin"] for compiled in kernels], arch)
    for compiled, blocks in zip(kernels, of_kernels, strict=True):
        hot = [block for block in blocks if any(map(_MATMUL.match, block))]
        names = [name for block in blocks for name in block]
        loads = list(filter(_LOAD.match, names))
        yield {
            "warps": compiled.metadata.num_warps,
            "registers": _registers(compiled, arch),
            "spills": sum(map(bool, map(_SPILL.match, names))),
            "hot_spills": sum(bool(_SPILL.match(name)) for block in hot for name in block),
            "shared": compiled.metadata.shared,
            "matmul": sum(map(bool, map(_MATMUL.match, names))),
            "loads": len(loads),
            "wide": sum(map(bool, map(_WIDE.search, loads))),
        }


def table(archs: tuple[str, ...] = tuple(TARGETS), names: tuple[str, ...] = ()) -> Iterator[Row]:
    """One row per kernel, for the calls whose name contains one of ``names`` (all if empty)."""
    for module in MODULES:
        specs = importlib.import_module(f"{__package__}.{module}").aot_specs()
        wanted = [s for s in specs if not names or any(name in s.name for name in names)]
        for arch in archs if wanted else ():
            device = Device.typical(arch)
            calls = [(spec, launch) for spec in wanted for launch in spec.launches(device)]
            kernels = [compile_launch(launch, arch) for _, launch in calls]
            for (spec, launch), facts in zip(calls, inspect(kernels, arch), strict=True):
                expects = spec.matmul and not _PRODUCT.isdisjoint(launch.constants)
                name = launch.kernel.__name__
                yield Row(spec.name, name, arch, expects_matmul=expects, **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only calls whose name contains one of these")
    parser.add_argument("--arch", action="append", choices=sorted(TARGETS))
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()
    rows = table(tuple(options.arch or TARGETS), tuple(options.names))
    if not options.json:
        print("arch   regs spills (hot)  shared matmul  wide/loads")
    for row in rows:
        if options.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            print(
                f"{row.arch:6} {row.registers:4} {row.spills:6} {row.hot_spills:5} {row.shared:7}"
                f" {row.matmul:6} {row.wide:5}/{row.loads:<5} {row.kernel}, {row.warps} warps:"
                f" {row.spec}",
                flush=True,
            )


if __name__ == "__main__":
    main()
