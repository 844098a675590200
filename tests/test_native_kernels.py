"""The CPU kernels without PyTorch: every instruction set this machine has, and stand-ins for those
it lacks.

``tests/native`` holds one driver per kernel file; it is compiled together with the kernel under the
flags of an instruction set, and checks every case against float64. Code for 16 lanes and for AMX
tiles runs everywhere in two more builds: vectors of 16 lanes made of narrower ones, and tiles in
plain C++, under the address and undefined behaviour sanitizers.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_library import cpu_library

ROOT = Path(__file__).resolve().parent.parent
# Driver -> the sources it is compiled with.
KERNELS = {
    "attention_forward": ("flash_attention_kernel.cpp",),
    "attention_backward": ("flash_attention_bwd_kernel.cpp",),
    "dilated_attention": ("dilated_attention_kernel.cpp", "dilated_attention_bwd_kernel.cpp"),
    "gated_activation": ("gated_activation_kernel.cpp",),
    "group_norm_silu": ("group_norm_silu_kernel.cpp", "scratch.cpp"),
    "rope_2d": ("rope_2d_kernel.cpp",),
    "layer_norm_modulate": ("layer_norm_modulate_kernel.cpp", "scratch.cpp"),
    "gated_residual": ("gated_residual_kernel.cpp", "scratch.cpp"),
    "patch_embed": ("patch_embed_kernel.cpp", "patch_embed_bwd_kernel.cpp"),
    "window_attention": ("window_attention_kernel.cpp", "window_attention_bwd_kernel.cpp"),
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
LANES = ["-DVITKIT_SIMD_LANES=16", "-Wno-maybe-uninitialized"]
TILES = [*LANES, "-DVITKIT_EMULATE_AMX"]


@functools.cache
def _build():
    spec = importlib.util.spec_from_file_location("vitkit_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _variants() -> dict[str, tuple[str, list[str]]]:
    """(instruction set whose code it is, flags)."""
    flags = _build().ISA_FLAGS
    wide = flags["avx2"] if _has("avx2") else []
    native = {isa: (isa, flags[isa]) for isa in flags}
    return native | {
        "avx512-emulated": ("avx512", [*wide, *LANES]),
        "amx-emulated": ("amx", [*wide, *TILES]),
        "amx-emulated-sanitized": ("amx", [*wide, *TILES, *SANITIZE]),
    }


@functools.cache
def _has(isa: str) -> bool:
    library = cpu_library()
    can = library.vitkit_force_cpu_isa(isa.encode()) == 0
    library.vitkit_force_cpu_isa(b"auto")
    return can


def compile_driver(target: Path, kernel: str, variant: str, csrc: Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    build = _build()
    isa, flags = _variants()[variant]
    command = [compiler, *build.CXX_FLAGS, *build.KERNEL_FLAGS, *flags, "-O1"]
    command.remove("-fno-exceptions")  # of the driver's containers
    command += [f"-DVITKIT_ISA={isa}", f"-I{csrc / 'core'}", f"-I{csrc / 'cpu'}"]
    command += [str(ROOT / "tests" / "native" / f"{kernel}_driver.cpp")]
    command += [*(str(csrc / "cpu" / name) for name in KERNELS[kernel]), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def run(driver: Path) -> subprocess.CompletedProcess:
    return subprocess.run([driver], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    # Not avx2: what make test runs everything else on.
    "variant",
    ["base", "avx512", "amx", "avx512-emulated", "amx-emulated-sanitized"],
)
def test_every_case(tmp_path, kernel, variant):
    if "-" not in variant and not _has(variant):
        pytest.skip(f"this CPU has no {variant}")
    done = run(compile_driver(tmp_path / "driver", kernel, variant, ROOT / "csrc"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert ", 0 failed" in done.stdout


# What is broken -> (kernel, variant, header, text, replacement).
MUTANTS = {
    "last key of a ragged row is forgotten": (
        "attention_forward", "amx-emulated", "attention/softmax.h", "keep_lanes(p, n - j, 0.f)",
        "keep_lanes(p, n - j - 1, 0.f)",
    ),
    "output is not rescaled between chunks": (
        "attention_forward", "amx-emulated", "attention/forward_amx.h",
        "load(row + t * kTileSums) * factor", "load(row + t * kTileSums)",
    ),
    "delta ignores the gradient of lse": (
        "attention_backward", "avx512-emulated", "attention/backward.h",
        "reduce_add(sum) - map.grad_lse(i)", "reduce_add(sum)",
    ),
    "diagonal attends one key too many": (
        "attention_backward", "amx-emulated", "attention/backward.h",
        "b.q0 + r + 1 - b.k0", "b.q0 + r + 2 - b.k0",
    ),
    "sums of dK and dV are stored unturned": (
        "attention_backward", "amx-emulated", "attention/backward_amx.h", "transpose16(v);\n", "",
    ),
    "zeros of a dilated segment are not attended": (
        "dilated_attention", "avx512-emulated", "attention/forward.h",
        "zeros > 0)", "zeros > 0 && tiling_.chunks == 0)",
    ),
    "branches overwrite each other's gradients": (
        "dilated_attention", "amx-emulated", "attention/dilated_map.h",
        "load_partial(to.data, n) + v", "v",
    ),
    "a row of the grid that a chunk cuts starts at its first column": (
        "attention_forward", "amx-emulated", "attention/structured_bias.h",
        "load_base2(w + first, run, columns)", "load_base2(w, run, columns)",
    ),
    "a token without a place poisons its row": (
        "attention_forward", "avx512-emulated", "attention/structured_bias.h",
        "max(fma(dx, dx, dy * dy), f32v{})", "fma(dx, dx, dy * dy)",
    ),
    "the gradient of rel_w forgets the end of a row of the grid": (
        "attention_backward", "amx-emulated", "attention/structured_bias.h",
        "to[c] += ds[c];", "",
    ),
    "the gradient of a slope has the wrong sign": (
        "attention_backward", "avx512-emulated", "attention/structured_bias.h",
        "sums[i] -= reduce_add(sum)", "sums[i] += reduce_add(sum)",
    ),
    "every region of a shifted window has the mask of the first": (
        "window_attention", "avx512-emulated", "attention/window_map.h",
        "mask_ + region * mask_stride_", "mask_",
    ),
    "a row of the table's gradient replaces the one before": (
        "window_attention", "amx-emulated", "attention/window_term.h",
        "load(to + j) + load(ds + j)", "load(ds + j)",
    ),
    "deviations are taken from half the mean": (
        "group_norm_silu", "avx512-emulated", "norm/statistics.h", "const f32v m = splat(mean);",
        "const f32v m = splat(mean / 2);",
    ),
    "the gradient forgets its projection on xhat": (
        "group_norm_silu", "avx512-emulated", "norm/group_norm_backward.h", "slope = -rstd * g2",
        "slope = -rstd * 0 * g2",
    ),
    "the slope of erf ends where its value does": (
        "gated_activation", "avx512-emulated", "norm/gate.h",
        "NormalLogit<T>::kSlope, s", "NormalLogit<T>::kValue, s",
    ),
    "a gradient of the gate forgets the value": (
        "gated_activation", "avx512-emulated", "gated_activation_kernel.cpp",
        "z = dz * v;", "z = dz;",
    ),
    "turning back turns on": (
        "rope_2d", "avx512-emulated", "rope_2d_kernel.cpp",
        "kInverse ? swap_pairs(v * s) : swap_pairs(v) * s", "swap_pairs(v) * s",
    ),
    "the prefix shifts the angles": (
        "rope_2d", "avx512-emulated", "rope_2d_kernel.cpp", "(n - p.prefix) * table",
        "n * table",
    ),
    "split pairs are not put back in order": (
        "layer_norm_modulate", "avx512-emulated", "layer_norm_modulate_kernel.cpp",
        "join_pairs(sums.dz_xhat, n);\n", "",
    ),
    "a block of rows has the statistics of its first": (
        "layer_norm_modulate", "avx512-emulated", "norm/rows.h",
        "m[r] = splat(mean[r])", "m[r] = splat(mean[0])",
    ),
    "gates of the first segment serve all": (
        "gated_residual", "avx512-emulated", "gated_residual_kernel.cpp",
        "if (segment != prepared)", "if (prepared < 0)",
    ),
    "pixels beyond a padded image are black instead of the mean": (
        "patch_embed", "amx-emulated", "patch/pixels.h", "kBytes ? p.padding[k + i] : 0.f",
        "kBytes ? -p.centre[k + i] : 0.f",
    ),
    "neighbouring patches are all the first": (
        "patch_embed", "avx512-emulated", "patch/pixels.h", "load(from + i * p.run)", "load(from)",
    ),
    "later tokens replace the weight's gradient of earlier ones": (
        "patch_embed", "avx512-emulated", "patch_embed_bwd_kernel.cpp",
        "stride, m == begin)", "stride, true)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_drivers_notice_broken_kernels(tmp_path, mutant):
    kernel, variant, header, text, replacement = MUTANTS[mutant]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / "cpu" / header
    source = path.read_text()
    assert text in source, f"{header} no longer has {text!r}: choose another mutant"
    path.write_text(source.replace(text, replacement))
    done = run(compile_driver(tmp_path / "driver", kernel, variant, csrc))
    assert done.returncode != 0, f"the driver passes although {mutant}"
