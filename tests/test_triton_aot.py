"""The Triton kernels, compiled for GPUs that are not there, judged by their machine code.

Compiled, not run: types, tiles, shared memory, registers and instructions are those of a real GPU;
numbers come from the interpreter (the op tests), speed from a GPU (``make gpu``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product

import pytest

pytest.importorskip("triton")

# Calls compiled here; `python -m vitkit.kernels._aot` compiles all on all architectures.
CALLS = (
    "siglip_head_dim_72",
    "beit_learned_bias",
    "sam_b_global",
    "swin_t_window_7",
    "swin_v2_window_16",
    "gigapath_10k",
    "unet_64px_nhwc",
    "vae_512px",
    "dit_xl_norm",
    "dit_xl_gate",
    "uni2_swiglu",
    "sd_geglu",
    "vit_b_gelu",
    "dinov3_rope",
    "flux_rope",
    "swin_t_patch_4",
)
ARCHITECTURES = ("sm80", "sm90", "sm100", "hip")
# Bytes of shared memory (LDS) of one block: CUDA C++ programming guide, compute capabilities;
# AMD CDNA 3 ISA.
SHARED = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "hip": 64 << 10}
REGISTERS = {"sm80": 255, "sm90": 255, "sm100": 255, "hip": 512}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "vitkit.kernels._aot", "--json"]
    command += [f"--arch={arch}" for arch in ARCHITECTURES]
    done = subprocess.run([*command, *CALLS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=ARCHITECTURES)
def rows(request, compiled):
    found = [row for row in compiled if row["arch"] == request.param]
    for row in found:
        print(
            f"{row['arch']:5} {row['spec']:20} {row['kernel']:28} {row['registers']:3} registers,"
            f" {row['spills']:2} spills, {row['shared']:6} bytes shared"
        )
    assert {row["spec"] for row in found} == set(CALLS)
    return request.param, found


def test_machine_code(rows):
    arch, found = rows
    for row in found:
        name = f"{arch} {row['spec']} {row['kernel']}"
        assert 0 < row["registers"] <= REGISTERS[arch], name
        assert row["shared"] <= SHARED[arch], f"{name}: {row['shared']} bytes of shared memory"
        assert row["hot_spills"] == 0, f"{name}: spills in an inner loop"
        assert row["spills"] <= 16, f"{name}: {row['spills']} spills"
        assert (row["matmul"] > 0) == row["expects_matmul"], f"{name}: matrix instructions"
        # Rows of a [197, 197] bias begin at odd addresses: two bytes a load. A window's table is
        # gathered: four. Of rel_h a tile needs one number per query.
        terms = ("beit_learned_bias", "sam_b_global", "swin_t_window_7", "swin_v2_window_16")
        narrow = row["spec"] in terms or not row["expects_matmul"]
        assert narrow or row["wide"] * 2 >= row["loads"], (
            f"{name}: {row['wide']} of {row['loads']} loads are 8 bytes and more"
        )


def test_every_kernel_is_compiled(rows):
    _, found = rows
    kernels = {row["kernel"] for row in found}
    assert {
        "attention_fwd_kernel",
        "attention_delta_kernel",
        "attention_bwd_dq_kernel",
        "attention_bwd_dkv_kernel",
        "attention_dbias_kernel",
        "window_bwd_kernel",
        "window_dtable_kernel",
        "window_dtable_sum_kernel",
        "attention_drel_kernel",
    } <= kernels
    assert {
        "layer_norm_fwd_kernel",
        "layer_norm_bwd_kernel",
        "gated_residual_fwd_kernel",
        "gated_residual_bwd_kernel",
    } <= kernels
    assert len([k for k in kernels if k.startswith("group_norm")]) >= 4, kernels


def attention_tables():
    from vitkit.kernels import _tiles as tiles

    dense = (tiles.FORWARD, tiles.BACKWARD_DQ, tiles.BACKWARD_DKV, tiles.BACKWARD_DBIAS)
    windows = (tiles.WINDOW_FORWARD, tiles.WINDOW_DQ, tiles.WINDOW_DKV, tiles.WINDOW_DTABLE)
    return dense + windows


def test_every_head_dim_has_a_tile_on_every_architecture():
    import torch

    from vitkit.kernels import _tiles as tiles
    from vitkit.kernels._primitives import Device

    tables = attention_tables()
    for arch in ("sm80", "sm86", "sm90", "sm100", "hip"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for head_dim in range(8, 257, 8):
                for table in tables:
                    kinds = ((False, False), (True, False), (True, True))
                    for n, term in product((1, 17, 197, 4096), kinds):
                        device = Device.typical(arch)
                        tile = tiles.pick_tile(table, device, dtype, head_dim, n, n, *term)
                        assert tile.block_m >= 16 and tile.block_n >= 16
    with pytest.raises(NotImplementedError, match="no tile for head dim 264"):
        tiles.pick_tile(tiles.FORWARD, Device.typical("sm90"), torch.float16, 264, 1, 1, False)


ONE_COMPILATION = """
from vitkit.kernels import _aot, dilated_attention
from vitkit.kernels._primitives import Device
seen = {}
for n in (1000, 1024, 4097, 10000, 16001, 65536, 200000):
    device = Device.typical("sm90")
    for launches in dilated_attention.plan_call(n, dilated_attention.GIGAPATH, False, device):
        for launch in launches:
            key = (launch.kernel.__name__, launch.constants.get("ADD"))
            seen.setdefault(key, set()).add(_aot.source_of(launch, "sm90")[0].hash())
for (name, _), variants in seen.items():
    print(name, len(variants))
"""


def test_dilated_attention_is_compiled_once_for_slides_of_all_sizes():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ONE_COMPILATION]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    variants = dict(line.split() for line in done.stdout.splitlines())
    assert len(variants) == 5
    for name, count in variants.items():
        # lse [B, H, N] of the op itself has rows that begin at multiples of 16 elements or not.
        assert int(count) <= (2 if name.startswith("dilated") else 1), (name, count)


def test_dilated_attention_gathers_nothing():
    """Beside its inputs and results a call without gradients holds less than 3 tensors like q, a
    backward pass less than 4 in float32."""
    from vitkit.kernels import dilated_attention
    from vitkit.kernels._primitives import Device

    plan = dilated_attention.plan_call(
        10_000, dilated_attention.GIGAPATH, False, Device.typical("sm90")
    )

    def scratch(launches, shared):
        found = {id(t): t for launch in launches for t in launch.args if hasattr(t, "nbytes")}
        return sum(t.nbytes for key, t in found.items() if key not in shared)

    attend, merge = plan[0]
    q, out, lse = attend.args[0], merge.args[2], merge.args[3]
    assert scratch(plan[0], {id(q), id(out), id(lse)}) < 3 * q.nbytes
    parts = merge.args[0]
    known = {id(q), id(out), id(lse), id(parts)}
    assert scratch(plan[1], known) < 4 * 2 * q.nbytes


def test_rows_give_reasons():
    from vitkit.kernels import _tiles as tiles
    from vitkit.kernels import layer_norm_modulate as norm

    for table in (*attention_tables(), tiles.WINDOW_BACKWARD, norm.TILES, norm.BACKWARD_TILES):
        for row in table:
            assert len(row.reason) > 12, row
