"""The built CUDA library, judged by its machine code: no GPU needed, nothing is run.

The tools are those of the CUDA toolkit or of Triton's wheel; without them, or without the library,
these tests skip.
"""

from __future__ import annotations

import re

import machine_code
import pytest
import torch

from vitkit import _library

# Kernels whose every byte of local memory costs time. (A division of 64 bits takes 8 bytes of stack
# for its subroutine: others may have them.)
HOT = (
    "attention_fwd", "attention_bwd_dq", "attention_bwd_dkv", "attention_dbias_kernel",
    "layer_norm_fwd", "layer_norm_bwd", "patch_project", "patch_dweight", "patch_dimages",
    "group_norm_silu_fwd", "row_statistics", "column_statistics", "merge_statistics", "row_sums",
    "column_sums", "merge_sums", "apply_fwd", "apply_bwd", "small_gradients", "gated_residual_fwd",
    "gated_residual_bwd", "gated_activation_fwd", "gated_activation_bwd", "rope_2d_kernel",
    "patch_places", "patch_position_sum",
)  # fmt: skip
# Disassembled, of one architecture: what most vision transformers use, and the path of float32.
LOOKED_INTO = re.compile(r"attention_(?!fwd_hopper)\w+_kernelI(13__nv_bfloat16|f)Li64E")


@pytest.fixture(scope="module")
def library():
    path = _library.native_path("_C_cuda")
    if path is None:
        pytest.skip("built without nvcc")
    return path


@pytest.fixture(scope="module")
def usage(library):
    """(architecture, kernel) -> registers, stack, local memory."""
    try:
        found = machine_code.usage(library)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert found
    return found


def test_no_hot_kernel_spills(usage):
    """Nothing lies in local memory, in any instantiation for any architecture."""
    hot = [k for k in usage.values() if any(name in k.mangled for name in HOT)]
    assert hot
    for k in hot:
        assert k.registers <= 255 and k.stack == k.local == 0, (
            f"{k.arch} {k.mangled}: {k.registers} registers, {k.stack} bytes of stack,"
            f" {k.local} local"
        )


def test_every_kernel_is_built_for_every_architecture(usage):
    archs = {arch for arch, _ in usage}
    kernels = {kernel for _, kernel in usage}
    assert usage.keys() == {(a, k) for a in archs for k in kernels}
    for name in (*HOT, "attention_delta"):
        assert any(name in k for k in kernels), name


def disassembled(library, usage, pattern):
    """(kernel, machine code) of those whose name matches, for the oldest architecture."""
    arch = min((a for a, _ in usage), key=lambda a: int(re.sub(r"\D", "", a)))
    kernels = [k for a, k in usage if a == arch and pattern.search(k)]
    found = dict(machine_code.disassembled(library, arch, kernels))
    assert found.keys() == set(kernels)
    return found


def test_attention_uses_tensor_cores(library, usage):
    found = disassembled(library, usage, LOOKED_INTO)
    # Forward, dq, dk and dv of: no term, a dense one, structured ones, windows, slots. dbias of: a
    # dense term, windows. The same for windows of Swin V2.
    assert len(found) == 2 * (6 * 3 + 3)
    for name, code in found.items():
        assert machine_code.TENSOR.search(code), f"{name}: no tensor-core instruction"
        assert "LDGSTS.E.BYPASS.128" in code, f"{name}: no asynchronous copy of 16 bytes"
        assert "LDSM" in code or "If" in name, f"{name}: no ldmatrix"
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name}: local memory"


def test_hopper_attention_uses_hopper(library, usage):
    """Products of warpgroups from boxes, registers handed from the producers to the consumers, and
    waits that leave a group in flight: one for each of product_wait."""
    kernels = [k for a, k in usage if a == "sm_90a" and "attention_fwd_hopper" in k]
    if not kernels:
        pytest.skip("built without sm_90a")
    assert len(kernels) == 2 * 4
    found = dict(machine_code.disassembled(library, "sm_90a", kernels))
    assert found.keys() == set(kernels)
    for name, code in found.items():
        head_dim = int(re.search(r"Li(\d+)E", name)[1])
        products = re.findall(r"\bHGMMA\.64x(\d+)x16\.F32", code)
        # Of scores and of outputs, twice each in the code: the first, or the last, and the others.
        want = [128] * (head_dim // 16 * 2) + [head_dim] * (128 // 16 * 2)
        assert sorted(map(int, products)) == sorted(want), name
        assert len(re.findall(r"\bUTMALDG\.4D", code)) >= 3, name
        assert "USETMAXREG.DEALLOC" in code and "USETMAXREG.TRY_ALLOC" in code, name
        # Serialised by the compiler, every product would be waited for alone.
        assert len(re.findall(r"\bWARPGROUP\.DEPBAR", code)) == 4, name
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name}: local memory"


