"""The built CUDA library, judged by its machine code: no GPU needed, nothing is run.

The tools are those of the CUDA toolkit or of Triton's wheel; without them, or without the library,
these tests skip.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vitkit import _library

HOT = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkv", "attention_dbias_kernel")
# Disassembled, of one architecture: what most vision transformers use, and the path of float32.
LOOKED_INTO = re.compile(r"attention_\w+_kernelI(13__nv_bfloat16|f)Li64E")


@pytest.fixture(scope="module")
def library():
    path = _library.native_path("_C_cuda")
    if path is None:
        pytest.skip("built without nvcc")
    return path


def cuobjdump(*arguments):
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec else Path()
    tools = [shutil.which("cuobjdump"), str(bundled / "cuobjdump")]
    tool = next((t for t in tools if t and Path(t).exists()), None)
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    return subprocess.check_output([tool, *map(str, arguments)], text=True)


@pytest.fixture(scope="module")
def usage(library):
    """(architecture, kernel) -> registers, stack, local memory."""
    found, arch, kernel = {}, None, None
    for line in cuobjdump("-res-usage", library).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\w+):", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[arch, kernel] = tuple(map(int, match.groups()))
    assert found
    return found


def test_no_attention_kernel_spills(usage):
    """Nothing lies in local memory, in any instantiation for any architecture. (A division of 64
    bits takes 8 bytes of stack for its subroutine: kernels that are not hot may have them.)"""
    hot = {k: v for k, v in usage.items() if any(name in k[1] for name in HOT)}
    assert hot
    for (arch, kernel), (registers, stack, local) in hot.items():
        assert registers <= 255 and stack == local == 0, (
            f"{arch} {kernel}: {registers} registers, {stack} bytes of stack, {local} local"
        )


def test_every_kernel_is_built_for_every_architecture(usage):
    archs = {arch for arch, _ in usage}
    kernels = {kernel for _, kernel in usage}
    assert usage.keys() == {(a, k) for a in archs for k in kernels}
    for name in (*HOT, "attention_delta", "group_norm_silu_fwd"):
        assert any(name in k for k in kernels), name


def test_attention_uses_tensor_cores(library, usage):
    arch = min((a for a, _ in usage), key=lambda a: int(re.sub(r"\D", "", a)))
    kernels = [k for a, k in usage if a == arch and LOOKED_INTO.search(k)]
    # Forward, dq, dk and dv of: no term, a dense one, structured ones, windows, slots. dbias of: a
    # dense term, windows. The same for windows of Swin V2.
    assert len(kernels) == 2 * (6 * 3 + 3)
    text = cuobjdump("-sass", "-arch", arch, "-fun", ",".join(kernels), library)
    for section in text.split("Function : ")[1:]:
        name, code = section.split("\n", 1)
        assert "HMMA" in code, f"{name}: no tensor-core instruction"
        assert "LDGSTS.E.BYPASS.128" in code, f"{name}: no asynchronous copy of 16 bytes"
        assert "LDSM" in code or "If" in name, f"{name}: no ldmatrix"
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name}: local memory"
        kernels.remove(name.strip())
    assert not kernels, f"not disassembled: {kernels}"


def test_an_op_with_a_forward_kernel_has_a_backward_kernel(library):
    """What backend="cuda" claims to run can be trained."""
    assert _library.native_error("_C_cuda") is None
    ops = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("vitkit::")]
    forward = [n for n in ops if n.endswith("_fwd")]
    has = {n: torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA") for n in ops}
    attention = ("flash_attention", "flash_attention_decomposed", "flash_attention_distance",
                 "window_attention", "dilated_attention")  # fmt: skip
    for op in (*attention, "group_norm_silu"):
        assert has[f"vitkit::{op}_fwd"], op
    for name in forward:
        assert has[name] == has[name.removesuffix("_fwd") + "_bwd"], name
