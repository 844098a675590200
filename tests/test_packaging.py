"""What is built and shipped: stable ABI only, no CUDA runtime to find, the right files."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vitkit import _library

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(params=["_C_cpu", "_C_cuda"])
def library(request):
    path = _library.native_path(request.param)
    if path is None and request.param == "_C_cuda":
        pytest.skip("built without nvcc")
    assert path is not None, "the native CPU library is not built"
    return path


def test_only_the_stable_abi_is_used(library):
    """No C++ symbol of torch may be undefined: so one build serves later torch versions."""
    lines = subprocess.check_output([tool("nm"), "-D", "--undefined-only", str(library)], text=True)
    symbols = [line.split()[-1].split("@")[0] for line in lines.splitlines()]
    mangled = [s for s in symbols if s.startswith("_ZN") and ("2at" in s[:8] or "3c10" in s[:9])]
    assert not mangled, mangled
    torch_symbols = [s for s in symbols if s.startswith(("aoti_torch_", "torch_"))]
    assert torch_symbols
    newer = [s for s in torch_symbols if "exception_get_what" in s]
    assert not newer, "newer than the torch 2.10 target"


def test_needed_libraries(library):
    text = subprocess.check_output([tool("readelf"), "-d", str(library)], text=True)
    needed = [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]
    assert not [n for n in needed if n.startswith(("libcudart", "libtorch_python", "libc10"))], (
        needed
    )


def test_instruction_sets_do_not_leak():
    """Weak symbols of an AVX-512 object could replace the baseline's."""
    objects = ROOT / "build" / "native"
    paths = [p for isa in ("avx2", "avx512", "amx") for p in objects.glob(f"cpu/**/*.{isa}.o")]
    if not paths:
        pytest.skip("built elsewhere: the object files are not here")
    for path in paths:
        isa = path.suffixes[-2].lstrip(".")
        text = subprocess.check_output([tool("nm"), "-C", "--defined-only", str(path)], text=True)
        for line in text.splitlines():
            parts = line.split(maxsplit=2)
            if len(parts) == 3 and parts[1] in "WVu":
                assert f"vitkit::cpu::{isa}" in parts[2], f"{path.name}: {parts[2]}"


def test_build_facts_match_the_libraries():
    from vitkit import _runtime

    facts = _runtime.build_facts()
    assert facts["cpu_isas"][0] == "base"
    assert ("_C_cuda" in facts["missing"]) == (_library.native_path("_C_cuda") is None)
    assert json.dumps(facts)


def test_hugging_face_kernels_is_not_shadowed():
    """kernels/ is a folder, not a package: `import kernels` must never find it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip()
    assert out == "None" or not out.startswith(str(ROOT / "kernels")), out
    assert importlib.util.find_spec("vitkit.kernels.flash_attention") is not None


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tracked files alone: what an sdist is made from."""
    target = tmp_path_factory.mktemp("source")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if names.returncode != 0:
        pytest.skip("not a git checkout")
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def build(source: Path, out: Path, *arguments: str, **environment: str) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *arguments]
    result = subprocess.run(
        command, cwd=source, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return next(iter(out.iterdir()))


def test_install_without_a_compiler_succeeds(source, tmp_path):
    """A pure Python wheel, complete but for the native libraries, and the reason in the log."""
    empty = tmp_path / "bin"
    empty.mkdir()
    wheel = build(source, tmp_path / "dist", "--wheel", CXX="/nonexistent/c++", PATH=str(empty))
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "vitkit/kernels/flash_attention.py",
        "vitkit/ops/group_norm_silu.py",
        "vitkit/benchmarks/harness.py",
        "vitkit/py.typed",
    ):
        assert expected in names, expected
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"vitkit"}
    assert not [n for n in names if n.endswith(".so")]


def test_sdist_holds_every_source(source, tmp_path):
    import tarfile

    sdist = build(source, tmp_path / "dist", "--sdist")
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[-1] for n in archive.getnames()}
    for pattern in ("csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu*", "kernels/triton/*.py"):
        for path in source.glob(pattern):
            if "build/" not in str(path.relative_to(source)):
                assert str(path.relative_to(source)) in names, path
