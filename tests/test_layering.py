"""Who may import whom (DESIGN §2), read from the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAZY = {"timm", "transformers", "diffusers", "torchvision", "triton", "matplotlib", "jinja2"}


def modules(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path, top_level_only: bool) -> set[str]:
    """Dotted names a file imports; with ``top_level_only`` those that run when it is imported."""
    tree = ast.parse(path.read_text())
    found = set()
    guarded: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy_body = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if lazy_body or type_checking:
            guarded.update(ast.walk(node))
    for node in ast.walk(tree):
        if top_level_only and node in guarded:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve(path, node)
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def resolve(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    relative = path.relative_to(ROOT)
    package = ["vitkit", "kernels"] if relative.parts[0] == "kernels" else list(relative.parts[:-1])
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("path", modules("vitkit"), ids=lambda p: str(p.relative_to(ROOT)))
def test_host_libraries_are_imported_lazily(path):
    if path.parent.name in ("demo", "hosts"):
        pytest.skip("imported when it is run, or when its library is loaded already")
    heavy = {name for name in imports(path, top_level_only=True) if name.split(".")[0] in LAZY}
    assert not heavy, f"{path.name} imports {heavy} when it is imported"


def test_ops_stand_alone():
    """An op imports the contract, never another op, nn, patch, or a kernel outside a launcher."""
    for path in modules("vitkit/ops"):
        for name in imports(path, top_level_only=False):
            if inside(name, ("vitkit",)) and name != "vitkit":
                contract = ("_library", "backends", "_checks", "_gated", "_patches", "score_bias")
                allowed = tuple(f"vitkit.{part}" for part in contract)
                allowed_from = ("vitkit._library", "vitkit.backends", "vitkit._patches")
                assert inside(name, allowed) or name in allowed_from, f"{path.name}: {name}"
        text = path.read_text()
        launchers = [line for line in text.splitlines() if "vitkit.kernels" in line]
        assert all("import_module" in line for line in launchers), path.name


def test_kernels_import_only_their_vocabulary():
    for path in modules("kernels/triton"):
        for name in imports(path, top_level_only=False):
            if inside(name, ("vitkit",)):
                last = name.removeprefix("vitkit.kernels").lstrip(".").split(".")[0]
                assert last == "" or last.startswith("_"), f"{path.name} imports {name}"


def test_layers_point_downwards():
    rules = {
        "vitkit/nn": ("vitkit.patch", "vitkit.kernels", "vitkit.models", "vitkit.cli"),
        "vitkit/models": ("vitkit.patch", "vitkit.kernels", "vitkit.ops", "vitkit.cli"),
        "vitkit/patch": ("vitkit.kernels", "vitkit.models", "vitkit.cli", "vitkit.ops"),
        "benchmarks": ("vitkit.kernels",),
    }
    for folder, forbidden in rules.items():
        for path in modules(folder):
            bad = {n for n in imports(path, top_level_only=False) if inside(n, forbidden)}
            assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_device_code_includes_no_torch_header():
    """Kernel files compile without torch, which is what lets the emulator and the ISA builds use
    them."""
    files = [*ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("csrc/cpu/**/*_kernel.cpp")]
    assert files
    for path in files:
        assert "#include <torch" not in path.read_text(), path


def test_inline_assembly_is_what_the_emulator_stands_in_for():
    vocabulary = {ROOT / "csrc" / "core" / name for name in ("ptx.cuh", "hopper.cuh")}
    files = [p for pattern in ("*.cuh", "*.cu") for p in (ROOT / "csrc").rglob(pattern)]
    assert {p for p in files if re.search(r"\basm\b[^:;]*\(", p.read_text())} == vocabulary


def test_host_code_uses_the_stable_abi_only():
    for path in [
        *ROOT.glob("csrc/**/*.cpp"),
        *ROOT.glob("csrc/**/*.cu"),
        *ROOT.glob("csrc/**/*.h"),
    ]:
        for line in path.read_text().splitlines():
            if line.startswith("#include <torch/"):
                ok = (
                    "torch/csrc/stable/",
                    "torch/headeronly/",
                    "torch/csrc/inductor/aoti_torch/c/",
                )
                assert any(o in line for o in ok), f"{path.name}: {line}"
            assert not line.startswith(("#include <ATen", "#include <c10")), f"{path.name}: {line}"


def test_every_kernel_file_lives_in_its_instruction_set():
    """Vague-linkage code of an ISA build outside its namespace could replace the baseline's."""
    for path in ROOT.glob("csrc/cpu/**/*_kernel.cpp"):
        text = path.read_text()
        assert "VITKIT_ISA" in text, path.name
        for header in ("vector", "algorithm", "string", "functional", "memory", "map"):
            assert f"#include <{header}>" not in text, f"{path.name} includes <{header}>"


def test_files_stay_readable():
    limit = {".py": 600, ".h": 600, ".cpp": 600, ".cu": 600, ".cuh": 600}
    for folder in ("vitkit", "kernels", "csrc", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in limit and "__pycache__" not in path.parts:
                lines = len(path.read_text().splitlines())
                assert lines <= limit[path.suffix], f"{path.relative_to(ROOT)} has {lines} lines"
