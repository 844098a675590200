// dilated_attention on CUDA: checks, allocations, launches.
#include "dilated_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_arguments.h"
#include "launch.h"

namespace vitkit::attention {
namespace {

constexpr const char* kOp = "dilated_attention";

DilatedLayout layout_of(const AttentionArguments& a, const std::vector<int64_t>& lengths,
                        const std::vector<int64_t>& ratios, bool torchscale) {
  STD_TORCH_CHECK(
      lengths.size() == ratios.size() && !lengths.empty() && lengths.size() <= size_t(kMaxBranches),
      kOp, ": there must be 1 to ", kMaxBranches,
      " segment_lengths, and one of dilation_ratios for each");
  for (size_t i = 0; i < lengths.size(); ++i)
    STD_TORCH_CHECK(lengths[i] >= 1 && ratios[i] >= 1, kOp,
                    ": segment_lengths and dilation_ratios must be at least 1, got ", lengths[i],
                    " and ", ratios[i]);
  return {a.map.n_q, a.map.heads, int(lengths.size()), lengths.data(), ratios.data(), torchscale};
}

// Slots and products of a ratio and slots stay below tokens + heads.
void check_sizes(const AttentionArguments& a) {
  check_size(kOp, "k", a.k, 1, a.map.n_q);
  as_int(kOp, "N + H", 2 * (int64_t(a.map.n_q) + a.map.heads));
}

MixParams mix_params(const AttentionArguments& a, const DilatedLayout& layout) {
  MixParams p{};
  p.row_count = layout.rows;
  p.batch = a.map.batch;
  p.heads = a.map.heads;
  p.tokens = a.map.n_q;
  p.head_dim = a.head_dim;
  p.count = layout.count;
  std::copy(layout.branches, layout.branches + layout.count, p.branches);
  return p;
}

// [B, H, rows]
Tensor new_statistics(const AttentionArguments& a, const DilatedLayout& layout) {
  return torch::stable::new_empty(a.q, {a.map.batch, a.map.heads, layout.rows}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v,
                                           std::vector<int64_t> segment_lengths,
                                           std::vector<int64_t> dilation_ratios, bool causal,
                                           double scale, bool torchscale, bool need_branches) {
  const AttentionArguments a(kOp, q, k, v, std::nullopt, std::nullopt, causal, scale);
  check_sizes(a);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, a.lse_sizes(), ScalarType::Float);
  const auto new_parts = [&](int64_t rows) {
    // Zeros: rows that no head of a phase fills may be part of what the operator returns.
    return torch::stable::new_zeros(q, {q.size(0), rows, q.size(2), q.size(3)});
  };
  if (out.numel() == 0) return {out, lse, new_parts(0)};
  const Launch launch(q);
  const DilatedLayout layout = layout_of(a, segment_lengths, dilation_ratios, torchscale);
  Tensor parts = new_parts(layout.rows), part_lse = new_statistics(a, layout);

  DilatedForward p{a.forward(parts, part_lse), {}, {}};
  p.lse_batch = int64_t(a.map.heads) * layout.rows;
  p.lse_head = layout.rows;
  p.map.batch = a.map.batch;
  p.map.heads = a.map.heads;
  p.map.tokens = a.map.n_q;
  check_launch(kOp, dilated_forward(p, layout, a.element, launch.stream()));

  MixParams mix = mix_params(a, layout);
  mix.parts = rows_of(parts);
  mix.out = rows_of(out);
  mix.lse = floats(lse);
  mix.part_lse = floats(part_lse);
  check_launch(kOp, dilated_mix(mix, false, a.element, launch.stream()));
  return {out, lse, need_branches ? parts : new_parts(0)};
}

// dk and dv, or dq, rounded from float32 sums.
void add_gradients(DilatedBackward p, const AttentionArguments& a, const DilatedLayout& layout,
                   std::vector<Tensor*> to, cudaStream_t stream) {
  const bool keys = to.size() == 2;
  std::vector<Tensor> sums;
  for (Tensor* t : to) {
    sums.push_back(a.element == Element::f32
                       ? *t
                       : torch::stable::new_empty(*t, t->sizes(), ScalarType::Float));
    if (!layout.has_dense()) torch::stable::zero_(sums.back());
  }
  if (keys) {
    p.dk = rows_of(sums[0]);
    p.dv = rows_of(sums[1]);
  } else {
    p.dq = rows_of(sums[0]);
  }
  check_launch(kOp, dilated_gradient(p, layout, keys, a.element, stream));
  if (a.element != Element::f32)
    for (size_t i = 0; i < to.size(); ++i) torch::stable::copy_(*to[i], sums[i]);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, std::optional<Tensor> grad_lse, Tensor q,
                                            Tensor k, Tensor v, Tensor lse, Tensor branch_out,
                                            std::vector<int64_t> segment_lengths,
                                            std::vector<int64_t> dilation_ratios, bool causal,
                                            double scale, bool torchscale) {
  const AttentionArguments a(kOp, q, k, v, std::nullopt, std::nullopt, causal, scale);
  check_sizes(a);
  AttentionGradient g(a, grad, grad_lse, std::nullopt, lse);
  if (q.numel() == 0) return {g.dq, g.dk, g.dv};
  const Launch launch(q);
  const DilatedLayout layout = layout_of(a, segment_lengths, dilation_ratios, torchscale);
  a.check_like_q("branch_out", branch_out, a.q);
  check_rank(kOp, "branch_out", branch_out, 4);
  check_size(kOp, "branch_out", branch_out, 0, q.size(0));
  check_size(kOp, "branch_out", branch_out, 1, layout.rows);
  check_size(kOp, "branch_out", branch_out, 2, q.size(2));
  check_size(kOp, "branch_out", branch_out, 3, q.size(3));
  const Tensor parts = with_aligned_rows(branch_out);
  Tensor part_lse = new_statistics(a, layout), delta = new_statistics(a, layout);

  MixParams mix = mix_params(a, layout);
  mix.parts = rows_of(parts);
  mix.out = g.tensors.grad;
  mix.lse = const_cast<float*>(g.tensors.lse);
  mix.part_lse = floats(part_lse);
  mix.delta = floats(delta);
  mix.grad_lse = g.tensors.grad_lse;
  mix.grad_lse_batch = g.tensors.grad_lse_batch;
  mix.grad_lse_head = g.tensors.grad_lse_head;
  mix.grad_lse_token = g.tensors.grad_lse_token;
  check_launch(kOp, dilated_mix(mix, true, a.element, launch.stream()));

  DilatedBackward p{g.tensors, {}, {}};
  p.lse = mix.part_lse;
  p.delta = mix.delta;
  p.lse_batch = int64_t(a.map.heads) * layout.rows;
  p.lse_head = layout.rows;
  p.map.batch = a.map.batch;
  p.map.heads = a.map.heads;
  p.map.tokens = a.map.n_q;
  // One after the other: the sums of dk and dv are gone before that of dq is made.
  add_gradients(p, a, layout, {&g.dk, &g.dv}, launch.stream());
  add_gradients(p, a, layout, {&g.dq}, launch.stream());
  return {g.dq, g.dk, g.dv};
}

}  // namespace
}  // namespace vitkit::attention

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("dilated_attention_fwd", TORCH_BOX(&vitkit::attention::forward));
  m.impl("dilated_attention_bwd", TORCH_BOX(&vitkit::attention::backward));
}
