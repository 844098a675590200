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
# Labels and instruction names of nvdisasm and of AMD's assembler.
_SASS = re.compile(
    r"^(?:(\.L_x_\d+):|\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*))", re.M
)
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


def _nvidia(cubin: bytes) -> tuple[int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(name: str, option: str) -> str:
            command = [str(_BIN / name), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+)", tool("cuobjdump", "-res-usage"))
        code = tool("nvdisasm", "-c")
    if usage is None:
        raise RuntimeError("cuobjdump -res-usage: no register count in its output")
    return int(usage.group(1)), code


def _blocks(compiled: Any, arch: str) -> tuple[int, list[list[str]]]:
    """(registers, instruction names of each block between two labels)."""
    if arch == "hip":
        code = compiled.asm["amdgcn"]
        registers, pattern = int(re.findall(r"\.vgpr_count:\s+(\d+)", code)[0]), _GCN
    else:
        registers, code = _nvidia(compiled.asm["cubin"])
        pattern = _SASS
    blocks: list[list[str]] = [[]]
    for label, name in pattern.findall(code):
        if label:
            blocks.append([])
        else:
            blocks[-1].append(name)
    return registers, blocks


def inspect(compiled: Any, arch: str) -> dict[str, int]:
    """The counts of a :class:`Row`."""
    registers, blocks = _blocks(compiled, arch)
    hot = [block for block in blocks if any(map(_MATMUL.match, block))]
    names = [name for block in blocks for name in block]
    loads = list(filter(_LOAD.match, names))
    return {
        "warps": compiled.metadata.num_warps,
        "registers": registers,
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
        for spec in specs:
            if names and not any(name in spec.name for name in names):
                continue
            for arch in archs:
                for launch in spec.launches(Device.typical(arch)):
                    facts = inspect(compile_launch(launch, arch), arch)
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
