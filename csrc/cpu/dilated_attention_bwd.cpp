// dilated_attention on the CPU, gradient: tensors to DilatedBackward, and segments to threads.
//
// Branches follow one another, because they add to the same float32 sums; the segments of a branch
// share no token. The sums are the results themselves for float32, otherwise those of the heads
// that are worked on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "attention/inputs.h"
#include "attention/schedule.h"
#include "dilated_branches.h"
#include "isa.h"
#include "memory.h"

VITKIT_ISA_TABLE(DilatedBackwardKernels, dilated_backward_kernels)

namespace vitkit::cpu {
namespace {

constexpr const char* kOp = "dilated_attention_bwd";
// With fewer lanes than this in a branch there are more, smaller cells.
constexpr int64_t kFewLanes = 16;
// What the float32 sums of the heads in flight may take: this much, or this part of q.
constexpr int64_t kSumsBytes = int64_t(4) << 20;
constexpr int64_t kPartOfQ = 2;
constexpr int64_t kGrain = 1 << 16;

// One branch of a group of heads.
class BranchTasks {
 public:
  BranchTasks(const DilatedBackwardKernels& kernels, const DilatedBackward& p,
              const HeadGroup& group, int64_t branch)
      : kernels_(kernels), p_(p), group_(group), branch_(branch) {
    // Depends on the whole problem, not on the group: results must not.
    const int64_t tasks = p.in.batch * p.in.heads * p.branches[branch].segments;
    const BackwardGrid g = kernels.grid(p, {branch, 0, 0, 0, false, nullptr});
    fine_ = tasks < kFewLanes && tasks * g.lanes() < kFewLanes;
    largest_ = kernels.grid(p, at(0, nullptr));
  }

  // Whole segments while every thread has one, then the lanes of the rest side by side.
  void run(int64_t threads, const Tensor& like, size_t scratch) const {
    const int64_t tasks = group_.count() * p_.branches[branch_].segments;
    const int64_t split = largest_.lanes() > 1 ? tasks % threads : 0, whole = tasks - split;
    const int64_t floats = kernels_.sums_floats(p_, branch_);
    const int64_t slots = std::max(split, std::min(threads, whole));
    Tensor sums = torch::stable::new_empty(like, {slots * floats}, ScalarType::Float);
    auto* data = static_cast<float*>(sums.mutable_data_ptr());
    run_items(whole, threads, scratch, [&](int64_t task, void* memory, int64_t thread) {
      const DilatedProblem problem = at(task, data + thread * floats);
      const BackwardGrid g = kernels_.grid(p_, problem);
      for (int64_t step = 0; step < g.steps(); ++step)
        for (int64_t lane = 0; lane < g.lanes(); ++lane)
          kernels_.cell(p_, problem, step, lane, memory);
    });
    const int64_t lanes = largest_.lanes();
    for (int64_t step = 0; split > 0 && step < largest_.steps(); ++step)
      run_items(split * lanes, threads, scratch, [&](int64_t item, void* memory, int64_t) {
        const int64_t task = item / lanes;
        kernels_.cell(p_, at(whole + task, data + task * floats), step, item % lanes, memory);
      });
  }

 private:
  // Heads next to each other follow one another: their rows share cache lines and pages.
  DilatedProblem at(int64_t task, float* sums) const {
    const int64_t head = task % group_.count();
    return {branch_,
            group_.batch + head / group_.heads,
            group_.head + head % group_.heads,
            task / group_.count(),
            fine_,
            sums};
  }

  const DilatedBackwardKernels& kernels_;
  const DilatedBackward& p_;
  const HeadGroup& group_;
  int64_t branch_;
  bool fine_ = false;
  BackwardGrid largest_;
};

// Sums in float32 of the heads in flight, [dq, dk, dv][heads][tokens][head_dim].
class Sums {
 public:
  Sums(DilatedBackward* p, const Tensor& like, int64_t heads)
      : p_(*p), heads_(heads), head_floats_(p->in.nq * p->in.head_dim) {
    data_ = torch::stable::new_empty(like, {3 * heads * head_floats_}, ScalarType::Float);
    prefer_huge_pages(data_.mutable_data_ptr(), data_.numel() * int64_t(sizeof(float)));
    RowsView* views[] = {&p->dq, &p->dk, &p->dv};
    for (int64_t i = 0; i < 3; ++i)
      *views[i] = {reinterpret_cast<char*>(at(i, 0)), p->in.heads * head_floats_, p->in.head_dim,
                   head_floats_};
  }

  void clear() { torch::stable::zero_(data_); }

