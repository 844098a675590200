"""The drivers of the CPU kernels notice broken kernels."""

from __future__ import annotations

import pytest
from native_drivers import compile_driver, copied, run

# Builds, and the dtype whose kernels are compiled and tried.
TILES = ("amx-emulated", "bf16")
LANES = ("avx512-emulated", "f32")
SPLIT = ("avx512-emulated", "bf16")  # rows of pairs
# What is broken -> (kernel, build, header, text, replacement).
MUTANTS = {
    "last key of a ragged row is forgotten": (
        "attention_forward", LANES, "attention/softmax.h", "keep_lanes(p, n - j, 0.f)",
        "keep_lanes(p, n - j - 1, 0.f)",
    ),
    "output is not rescaled between chunks": (
        "attention_forward", TILES, "attention/forward_amx.h",
        "load(row + t * kTileSums) * factor", "load(row + t * kTileSums)",
    ),
    "delta ignores the gradient of lse": (
        "attention_backward", LANES, "attention/backward.h",
        "reduce_add(sum) - map.grad_lse(i)", "reduce_add(sum)",
    ),
    "every block keeps its rows where the first does": (
        "attention_backward", LANES, "attention/backward_float32.h",
        "kept_.from(b.q0, row_stride_)", "kept_.from(0, row_stride_)",
    ),
    "rows kept for another problem are taken": (
        "attention_backward", LANES, "attention/backward_float32.h",
        "size_t(n) * sizeof(float));\n  }\n  void clear_keys", "0);\n  }\n  void clear_keys",
    ),
    "diagonal attends one key too many": (
        "attention_backward", TILES, "attention/backward.h",
        "b.q0 + r + 1 - b.k0", "b.q0 + r + 2 - b.k0",
    ),
    "sums of dK and dV are stored unturned": (
        "attention_backward", TILES, "attention/backward_amx.h", "transpose16(v);\n", "",
    ),
    "zeros of a dilated segment are not attended": (
        "dilated_attention", LANES, "attention/forward.h",
        "zeros > 0)", "zeros > 0 && tiling_.chunks == 0)",
    ),
    "branches overwrite each other's gradients": (
        "dilated_attention", LANES, "attention/dilated_map.h",
        "load_partial(to.data, n) + v", "v",
    ),
    "a row of the grid that a chunk cuts starts at its first column": (
        "attention_forward", TILES, "attention/structured_bias.h",
        "load_base2(w + first, run, columns)", "load_base2(w, run, columns)",
    ),
    "a token without a place poisons its row": (
        "attention_forward", LANES, "attention/structured_bias.h",
        "max(fma(dx, dx, dy * dy), f32v{})", "fma(dx, dx, dy * dy)",
    ),
    "the gradient of rel_w forgets the end of a row of the grid": (
        "attention_backward", TILES, "attention/structured_bias.h",
        "to[c] += ds[c];", "",
    ),
    "the gradient of a slope has the wrong sign": (
        "attention_backward", LANES, "attention/structured_bias.h",
        "sums[i] -= reduce_add(sum)", "sums[i] += reduce_add(sum)",
    ),
    "every region of a shifted window has the mask of the first": (
        "window_attention", LANES, "attention/window_map.h",
        "mask_ + region * mask_stride_", "mask_",
    ),
    "a row of the table's gradient replaces the one before": (
        "window_attention", LANES, "attention/window_term.h",
        "load(to + j) + load(ds + j)", "load(ds + j)",
    ),
    "deviations are taken from half the mean": (
        "group_norm_silu", LANES, "norm/statistics.h", "const f32v m = splat(mean);",
        "const f32v m = splat(mean / 2);",
    ),
    "the gradient forgets its projection on xhat": (
        "group_norm_silu", LANES, "norm/group_norm_backward.h", "slope = -rstd * g2",
        "slope = -rstd * 0 * g2",
    ),
    "the slope of erf ends where its value does": (
        "gated_activation", LANES, "norm/gate.h",
        "NormalLogit<T>::kSlope, s", "NormalLogit<T>::kValue, s",
    ),
    "a gradient of the gate forgets the value": (
        "gated_activation", LANES, "gated_activation_kernel.cpp",
        "z = dz * v;", "z = dz;",
    ),
    "the last odd row is read with the one behind it": (
        "linear", LANES, "linear_kernel.cpp", "pack_rows<T>(at, row + last, rows - last,",
        "pack_rows<T>(at, row + last, rows - last - 1,",
    ),
    "columns of every panel get the bias of the first": (
        "linear", LANES, "linear_kernel.cpp", "load(p.bias + column + v * kLanes)",
        "load(p.bias + v * kLanes)",
    ),
    "the last tile of an image reads what is beside it": (
        "conv3x3", LANES, "conv3x3_kernel.cpp", "y < p.height && x < p.width;", "y < p.height;",
    ),
    "a tap of the weight has the wrong sign": (
        "conv3x3", LANES, "conv3x3_kernel.cpp", "rows[2][j] = ends - middle",
        "rows[2][j] = ends + middle",
    ),
    "samples of a block share the tiles of the first": (
        "conv3x3", LANES, "conv3x3_kernel.cpp", "s.inputs + n * per_sample * s.stride", "s.inputs",
    ),
    "turning back turns on": (
        "rope_2d", LANES, "rope_2d_kernel.cpp",
        "kInverse ? swap_pairs(v * s) : swap_pairs(v) * s", "swap_pairs(v) * s",
    ),
    "the prefix shifts the angles": (
        "rope_2d", LANES, "rope_2d_kernel.cpp", "(n - p.prefix) * table",
        "n * table",
    ),
    "split pairs are not put back in order": (
        "layer_norm_modulate", SPLIT, "layer_norm_modulate_kernel.cpp",
        "join_pairs(sums.dz_xhat, n);\n", "",
    ),
    "a block of rows has the statistics of its first": (
        "layer_norm_modulate", LANES, "norm/rows.h",
        "m[r] = splat(mean[r])", "m[r] = splat(mean[0])",
    ),
    "gates of the first segment serve all": (
        "gated_residual", LANES, "gated_residual_kernel.cpp",
        "if (segment != prepared)", "if (prepared < 0)",
    ),
    "pixels beyond a padded image are black instead of the mean": (
        "patch_embed", TILES, "patch/pixels.h", "kBytes ? p.padding[k + i] : 0.f",
        "kBytes ? -p.centre[k + i] : 0.f",
    ),
    "neighbouring patches are all the first": (
        "patch_embed", LANES, "patch/pixels.h", "load(from + i * p.run)", "load(from)",
    ),
    "later tokens replace the weight's gradient of earlier ones": (
        "patch_embed", LANES, "patch_embed_bwd_kernel.cpp",
        "stride, m == begin)", "stride, true)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_drivers_notice_broken_kernels(tmp_path, mutant):
    kernel, (variant, dtype), header, text, replacement = MUTANTS[mutant]
    csrc = copied(tmp_path, dtype)
    path = csrc / "cpu" / header
    source = path.read_text()
    assert text in source, f"{header} no longer has {text!r}: choose another mutant"
    path.write_text(source.replace(text, replacement))
    driver = compile_driver(tmp_path / "driver", kernel, variant, csrc, optimize="-O0")
    done = run(driver, "--first-failure", f"{dtype}/")
    assert "FAILED" in done.stdout, f"the driver passes although {mutant}"