def test_patch_embed_uses_tensor_cores(library, usage):
    """Patches and weights come by asynchronous copies of 16 bytes."""
    pattern = re.compile(r"patch_(project|dweight|dimages)_kernelI13__nv_bfloat16(S\d_)?E")
    found = disassembled(library, usage, pattern)
    assert len(found) == 3
    for name, code in found.items():
        assert "HMMA" in code and "LDGSTS.E.BYPASS.128" in code and "LDSM" in code, name


def test_layer_norm_moves_16_bytes(library, usage):
    """x, the gradient and the output of packed rows, by 128-bit accesses alone."""
    pattern = re.compile(r"layer_norm_(fwd|bwd)_kernelI(13__nv_bfloat16Li8|fLi4)E")
    found = disassembled(library, usage, pattern)
    assert len(found) == 2 * (3 + 4)
    for name, code in found.items():
        assert re.search(r"LDG\.E\.128", code) and re.search(r"STG\.E\.128", code), name


def test_tiles_move_16_bytes(library, usage):
    """Element by element ops: whole packs by 128-bit accesses, tails one by one."""
    names = r"gated_residual_(fwd|bwd)|gated_activation_(fwd|bwd)|rope_2d"
    pattern = re.compile(rf"({names})_kernelI(13__nv_bfloat16Li8|fLi4|13__nv_bfloat16Li4ELb1)E")
    found = disassembled(library, usage, pattern)
    # Forward and backward: gates of a residual; silu, both gelus, those alone. Layouts of rope.
    assert len(found) == 2 * 2 + 2 * 2 * 5 + 3
    for name, code in found.items():
        assert re.search(r"LDG\.E\.128", code) and re.search(r"STG\.E\.128", code), name


def test_an_op_with_a_forward_kernel_has_a_backward_kernel(library):
    """What backend="cuda" claims to run can be trained."""
    assert _library.native_error("_C_cuda") is None
    ops = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("vitkit::")]
    forward = [n for n in ops if n.endswith("_fwd")]
    has = {n: torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA") for n in ops}
    attention = ("flash_attention", "flash_attention_decomposed", "flash_attention_distance",
                 "window_attention", "dilated_attention")  # fmt: skip
    activations = ("swiglu", "geglu", "gelu")
    others = ("group_norm_silu", "layer_norm_modulate", "gated_residual", "rope_2d", "patch_embed",
              "patch_embed_packed")  # fmt: skip
    for op in (*attention, *others, *activations):
        assert has[f"vitkit::{op}_fwd"], op
    for name in forward:
        backward = name.removesuffix("_fwd") + "_bwd"  # linear has none, and no CUDA kernel either
        assert has[name] == has.get(backward, False), name


def test_counts_of_machine_code():
    """The reading itself, on lines as cuobjdump and ptxas write them."""
    name = "_ZN6vitkit9attention20attention_fwd_kernelI13__nv_bfloat16Li64ENS0_6NoTermEEEvT_"
    k = machine_code.Kernel("sm_80", name, 168, 0, 1024, 0, threads=128)
    assert k.name == "attention_fwd_kernel"
    assert k.warps == 12  # 65536 / (168 * 128) = 3 blocks of 4 warps
    machine_code.count(
        k,
        "HMMA.16816.F32 R4\nLDG.E.128 R8\nLDGSTS.E.BYPASS.128 [R1]\nSTG.E R2\nLDL R0\n"
        "HGMMA.64x128x16.F32 R4\nUTMALDG.4D [UR8]",
    )
    assert (k.tensor, k.wide, k.accesses, k.spills, k.boxes) == (2, 3, 4, 1, 1)


def test_summary_of_compiler_logs(tmp_path):
    log = tmp_path / "flash_attention_forward.cuda.o.log"
    lines = [
        "ptxas info    : Compiling entry function '_ZN6vitkit3abc8a_kernelIfEEvT_' for 'sm_80'",
        "ptxas info    : Function properties for _ZN6vitkit3abc8a_kernelIfEEvT_",
        "    0 bytes stack frame, {0} bytes spill stores, {0} bytes spill loads",
        "ptxas info    : Used {1} registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]",
    ]
    text = "\n".join(lines)
    log.write_text(f"{text.format(0, 40)}\n{text.format(8, 64)}\n")
    (entry,) = machine_code.summary([log])
    assert entry == {
        "source": "flash_attention_forward", "kernel": "a_kernel", "arch": "sm_80",
        "instantiations": 2, "registers": [40, 64], "spilled_bytes": 16, "shared_bytes": 512,
    }  # fmt: skip