  // To the results, rounded.
  void write(const DilatedBackwardKernels& kernels, const HeadGroup& group,
             const RowsView (&to)[3]) const {
    const AttentionInputs& in = p_.in;
    parallel_for(0, 3 * group.count() * in.nq, kGrain / in.head_dim,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t token = i % in.nq, head = i / in.nq % group.count();
                     const RowsView& view = to[i / in.nq / group.count()];
                     const int64_t offset = (group.batch + head / group.heads) * view.batch_stride +
                                            (group.head + head % group.heads) * view.head_stride +
                                            token * view.token_stride;
                     kernels.round(at(i / in.nq / group.count(), head) + token * in.head_dim,
                                   in.type, view.data + 2 * offset, in.head_dim);
                   }
                 });
  }

 private:
  float* at(int64_t which, int64_t head) const {
    return static_cast<float*>(data_.data_ptr()) + (which * heads_ + head) * head_floats_;
  }

  const DilatedBackward& p_;
  int64_t heads_, head_floats_;
  Tensor data_;
};

void check_like(const char* arg, const Tensor& t, const Tensor& like) {
  check_rank(kOp, arg, t, 4);
  for (int64_t d = 0; d < 4; ++d) check_size(kOp, arg, t, d, like.size(d));
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), kOp, ": ", arg,
                  " must have the dtype of q");
}

std::tuple<Tensor, Tensor, Tensor> dilated_attention_bwd(
    Tensor grad, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor lse,
    Tensor branch_out, std::vector<int64_t> segment_lengths, std::vector<int64_t> dilation_ratios,
    bool causal, double scale, bool torchscale) {
  const AttentionArguments arguments(kOp, q, k, v, std::nullopt, std::nullopt, std::nullopt, causal,
                                     scale);
  const AttentionInputs& in = arguments.in;
  check_size(kOp, "k", k, 1, in.nq);
  check_like("grad", grad, q);
  Tensor results[3];
  for (Tensor& t : results) t = torch::stable::new_empty(q, q.sizes());
  if (q.numel() == 0) return {results[0], results[1], results[2]};

  const DilatedLayout layout(kOp, in, segment_lengths, dilation_ratios, torchscale);
  check_rank(kOp, "branch_out", branch_out, 4);
  const int64_t sizes[] = {in.batch, layout.row_count, in.heads, in.head_dim};
  for (int64_t d = 0; d < 4; ++d) check_size(kOp, "branch_out", branch_out, d, sizes[d]);
  check_last_dim_dense(kOp, "branch_out", branch_out);
  STD_TORCH_CHECK(branch_out.scalar_type() == q.scalar_type(), kOp,
                  ": branch_out must have the dtype of q");

  const DilatedBackwardKernels& kernels = dilated_backward_kernels();
  DilatedBackward p{};
  p.in = in;
  p.branches = layout.branches.data();
  p.branch_count = int64_t(layout.branches.size());
  p.rows = rows_view(branch_out);
  p.grad = rows_view(grad);
  p.grad_dim_stride = grad.stride(3);
  p.lse = lse_view(kOp, "lse", lse, in);
  if (grad_lse) p.grad_lse = lse_view(kOp, "grad_lse", *grad_lse, in);

  const bool direct = in.type == ElementType::f32;
  const int64_t head_bytes = 3 * in.nq * in.head_dim * int64_t(sizeof(float));
  const int64_t most = std::max(kSumsBytes, q.numel() * int64_t(q.element_size()) / kPartOfQ);
  const std::vector<HeadGroup> groups =
      head_groups(in, direct ? in.batch * in.heads : std::max<int64_t>(1, most / head_bytes));
  RowsView views[3];
  for (int i = 0; i < 3; ++i) views[i] = rows_view(results[i]);
  std::optional<Sums> sums;
  if (direct) {
    for (Tensor& t : results) {
      prefer_huge_pages(t.mutable_data_ptr(), t.numel() * int64_t(t.element_size()));
      torch::stable::zero_(t);
    }
    p.dq = views[0];
    p.dk = views[1];
    p.dv = views[2];
  } else {
    sums.emplace(&p, q, groups.front().count());
  }
  const size_t scratch = size_t(kernels.scratch_bytes(p));
  for (const HeadGroup& group : groups) {
    if (!direct) p.first_head = group.batch * in.heads + group.head;
    if (sums) sums->clear();
    for (int64_t i = 0; i < p.branch_count; ++i) {
      const DilatedBranch& b = p.branches[i];
      const double flops = 10. * double(b.slots) * double(b.slots) * double(in.head_dim) *
                           double(b.segments * group.count());
      BranchTasks(kernels, p, group, i).run(threads_for(flops), q, scratch);
    }
    if (sums) sums->write(kernels, group, views);
  }
  return {results[0], results[1], results[2]};
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("dilated_attention_bwd", TORCH_BOX(&vitkit::cpu::dilated_attention_bwd));
}
