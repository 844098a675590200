"""The drivers of the CPU kernels notice broken kernels."""

from __future__ import annotations

import shutil

import pytest
from native_drivers import ROOT, compile_driver, run

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
    driver = compile_driver(tmp_path / "driver", kernel, variant, csrc, optimize="-O0")
    done = run(driver, "--first-failure")
    assert done.returncode != 0, f"the driver passes although {mutant}"
