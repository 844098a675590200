"""Faults that the emulated tests must catch, in one table: ``python tests/mutants.py`` (make
mutants) puts each into the CUDA kernels, alone, and says what caught it.

``make test`` runs the ones marked ``always``; the rest is for whoever changes a kernel or its
tests. A fault that changes no number but breaks an order (a barrier) counts, too: the emulator runs
threads in random orders, and the sanitized programs find what stays right by luck. Beside the table
every barrier of a kernel header is removed, one at a time.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"


@dataclass(frozen=True)
class Driver:
    """Who tries the faults of some kernels: the test module with a function ``check``, the headers
    that only it exercises, and the program of emulation.PROGRAMS for what the check lets pass."""

    module: str
    headers: tuple[str, ...] = ()
    program: str = ""
    check: str = "catch"

    def catch(self, csrc: Path) -> None:
        """Raises AssertionError if the kernels in ``csrc`` are broken."""
        getattr(importlib.import_module(self.module), self.check)(csrc)


DRIVERS = {
    "primitives": Driver("test_emulated_primitives"),
    "group_norm_silu": Driver("test_emulated_group_norm", ("cuda/group_norm_silu.cuh",)),
    "layer_norm_modulate": Driver(
        "test_emulated_layer_norm", ("cuda/layer_norm_modulate.cuh",), "sanitized_rows"
    ),
    "patch_embed": Driver(
        "test_emulated_patch_embed",
        ("cuda/patch_embed.cuh", "cuda/patch_embed_bwd.cuh"),
        "sanitized_rows",
    ),
    "patch_embed_packed": Driver(
        "test_emulated_patch_embed_packed", ("cuda/patch_places.cuh",), "sanitized_rows"
    ),
    "gated_residual": Driver(
        "test_emulated_gated_residual", ("cuda/gated_residual.cuh",), "sanitized_tiles"
    ),
    "gated_activation": Driver("test_emulated_gated_activation", (), "sanitized_tiles"),
    "rope_2d": Driver("test_emulated_rope_2d", (), "sanitized_tiles"),
    "flash_attention": Driver(
        "test_emulated_attention",
        (
            "attention/mainloop.cuh",
            "attention/forward.cuh",
            "attention/backward.cuh",
            "attention/bias_gradient.cuh",
        ),
        "sanitized_attention",
    ),
    "hopper_attention": Driver(
        "test_emulated_hopper_attention", ("attention/hopper_forward.cuh",), "sanitized_hopper"
    ),
    "hopper_panels": Driver("test_emulated_hopper_attention", check="catch_panels"),
    "structured_bias": Driver(
        "test_emulated_structured_bias", ("attention/structured_bias.cuh",), "sanitized_maps"
    ),
    "window_attention": Driver("test_emulated_window_attention", (), "sanitized_maps"),
    "dilated_attention": Driver("test_emulated_dilated_attention", (), "sanitized_maps"),
}
BARRIERS = ("__syncthreads();", "__syncwarp();")
NOT_TRIED = 3  # exit status


@dataclass(frozen=True)
class Mutant:
    """``old``, which stands in one place of csrc, becomes ``new``. With ``header``, its ``nth``
    occurrence there."""

    name: str
    old: str
    new: str
    always: bool = False
    header: str = ""
    nth: int = 0


def _m(name: str, old: str, new: str, always: bool = False) -> Mutant:
    return Mutant(name, old, new, always)


TABLE: dict[str, list[Mutant]] = {
    "primitives": [
        _m(
            "rows_of_two_chunks_collide",
            "(chunk ^ (row / (8 / kSpan) % kSpan))",
            "(chunk ^ (row % kSpan))",
        ),
        _m("pairs_of_rows_collide", "const int mixed = (row ^ (row >> 2 & 1)) & 3;",
           "const int mixed = 0;"),
    ],
    "group_norm_silu": [
        _m(
            "missing_barrier_before_reading_sums",
            "  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;\n"
            "  __syncthreads();",
            "  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;",
            True,
        ),
        _m(
            "barrier_in_half_a_block",
            "  v = warp_sum(v);\n  __syncthreads();",
            "  v = warp_sum(v);\n  if (threadIdx.x < 128) __syncthreads();",
            True,
        ),
        _m(
            "shuffle_by_half_a_warp",
            "    v += __shfl_xor_sync(0xffffffffu, v, offset);",
            "    if (threadIdx.x % 2) v += __shfl_xor_sync(0xffffffffu, v, offset);",
        ),
        _m("sums_overwritten_while_others_read", "  v = warp_sum(v);\n  __syncthreads();",
           "  v = warp_sum(v);"),
        _m("moments_read_before_they_are_written",
           "of_warp[threadIdx.x / kWarp] = m;\n  __syncthreads();",
           "of_warp[threadIdx.x / kWarp] = m;"),
        _m("wrong_channel_of_a_column", "p.group_sums + p.group_of(at.n, at.c + k) * 2",
           "p.group_sums + p.group_of(at.n, at.c) * 2", True),
        _m("positions_of_the_first_warp",
           "(first + threadIdx.x / kWarp) * p.channels", "first * p.channels"),
        _m("columns_behind_the_last", "end = c < p.channels ? start + part_end(p, part) * "
           "p.channels : begin;", "end = start + part_end(p, part) * p.channels;"),
        _m("merge_forgets_the_cross_term", "m2 += other.m2 + delta * delta * count * share;",
           "m2 += other.m2;", True),
        _m("statistics_without_add", "in[0] + p.add.at(group.n, c, 0.f)", "in[0]"),
        _m("slope_of_the_sigmoid_alone", "s * (1.f + z * (1.f - s))", "s * (1.f - s)"),
        _m("part_of_a_row_twice", "end = start + part_end(p, part);", "end = start + p.positions;"),
        _m("last_part_behind_the_end", "min((part + 1) * p.part_length, p.positions)",
           "(part + 1) * p.part_length"),
        _m("count_of_a_whole_part", "float(part_end(p, part) - part * p.part_length)",
           "float(p.part_length)"),
        _m("mean_of_the_gradient_forgotten", "(sums[0] + channel.centre * sums[1])",
           "(channel.centre * sums[1])"),
        _m("add_gradient_without_the_mean", "positions * mean_g1 - s[2] * mean_g2",
           "s[2] * mean_g2"),
        _m("weight_gradient_without_scale", "weight += factor * s[1];", "weight += s[1];"),
    ],
    "layer_norm_modulate": [
        _m("sum_of_half_the_lanes", "int offset = kLanes / 2; offset > 0",
           "int offset = kLanes / 2; offset > 1"),
        _m(
            "sums_read_before_they_are_written",
            "of_warp[threadIdx.x / kWarp][i] = v[i];\n    __syncthreads();",
            "of_warp[threadIdx.x / kWarp][i] = v[i];",
            True,
        ),
        _m(
            "sums_overwritten_while_read",
            "    __syncthreads();  // readers of the previous call are done\n"
            "    if (threadIdx.x % kWarp == 0)\n      for",
            "    if (threadIdx.x % kWarp == 0)\n      for",
        ),
        _m("modulation_of_the_first_segment", "modulation = s.per_token ? row : segment;",
           "modulation = s.per_token ? row : 0;"),
        _m("gain_without_scale", "gain[i][k] *= 1.f + scale[k];", "gain[i][k] *= 1.f;"),
        _m("parts_overlap", "min((part + 1) * p.part_rows, s.rows)", "s.rows"),
        _m("mean_of_the_gradient_forgotten", "(c[0] + xhat[i][k] * c[1])", "(xhat[i][k] * c[1])"),
        _m(
            "rows_of_a_block_not_waited_for",
            "  if constexpr (kRows > 1) {\n    __syncthreads();",
            "  if constexpr (kRows > 1) {"),
        _m("first_row_of_a_block_only", "for (int g = 1; g < kRows; ++g)",
           "for (int g = 1; g < 1; ++g)"),
        _m("rows_behind_the_end", "first + group < end ? s.width : 0", "s.width"),
        _m(
            "columns_not_waited_for",
            "= total;\n  __syncthreads();\n  if (threadIdx.x < kWarp)",
            "= total;\n  if (threadIdx.x < kWarp)",
            True,
        ),
        _m("every_ninth_part", "i += kColumnThreads / kWarp) total",
           "i += kColumnThreads / kWarp + 1) total"),
        _m("weight_gradient_without_scale", "return Pair{factor * at[0], factor * at[s.width]};",
           "return Pair{at[0], at[s.width]};"),
        _m("scale_gradient_without_bias",
           "* sum.second + s.bias.at(0, column, 0.f) * sum.first);", "* sum.second);"),
        _m("token_scale_gradient_without_bias", "(xhat[i][k] * gain[i][k] + bias[k])",
           "(xhat[i][k] * gain[i][k])"),
    ],
    "patch_embed": [
        _m("rows_of_the_first_frame_only", "n / g.grid_columns % g.grid_rows * g.patch_rows",
           "n / g.grid_columns * g.patch_rows"),
        _m("pixels_beyond_the_image", " && u.column < t.columns", ""),
        _m("padding_is_black", ": columns.padding[column]", ": 0.f - columns.centre[column]"),
        _m("padding_of_centred_bytes_is_zero", ": columns.padding[column]", ": 0.f"),
        _m("centre_of_the_first_channel", "p.bytes[at.channel]", "p.bytes[0]"),
        _m("offsets_of_bytes_forgotten", "shift += value * p.tables[3 * channels + at.channel];",
           ""),
        _m("channels_in_the_order_of_planes", "to_float(weight[at.of_weight(p.g)])",
           "to_float(weight[k])"),
        _m("weights_of_other_rows", "M::load_rows(weights(stage), n, k)",
           "M::load_rows(weights(stage), n ^ 8, k)"),
        _m("gradients_of_other_rows", "k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2",
           "k + lane / 8 % 2 * 8 + lane % 8, row / 8 + lane / 16", True),
        _m("indices_of_the_step_before", "    prepare(step + kStages);\n", ""),
        _m(
            "copies_waited_for_too_late",
            "ptx::copy_wait<kStages - 2>();\n    __syncthreads();\n    load(step",
            "ptx::copy_wait<kStages - 1>();\n    __syncthreads();\n    load(step",
            True,
        ),
        _m("positions_of_the_prefix", "p.position_first + m % p.images.g.patches",
           "m % p.images.g.patches"),
        _m("prefix_without_positions", "p.position_first ? p.position.at(row, column, 0.f) : 0.f",
           "0.f"),
        _m("norm_over_the_whole_tile", "squares += column + i < p.embed ? z[i] * z[i] : 0.f;",
           "squares += z[i] * z[i];"),
        _m("norm_gradient_without_xhat", "(z[e] - mean) * rstd * c2", "0.f * c2"),
        _m("one_split_of_the_tokens", "for (int s = 0; s < p.splits; ++s) sum",
           "for (int s = 0; s < 1; ++s) sum"),
        _m("bias_gradient_of_the_last_token", "dbias += to_float(*grads(stage)",
           "dbias = to_float(*grads(stage)"),
        _m("offset_missing_in_the_gradient", "p.tables[3 * channels + at.channel] * dbias", "0.f"),
        _m("gradient_of_positions_from_the_first_row",
           "p.dposition.store(i - int64_t(p.first) * p.embed, sum)", "p.dposition.store(i, sum)"),
    ],
    "patch_embed_packed": [
        _m("broken_places_do_not_show", "row < 0 ? NAN : z[i] + position[i]", "z[i] + position[i]"),
        _m("pixels_before_the_first", "broken = !within(t.origin, p.pixels) || ", "broken = ",
           True),
        _m("one_pixel_behind_the_last", "+ columns > p.pixels;", "+ columns > p.pixels + 1;"),
        _m("strides_that_overflow", "!within(t.channel, p.pixels)", "false"),
        _m("positions_behind_the_last", " || at[kPositionRow] >= p.position_rows", ""),
        _m("sizes_beyond_the_patch", "min(at[kColumns], int64_t(p.g.patch_columns))",
           "at[kColumns]"),
        _m("whole_patches_only", "t.columns = uint16_t(columns);",
           "t.columns = uint16_t(p.g.patch_columns);"),
        _m("strides_of_the_geometry", "tokens ? at + u.channel * t.channel + u.row * t.row : at",
           "at"),
        _m("rows_by_the_stride_of_channels", "u.row * t.row : at", "u.row * t.channel : at"),
        _m("unit_without_the_stride_of_rows", "t.origin | t.channel | t.row | t.columns",
           "t.origin | t.channel | t.columns"),
        _m("unit_without_the_last_columns", "t.origin | t.channel | t.row | t.columns",
           "t.origin | t.channel | t.row"),
        _m("unit_of_the_first_tile", "least = min(least, units[i]);",
           "least = min(least, units[0]);"),
        _m("unit_of_the_first_warp", "for (const int of_warp : units) unit = min(unit, of_warp);",
           ""),
        _m("unit_of_one_lane", "    least = min(least, __shfl_xor_sync(0xffffffffu, least, offset"
           "));\n", "      ;\n"),
        _m("positions_of_the_first_tokens", "p.positions ? p.positions[m]",
           "p.positions ? p.positions[m % 2]"),
        _m("tokens_of_a_position_in_one_slot", " || (positions[j] == position && j < i)", ""),
        _m("tiles_of_the_first_round", "const int tile = (first + i) * kTokensOfUnit;",
           "const int tile = i * kTokensOfUnit;"),
        _m("lists_of_warps_collide", "if (w < int(threadIdx.x) / kWarp) sum += of_warp[w];", ""),
        _m("columns_of_the_first_block", "int(blockIdx.x) % p.column_blocks() * kThreads + i", "i"),
        _m("tokens_of_the_next_position", "lower_bound(p.by_position, begin, end, row + 1)",
           "lower_bound(p.by_position, begin, end, row + 2)"),
    ],
    "gated_residual": [
        _m("gate_of_the_first_segment", "s.per_token ? row : at.segment, column, 1.f",
           "s.per_token ? row : 0, column, 1.f"),
        _m("gradient_by_the_first_gate", "s.gate.load(gate, segment, column, 1.f);",
           "s.gate.load(gate, 0, column, 1.f);"),
        _m("token_gradient_by_the_first_gate", "if (s.per_token) s.gate.load(gate, row, column",
           "if (s.per_token) s.gate.load(gate, 0, column"),
        _m("parts_overlap", "min(s.rows, (part + 1) * p.part_rows)", "s.rows"),
        _m("rows_of_a_block_twice", "r < end; r += groups", "r < end; r += (groups + 1) / 2"),
        _m(
            "rows_of_a_block_not_waited_for",
            "= sum[k];\n  __syncthreads();",
            "= sum[k];",
            True,
        ),
        _m("first_row_of_a_block_only", "for (int g = 1; g < groups; ++g)",
           "for (int g = 1; g < 1; ++g)"),
        _m("columns_behind_the_last", "min(lanes * kPack, s.width - first)", "lanes * kPack"),
        _m("gradient_of_the_output_alone", "dgate[k] = grad.get(k) * y.get(k);",
           "dgate[k] = grad.get(k);"),
        _m("sums_of_even_columns_only", "Pair{at[0], both ? at[1] : 0.f}", "Pair{at[0], 0.f}"),
        _m("sum_behind_the_last_column", "if (both) p.dgate.store", "p.dgate.store"),
        _m("packs_of_unaligned_rows", "bool fit = s.gate.takes_packs() && int64_t(s.width)",
           "bool fit = s.gate.takes_packs() || int64_t(s.width)"),
    ],
    "gated_activation": [
        _m("row_of_the_first_block", "int64_t(of_rows % row_blocks) * (kTileThreads >> shift)",
           "0 * (kTileThreads >> shift)"),
        _m("units_of_the_first_block", "int64_t(block % unit_blocks) << shift | ", ""),
        _m("units_behind_the_row", "row < rows && unit < units};", "row < rows};"),
        _m("tail_as_a_whole_pack", "if (count >= kPack) return v.store(p);", "return v.store(p);"),
        _m("tail_left_out", "if (k < count) p[k] = v.element[k];",
           "if (k < 0) p[k] = v.element[k];", True),
        _m("coefficient_skipped", "polynomial<kC, kFrom + 1>(s, factor), s, c * factor",
           "polynomial<kC, kLast>(s, factor), s, c * factor"),
        _m("slope_by_the_values", "polynomial<Fit::kSlope>", "polynomial<Fit::kValue>"),
        _m("slope_of_the_sigmoid_alone", "fmaf(x_ * weight, e_ * whole_ * g, weight)",
           "x_ * weight * e_ * whole_ * g"),
        _m("fit_beyond_its_end", "x_ = z < -end ? -end : z > end ? end : z;", "x_ = z;"),
        _m("nan_becomes_a_number", "x_ = z < -end ? -end : z > end ? end : z;",
           "x_ = fmaxf(-end, fminf(end, z));"),
        _m("weight_never_zero", "weight = z < -end ? 0.f : whole_;", "weight = whole_;"),
        _m("gate_gradient_without_value", "dz *= value.get(k);", ""),
        _m("value_gradient_without_gate", "dvalue.set(k, grad.get(k) * (g.z * g.weight));",
           "dvalue.set(k, grad.get(k) * g.weight);"),
        _m("rows_with_gaps_joined", "r->data == nullptr || r->stride == columns", "true"),
        _m("packs_of_unaligned_rows", "(rows == 1 || r->stride * bytes % 16 == 0)", "true"),
        _m("packs_of_unaligned_halves", "packs = packs && aligned(r->data) && ",
           "packs = packs && "),
    ],
    "rope_2d": [
        _m("prefix_turned", "turned = n >= p.prefix", "turned = true"),
        _m("angles_from_the_first_token", "(n - p.prefix) * t.token_stride", "n * t.token_stride"),
        _m("angles_of_the_first_sample", "t.data + b * t.batch_stride", "t.data"),
        _m("angles_of_the_first_head", "if (i == 0 || !shared) angles", "if (i == 0) angles", True),
        _m("never_turned_back", "if (!p.inverse) return;", "return;"),
        _m("turned_back_by_one_sign", "sin[1][i] = -first;", "sin[1][i] = first;"),
        _m("second_half_by_the_first_angles", "c[k] * angles.cos[1][k]", "c[k] * angles.cos[0][k]"),
        _m("heads_side_by_side", "const int h = i * t.steps + step;",
           "const int h = i + step * t.steps;"),
        _m("heads_behind_the_last", "if (h >= t.heads) break;", ""),
        _m("keys_as_queries", "const Heads& t = is_k ? p.k : p.q;", "const Heads& t = p.q;"),
        _m("blocks_of_keys_from_the_first", "is_k ? blockIdx.x - of_q : blockIdx.x", "blockIdx.x"),
        _m("pairs_of_the_wrong_half", "load(row + half + j + i)", "load(row + j + i)"),
        _m("packs_of_unaligned_heads", "fit = fit && stride * bytes % 16 == 0;", ""),
        _m("packs_of_half_a_pack", "(interleaved ? p.head_dim : p.head_dim / 2)", "(p.head_dim)"),
    ],
    "flash_attention": [
        _m("queries_of_the_wrong_half", "t.address(row + lane % 16, k / 8 + lane / 16)",
           "t.address(row + lane % 16, k / 8 + lane / 8 % 2)", True),
        _m("values_not_transposed", "ptx::load_matrices_transposed(r, t",
           "ptx::load_matrices(r, t"),
        _m("keys_of_the_wrong_half", "n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2",
           "n + lane / 8 % 2 * 8 + lane % 8, k / 8 + lane / 16"),
        _m("tail_not_masked", "key >= n_k || ", "", True),
        _m("causal_off_by_one", "key >= n_k || (p.causal && key >",
           "key >= n_k || (p.causal && key >="),
        _m("maximum_of_half_a_row", "top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));", "",
           True),
        _m("sum_of_half_a_row", "sum += __shfl_xor_sync(0xffffffffu, sum, 1);", ""),
        _m("outputs_not_rescaled", "out[n][half * 2 + 1] *= keep;", ""),
        _m(
            "copy_waited_for_too_late",
            "ptx::copy_wait<kStages - 2>();\n    __syncthreads();\n"
            "    load_step(step + kStages - 1);\n    if (step == 0) {",
            "ptx::copy_wait<kStages - 1>();\n    __syncthreads();\n"
            "    load_step(step + kStages - 1);\n    if (step == 0) {",
            True,
        ),
        _m("delta_forgotten", "(dp[n][i] - statistics.delta)", "dp[n][i]", True),
        _m("delta_without_lse", "sum -= p.grad_lse[", "sum -= 0.f * p.grad_lse["),
        _m("gradient_of_the_wrong_operand", "multiply_columns<false>(dk, dp, queries(stage)",
           "multiply_columns<false>(dk, dp, grads(stage)"),
        _m("keys_of_the_gradient_not_masked", "key < span.n_k && !(p.causal && key > query)",
           "!(p.causal && key > query)"),
        _m("causal_gradient_off_by_one", "key < span.n_k && !(p.causal && key > query)",
           "key < span.n_k && !(p.causal && key >= query)"),
        _m("gradient_not_scaled", "d[n][i] *= all * kLn2;", "d[n][i] *= all;"),
        _m("bias_gradient_of_one_chunk", "copy < end; ++copy", "copy < first + 1; ++copy"),
    ],
    "hopper_attention": [
        _m("wrong_phase_of_the_keys", "memory.full(step % kStages, 0), step / kStages % 2",
           "memory.full(step % kStages, 0), step / kStages % 2 ^ 1", True),
        _m("phase_of_another_round", "memory.full(step % kStages, 1), step / kStages % 2",
           "memory.full(step % kStages, 1), step % 2"),
        _m("memory_refilled_while_read", "round % 2 ^ 1);", "round % 2);"),
        _m("scores_not_waited_for", "begin_outputs(step - 1);\n      ptx::product_wait<1>();",
           "begin_outputs(step - 1);\n      ptx::product_wait<2>();", True),
        _m("outputs_not_waited_for",
           "begin_outputs(mine - 1);\n      ptx::product_wait<0>();",
           "begin_outputs(mine - 1);\n      ptx::product_wait<1>();"),
        _m("scores_without_fence",
           "step / kStages % 2);\n    ptx::product_fence();\n#pragma unroll\n"
           "    for (int i = 0; i < kHeadDim / 16; ++i) {",
           "step / kStages % 2);\n#pragma unroll\n"
           "    for (int i = 0; i < kHeadDim / 16; ++i) {", True),
        _m("barriers_not_shown_to_copies", "ptx::phase_init_done();", ";"),
        _m("wrong_swizzle", "kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3",
           "kRowBytes == 128 ? 2 : kRowBytes == 64 ? 1 : 3", True),
        _m("eight_rows_of_another_width", "uint64_t(8 * kRowBytes >> 4) << 32",
           "uint64_t(4 * kRowBytes >> 4) << 32"),
        _m("columns_of_the_first_products", "q + panel * Memory::kQueryPanel + at",
           "q + panel * Memory::kQueryPanel"),
        _m("values_of_the_first_rows", "v + i * 16 * kRowBytes", "v"),
        _m("keys_released_before_they_are_read",
           "begin_scores(step);\n      begin_outputs(step - 1);",
           "begin_scores(step);\n      release(step, 0);\n      begin_outputs(step - 1);"),
        _m("keys_never_released", "release(step, 0);\n      weigh(step", "weigh(step"),
        _m("values_released_with_the_keys", "release(step, 0);\n      weigh(step, fold, keep);",
           "release(step, 0);\n      release(step - 1, 1);\n      weigh(step, fold, keep);"),
        _m("fewer_bytes_expected", "ptx::phase_arrive_expecting(full, Memory::kKeyBytes);",
           "ptx::phase_arrive_expecting(full, Memory::kKeyBytes / 2);", True),
        _m("queries_of_the_first_warpgroup", "span.first + c * 64, head, batch",
           "span.first, head, batch"),
        _m("arrivals_of_both_warpgroups", "memory.empty(stage, which), consumers * 4",
           "memory.empty(stage, which), 8"),
        _m("tail_of_keys_attended", "n_k <= key || (p.causal", "(p.causal"),
        _m("causal_by_the_first_row", "row + i / 2 * 8 < key", "row < key"),
        _m("outputs_keep_the_old_maximum", "softmax.rescale(out[0], half, keep[half]);",
           "softmax.rescale(out[0], half, 1.f);"),
    ],
    # Rows in two panels: outputs lie where other warps' queries do.
    "hopper_panels": [
        _m("queries_overwritten_while_read",
           "ptx::warpgroup_barrier(1 + consumer);\n    store_rows", "store_rows"),
    ],
    "structured_bias": [
        _m("column_of_another_key", "at - width.divide(at) * width.value", "key % width.value",
           True),
        _m("columns_of_the_grid_added_at_once", "if (r == round && key < keys)",
           "if (r == 0 && key < keys)"),
        _m("row_of_the_grid_not_left", "to[ih++] += run;", "to[ih] += run;"),
        _m("sums_of_the_first_warp", "term.sums + (block * warps + warp) * 16 * lines",
           "term.sums + block * warps * 16 * lines"),
        _m("distance_of_one_axis", "dx * dx + dy * dy", "dx * dx"),
    ],
    "window_attention": [
        _m("shift_not_masked", "apart && rows[half].region != other.region", "false"),
        _m("mask_off_by_one", "(span.x + ix >= limit_x)", "(span.x + ix > limit_x)", True),
        _m("table_of_the_opposite_pair", "kTransposed ? -distance : distance", "distance"),
        _m("roll_after_the_padding", "if (roll_first) return", "if (false) return"),
        _m("pads_not_attended", "source.pad = map.template pad<T>(span, part);", ""),
        _m("gradient_along_the_row", "-= share * pair(half, n).get(i);", "-= 0.f * share;", True),
        _m("norms_of_other_columns", "n * 8 % kWarp + lane_id() % 4 * 2 + i", "n * 8 % kWarp + i"),
        _m("gain_bound_ignored", "constant ? 0.f : sum", "sum"),
        _m("diagonals_of_one_copy", "copy < p.copies; ++copy", "copy < 1; ++copy"),
    ],
    "dilated_attention": [
        _m("zeros_not_attended", "(causal ? i + 1 : s.slots) - s.n_k", "0", True),
        _m("phase_of_the_first_head", "            start + phase,", "            start,"),
        _m("results_where_the_slots_are", "? s.out_token + int64_t(i) * s.ratio", "? query(s, i)"),
        _m("weights_of_equal_branches", "weight = ptx::exp2_approx(z - top)", "weight = 1.f"),
        _m("branches_overwrite_each_other", "++i, p.map.adds = true)", "++i)", True),
        _m("results_of_the_first_segment", "first_row + int64_t(segment) * slots + slot",
           "first_row + slot"),
        _m("slots_read_behind_the_last_token", "const { return min(s.n_q, s.n_k); }",
           "const { return s.slots; }"),
    ],
}  # fmt: skip

# Faults that need not change a number, for the sanitized program of attention: what it says.
SILENT: list[tuple[str, str, Mutant]] = [
    (
        "thread",
        "data race",
        _m(
            "missing_barrier",
            "    __syncthreads();\n    load_step(step + kStages - 1);\n    if (step == 0) {",
            "    load_step(step + kStages - 1);\n    if (step == 0) {",
            True,
        ),
    ),
    (
        "address",
        "heap-buffer-overflow",
        _m("rows_read_behind_the_end", "bool exists = first + row < n && ", "bool exists = ", True),
    ),
]


def barriers(driver: str) -> Iterator[Mutant]:
    """One mutant for every barrier of the headers that only this driver exercises."""
    for header in DRIVERS[driver].headers:
        text = (CSRC / header).read_text()
        for barrier in BARRIERS:
            for nth in range(text.count(barrier)):
                position = -1
                for _ in range(nth + 1):
                    position = text.index(barrier, position + 1)
                line = text.count("\n", 0, position) + 1
                name = f"no {barrier.rstrip('();')} in {Path(header).name}:{line}"
                yield Mutant(name, barrier, ";", header=header, nth=nth)


def caught_by(driver: str, mutant: Mutant) -> str | None:
    """What the first failing check said of the mutant, None if none failed."""
    from emulation import finding, mutated

    with tempfile.TemporaryDirectory() as folder:
        csrc = mutated(Path(folder), mutant.old, mutant.new, mutant.header, mutant.nth)
        try:
            DRIVERS[driver].catch(csrc)
        except AssertionError as error:
            return str(error).strip().split("\n")[0] or "assertion"
        except subprocess.CalledProcessError:
            return None  # does not compile: says nothing about the tests
        program = DRIVERS[driver].program
        return finding(program, csrc) if program else None


def verdict_of(driver: str, mutant: Mutant) -> str | None:
    """As :func:`caught_by`, in a process of its own: a fault may take it down."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, (caught_by(driver, mutant) or "").encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(NOT_TRIED)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status == NOT_TRIED << 8:
        raise RuntimeError(f"{driver}: {mutant.name} could not be tried: see above")
    return f"crash, status {status}" if status else found or None


def _tried(work: tuple[str, Mutant]) -> tuple[str | None, float]:
    start = time.monotonic()
    return verdict_of(*work), time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("drivers", nargs="*", default=list(DRIVERS), help="default: all")
    parser.add_argument("-k", default="", help="only mutants whose name holds this")
    parser.add_argument("-j", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    work = []
    for driver in options.drivers:
        silent = [m for *_, m in SILENT] if driver == "flash_attention" else []
        importlib.import_module(DRIVERS[driver].module)  # once, not in every process
        mutants = [*TABLE[driver], *silent, *barriers(driver)]
        work += [(driver, m) for m in mutants if options.k in m.name]
    missed = 0
    with multiprocessing.get_context("fork").Pool(options.j) as pool:
        for (driver, mutant), (verdict, seconds) in zip(work, pool.imap(_tried, work), strict=True):
            missed += verdict is None
            state = f"caught: {verdict[:90]}" if verdict else "NOT CAUGHT"
            print(f"{driver:20} {mutant.name:45} {seconds:4.0f} s  {state}", flush=True)
    print(f"{missed} not caught" if missed else f"all {len(work)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
