// dilated_attention on the CPU, forward: tensors to DilatedForward, and segments to threads.
#include "dilated_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "attention/inputs.h"
#include "attention/schedule.h"
#include "dilated_branches.h"
#include "isa.h"
#include "memory.h"

VITKIT_ISA_TABLE(DilatedForwardKernels, dilated_forward_kernels)

namespace vitkit::cpu {
namespace {

constexpr const char* kOp = "dilated_attention";
constexpr double kUnitFlops = 2e7;
constexpr double kUnitsPerThread = 8;
constexpr int64_t kMixedTokens = 256;
// What the results of the heads in flight may take, for each thread: enough heads for all of them.
constexpr int64_t kResultBytes = int64_t(8) << 20;

double segment_flops(const AttentionInputs& in, const DilatedBranch& b) {
  return 4. * double(b.slots) * double(b.slots) * double(in.head_dim);
}

// How the segments of a branch become units, for every head: `parts` per segment, or `segments` in
// one unit.
struct BranchUnits {
  int64_t branch, segments, parts, per_head;
  double flops;
};

// Longest units first: what is left at the end is short.
std::vector<BranchUnits> units_of(const DilatedForwardKernels& kernels, const DilatedForward& p,
                                  int64_t heads, int64_t threads) {
  double total = 0;
  for (int64_t i = 0; i < p.branch_count; ++i)
    total += segment_flops(p.in, p.branches[i]) * double(p.branches[i].segments * heads);
  const double longest = std::max(kUnitFlops, total / (double(threads) * kUnitsPerThread));
  std::vector<BranchUnits> all;
  for (int64_t i = 0; i < p.branch_count; ++i) {
    const DilatedBranch& b = p.branches[i];
    const double flops = segment_flops(p.in, b);
    BranchUnits u{i, 1, 1, 0, 0};
    if (threads > 1)
      u.parts = std::clamp<int64_t>(int64_t(std::ceil(flops / longest)), 1,
                                    kernels.blocks(p, b.slots, b.slots));
    u.segments = std::clamp<int64_t>(int64_t(kUnitFlops / flops), 1, b.segments);
    u.per_head = (b.segments + u.segments - 1) / u.segments * u.parts;
    u.flops = flops * double(u.segments) / double(u.parts);
    all.push_back(u);
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const auto& a, const auto& b) { return a.flops > b.flops; });
  return all;
}

// Heads next to each other are worked on one after the other: their rows share cache lines and
// pages.
void attend(const DilatedForwardKernels& kernels, const DilatedForward& p, const HeadGroup& group,
            int64_t threads, size_t scratch) {
  const std::vector<BranchUnits> units = units_of(kernels, p, group.count(), threads);
  int64_t items = 0;
  for (const BranchUnits& u : units) items += u.per_head * group.count();
  run_items(items, threads, scratch, [&](int64_t item, void* memory, int64_t) {
    auto u = units.begin();
    for (; item >= u->per_head * group.count(); ++u) item -= u->per_head * group.count();
    const int64_t head = item % group.count(), index = item / group.count();
    const int64_t first = index / u->parts * u->segments;
    kernels.attend(
        p,
        {u->branch, group.batch + head / group.heads, group.head + head % group.heads, first,
         std::min(u->segments, p.branches[u->branch].segments - first), index % u->parts, u->parts},
        memory);
  });
}

void mix(const DilatedForwardKernels& kernels, const DilatedForward& p, const HeadGroup& group,
         int64_t threads, size_t scratch) {
  const int64_t ranges = (p.in.nq + kMixedTokens - 1) / kMixedTokens;
  run_items(group.batches * ranges, threads, scratch, [&](int64_t item, void* memory, int64_t) {
    const int64_t begin = item % ranges * kMixedTokens;
    kernels.mix(p, group.batch + item / ranges, group.head, group.heads, begin,
                std::min(begin + kMixedTokens, p.in.nq), memory);
  });
}

Tensor new_pages(const Tensor& like, std::vector<int64_t> sizes) {
  Tensor t = torch::stable::new_empty(like, sizes);
  prefer_huge_pages(t.mutable_data_ptr(), t.numel() * int64_t(t.element_size()));
  return t;
}

std::tuple<Tensor, Tensor, Tensor> dilated_attention_fwd(Tensor q, Tensor k, Tensor v,
                                                         std::vector<int64_t> segment_lengths,
                                                         std::vector<int64_t> dilation_ratios,
                                                         bool causal, double scale, bool torchscale,
                                                         bool need_branches) {
  const AttentionArguments arguments(kOp, q, k, v, std::nullopt, std::nullopt, std::nullopt, causal,
                                     scale);
  const AttentionInputs& in = arguments.in;
  check_size(kOp, "k", k, 1, in.nq);
  Tensor out = new_pages(q, {in.batch, in.nq, in.heads, in.head_dim});
  Tensor lse = torch::stable::new_empty(q, {in.batch, in.heads, in.nq}, ScalarType::Float);
  if (out.numel() == 0)
    return {out, lse, torch::stable::new_empty(q, {in.batch, 0, in.heads, in.head_dim})};

  const DilatedLayout layout(kOp, in, segment_lengths, dilation_ratios, torchscale);
  const DilatedForwardKernels& kernels = dilated_forward_kernels();
  DilatedForward p{};
  p.in = in;
  p.branches = layout.branches.data();
  p.branch_count = int64_t(layout.branches.size());
  p.row_count = layout.row_count;
  p.out = rows_view(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.keep_rows = need_branches;

  double flops = 0;
  for (const DilatedBranch& b : layout.branches) flops += segment_flops(in, b) * double(b.segments);
  const int64_t threads = threads_for(flops * double(in.batch * in.heads));
  const int64_t head_bytes = p.row_count * in.head_dim * int64_t(q.element_size());
  const std::vector<HeadGroup> groups =
      head_groups(in, need_branches ? in.batch * in.heads
                                    : std::max<int64_t>(1, threads * kResultBytes / head_bytes));
  const int64_t in_flight = groups.front().count();
  Tensor rows = new_pages(q, {need_branches ? in.batch : 1, p.row_count,
                              need_branches ? in.heads : in_flight, in.head_dim});
  Tensor row_lse = torch::stable::new_empty(q, {in_flight, p.row_count}, ScalarType::Float);
  if (need_branches) {
    p.rows = rows_view(rows);
  } else {
    const int64_t head_stride = p.row_count * in.head_dim;
    p.rows = {static_cast<char*>(rows.mutable_data_ptr()), in.heads * head_stride, in.head_dim,
              head_stride};
  }
  p.row_lse = static_cast<float*>(row_lse.mutable_data_ptr());
  const size_t scratch = size_t(kernels.scratch_bytes(p));
  for (const HeadGroup& group : groups) {
    p.first_head = need_branches ? 0 : group.batch * in.heads + group.head;
    attend(kernels, p, group, threads, scratch);
    mix(kernels, p, group, threads, scratch);
  }
  if (!need_branches) rows = torch::stable::new_empty(q, {in.batch, 0, in.heads, in.head_dim});
  return {out, lse, rows};
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("dilated_attention_fwd", TORCH_BOX(&vitkit::cpu::dilated_attention_fwd));
}
