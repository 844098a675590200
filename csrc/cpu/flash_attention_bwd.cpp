// flash_attention on the CPU, gradient: tensors to FlashBackward, and cells to threads.
#include "flash_attention_bwd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "attention/inputs.h"
#include "attention/schedule.h"
#include "check.h"
#include "isa.h"
#include "memory.h"
#include "small_tensor.h"

VITKIT_ISA_TABLE(FlashBackwardKernels, flash_backward_kernels)

namespace vitkit::cpu {
namespace {

constexpr const char* kOp = "flash_attention_bwd";
// With fewer tasks than this there are more, smaller cells, and more copies of a shared dbias.
constexpr int64_t kFewTasks = 16;
constexpr int64_t kProblemsPerCopy = 4;
constexpr int64_t kCopiesBytes = int64_t(64) << 20;

// A task is a list of problems whose gradients of the bias share memory: one thread takes them in
// order. Without such sharing every problem is a task. Depends on shapes only.
class Tasks {
 public:
  Tasks(const AttentionInputs& in, const std::optional<Tensor>& dbias) : in_(in) {
    if (dbias) {
      batches_ = dbias->size(0) == 1 ? in.batch : 1;
      heads_ = dbias->size(1) == 1 ? in.heads : 1;
    }
    const int64_t groups = in.batch * in.heads / shared();
    if (shared() > 1) {
      const int64_t wanted = (kFewTasks + groups - 1) / groups;
      const int64_t bytes = std::max<int64_t>(1, dbias->numel() * int64_t(sizeof(float)));
      copies_ = std::clamp<int64_t>(std::min(shared() / kProblemsPerCopy, kCopiesBytes / bytes), 1,
                                    wanted);
    }
    problems_ = (shared() + copies_ - 1) / copies_;
    count_ = groups * copies_;
  }

  int64_t count() const { return count_; }
  int64_t copies() const { return copies_; }
  int64_t problems() const { return problems_; }  // the most of any task

  // Problem m of a task; false where a task has fewer.
  bool at(int64_t task, int64_t m, BackwardProblem* problem) const {
    const int64_t group = task / copies_, copy = task % copies_, index = copy * problems_ + m;
    if (m >= problems_ || index >= shared()) return false;
    const int64_t group_heads = in_.heads / heads_;
    problem->batch = group / group_heads * batches_ + index / heads_;
    problem->head = group % group_heads * heads_ + index % heads_;
    problem->copy = copy;
    return true;
  }

 private:
  int64_t shared() const { return batches_ * heads_; }

  const AttentionInputs& in_;
  int64_t batches_ = 1, heads_ = 1;  // that share one slice of dbias
  int64_t copies_ = 1, problems_ = 1, count_ = 0;
};

// Sums `keys` consecutive floats of each of `copies` copies into every element of `result`.
void reduce(const FlashBackwardKernels& kernels, const Tensor& sums, int64_t copies,
            int64_t copy_floats, int64_t keys, Tensor* result) {
  const auto* from = static_cast<const float*>(sums.const_data_ptr());
  auto* to = static_cast<char*>(result->mutable_data_ptr());
  const ElementType type = element_type(*result);
  const int64_t element = type == ElementType::f32 ? 4 : 2;
  constexpr int64_t kGrain = 1 << 14;
  parallel_for(0, result->numel(), kGrain, [&](int64_t begin, int64_t end) {
    kernels.reduce_bias(from + begin * keys, copies, copy_floats, keys, end - begin, type,
                        to + begin * element);
  });
}

// Output and float32 sums of dbias. Cells of different lanes must not share sums: where neither
// queries nor keys distinguish them, the keys do, until the end.
struct BiasGrad {
  Tensor result, sums;
  BiasGradView view{};
  int64_t copy_floats = 0, keys = 1;

  BiasGrad(const Tensor& bias, const AttentionInputs& in, int64_t copies) {
    result = torch::stable::new_empty(bias, bias.sizes());
    const bool all = bias.size(0) == in.batch && bias.size(1) == in.heads &&
                     bias.size(2) == in.nq && bias.size(3) == in.nk;
    const bool scalar = bias.size(2) == 1 && bias.size(3) == 1;
    keys = scalar ? in.nk : 1;
    const int64_t row = bias.size(3) * keys, head = bias.size(2) * row, batch = bias.size(1) * head;
    copy_floats = bias.size(0) * batch;
    view.accumulate = !all;
    view.type = all ? element_type(bias) : ElementType::f32;
    view.copy_stride = copy_floats;
    view.batch_stride = bias.size(0) == 1 ? 0 : batch;
    view.head_stride = bias.size(1) == 1 ? 0 : head;
    view.query_stride = bias.size(2) == 1 ? 0 : row;
    view.key_stride = row == 1 ? 0 : 1;
    if (all || (copies == 1 && keys == 1 && bias.scalar_type() == ScalarType::Float)) {
      torch::stable::zero_(result);  // what a causal call skips stays 0
      view.data = static_cast<char*>(result.mutable_data_ptr());
    } else {
      sums = torch::stable::new_zeros(bias, {copies * copy_floats}, ScalarType::Float);
      view.data = static_cast<char*>(sums.mutable_data_ptr());
    }
  }

  void finish(const FlashBackwardKernels& kernels, int64_t copies) {
    if (sums.defined()) reduce(kernels, sums, copies, copy_floats, keys, &result);
  }
};

int64_t rounds(int64_t items, int64_t threads) { return (items + threads - 1) / threads; }

void run_tasks(const FlashBackwardKernels& kernels, const FlashBackward& p, const Tasks& tasks,
               const std::vector<BackwardGrid>& grids, const Tensor& like, int64_t threads) {
  int64_t lanes = 0, steps = 0;
  for (const BackwardGrid& g : grids) {
    lanes = std::max(lanes, g.lanes());
    steps = std::max(steps, g.steps());
  }
  const auto grid_of = [&](int64_t b) -> const BackwardGrid& {
    return grids[grids.size() == 1 ? 0 : size_t(b)];
  };
  const size_t scratch = size_t(kernels.scratch_bytes(p));
  const int64_t floats = kernels.sums_floats(p);
  // Whole tasks per thread, or lanes of all tasks side by side: whichever leaves fewer cells to the
  // busiest thread.
  const bool split =
      lanes > 1 && rounds(tasks.count() * lanes, threads) < rounds(tasks.count(), threads) * lanes;
  const int64_t slots = split ? tasks.count() : std::min(threads, tasks.count());
  Tensor sums = torch::stable::new_empty(like, {slots * floats}, ScalarType::Float);
  auto* sums_data = static_cast<float*>(sums.mutable_data_ptr());

  if (!split) {
    return run_items(tasks.count(), threads, scratch,
                     [&](int64_t task, void* memory, int64_t thread) {
                       BackwardProblem at{0, 0, sums_data + thread * floats, 0};
                       for (int64_t m = 0; tasks.at(task, m, &at); ++m)
                         for (int64_t step = 0; step < grid_of(at.batch).steps(); ++step)
                           for (int64_t lane = 0; lane < grid_of(at.batch).lanes(); ++lane)
                             kernels.cell(p, at, step, lane, memory);
                     });
  }
  for (int64_t m = 0; m < tasks.problems(); ++m)
    for (int64_t step = 0; step < steps; ++step)
      run_items(tasks.count() * lanes, threads, scratch, [&](int64_t item, void* memory, int64_t) {
        const int64_t task = item / lanes;
        BackwardProblem at{0, 0, sums_data + task * floats, 0};
        if (tasks.at(task, m, &at)) kernels.cell(p, at, step, item % lanes, memory);
      });
}

void check_like(const char* arg, const Tensor& t, const Tensor& like) {
  check_rank(kOp, arg, t, like.dim());
  for (int64_t d = 0; d < like.dim(); ++d) check_size(kOp, arg, t, d, like.size(d));
}

void set_lse(FlashBackward* p, const Tensor& lse, const std::optional<Tensor>& grad_lse) {
  const LseView saved = lse_view(kOp, "lse", lse, p->in);
  check_last_dim_dense(kOp, "lse", lse);
  p->lse = saved.data;
  p->lse_batch_stride = saved.batch_stride;
  p->lse_head_stride = saved.head_stride;
  if (!grad_lse) return;
  const LseView grad = lse_view(kOp, "grad_lse", *grad_lse, p->in);
  p->grad_lse = grad.data;
  p->grad_lse_batch_stride = grad.batch_stride;
  p->grad_lse_head_stride = grad.head_stride;
  p->grad_lse_query_stride = grad.query_stride;
}

struct Saved {
  const Tensor& grad;
  const std::optional<Tensor>& grad_lse;
  const Tensor &q, &k, &v, &out, &lse;
};

struct Gradients {
  Tensor dq, dk, dv;
  std::optional<Tensor> dbias;
};

// `bias` is the one whose gradient is asked for; `structured` where those of a structured one are
// summed.
Gradients differentiate(const AttentionArguments& arguments, const Saved& saved,
                        const std::optional<Tensor>& bias, const StructuredGradView& structured) {
  const auto& [grad, grad_lse, q, k, v, out, lse] = saved;
  const AttentionInputs& in = arguments.in;
  const bool packed = arguments.packed();
  FlashBackward p{};
  p.in = in;
  set_lse(&p, lse, grad_lse);
  check_like("grad", grad, q);
  check_like("out", out, q);
  check_last_dim_dense(kOp, "out", out);
  STD_TORCH_CHECK(grad.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type(),
                  kOp, ": grad and out must have the dtype of q");

  Gradients to{torch::stable::new_empty(q, q.sizes()), torch::stable::new_empty(k, k.sizes()),
               torch::stable::new_empty(v, v.sizes()), std::nullopt};
  for (Tensor* t : {&to.dq, &to.dk, &to.dv}) prefer_huge_pages(*t);
  const bool empty = q.numel() == 0 || k.numel() == 0;
  if (empty || !arguments.covers_queries()) torch::stable::zero_(to.dq);
  if (empty || !arguments.covers_keys()) {
    torch::stable::zero_(to.dk);
    torch::stable::zero_(to.dv);
  }
  if (empty) {
    if (bias) to.dbias = torch::stable::new_zeros(*bias, bias->sizes());
    return to;
  }
  p.out = rows_view(out);
  p.grad = rows_view(grad);
  p.grad_dim_stride = grad.stride(grad.dim() - 1);
  p.dq = rows_view(to.dq);
  p.dk = rows_view(to.dk);
  p.dv = rows_view(to.dv);
  p.dstructured = structured;

  const FlashBackwardKernels& kernels = flash_backward_kernels();
  const Tasks tasks(in, bias);
  std::optional<BiasGrad> dbias;
  if (bias) {
    dbias.emplace(*bias, in, tasks.copies());
    p.dbias = dbias->view;
  }
  p.fine = tasks.count() < kFewTasks;
  double pairs = 0;
  for (int64_t b = 0; b < in.batch; ++b) {
    p.max_nq = std::max(p.max_nq, arguments.queries(b));
    p.max_nk = std::max(p.max_nk, arguments.keys(b));
    pairs += double(arguments.queries(b)) * double(arguments.keys(b));
  }
  std::vector<BackwardGrid> grids;
  for (int64_t b = 0; b < (packed ? in.batch : 1); ++b)
    grids.push_back(kernels.grid(p, arguments.queries(b), arguments.keys(b)));
  const double flops = 10. * pairs * double(in.heads) * double(in.head_dim);
  run_tasks(kernels, p, tasks, grids, q, threads_for(flops));

  if (dbias) {
    dbias->finish(kernels, tasks.copies());
    to.dbias = dbias->result;
  }
  return to;
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_bwd(
    Tensor grad, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, std::optional<Tensor> bias, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> cu_seqlens_k, bool causal, double scale, bool need_dbias) {
  const AttentionArguments arguments(kOp, q, k, v, bias, cu_seqlens_q, cu_seqlens_k, causal, scale);
  need_dbias = need_dbias && bias.has_value();
  STD_TORCH_CHECK(!need_dbias || is_floating(bias->scalar_type()), kOp,
                  ": bias must be floating to have a gradient");
  const Gradients g = differentiate(arguments, {grad, grad_lse, q, k, v, out, lse},
                                    need_dbias ? bias : std::nullopt, {});
  return {g.dq, g.dk, g.dv, g.dbias ? *g.dbias : nothing(q)};
}

// Sums of the gradient of t over cells, [batch, heads, queries, ...] like t.
Tensor zero_sums(const Tensor& t) {
  return torch::stable::new_zeros(t, t.sizes(), ScalarType::Float);
}

// Sums as a gradient of the type of t.
Tensor rounded(const Tensor& sums, const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return sums;
  Tensor result = torch::stable::new_empty(t, t.sizes());
  reduce(flash_backward_kernels(), sums, 1, 0, 1, &result);
  return result;
}

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attention_decomposed_bwd(
    Tensor grad, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, Tensor rel_h, Tensor rel_w, bool causal, double scale, bool need_dterm) {
  AttentionArguments arguments(kOp, q, k, v, causal, scale);
  arguments.add_decomposed_bias(kOp, rel_h, rel_w);
  StructuredGradView view{};
  Tensor drel_h = nothing(q), drel_w = nothing(q);
  if (need_dterm) {
    drel_h = zero_sums(rel_h);
    drel_w = zero_sums(rel_w);
    view.rel_h = floats(drel_h);
    view.rel_w = floats(drel_w);
  }
  const Gradients g =
      differentiate(arguments, {grad, grad_lse, q, k, v, out, lse}, std::nullopt, view);
  if (need_dterm) {
    drel_h = rounded(drel_h, rel_h);
    drel_w = rounded(drel_w, rel_w);
  }
  return {g.dq, g.dk, g.dv, drel_h, drel_w};
}

// [heads] from sums [batch, heads, queries], always in one order.
Tensor sum_over_queries(const Tensor& sums, const Tensor& slopes) {
  const auto* from = static_cast<const float*>(sums.const_data_ptr());
  const int64_t heads = sums.size(1), queries = sums.size(2);
  std::vector<float> result(size_t(heads), 0.f);
  for (int64_t h = 0; h < heads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < sums.size(0); ++b)
      for (int64_t i = 0; i < queries; ++i) sum += from[(b * heads + h) * queries + i];
    result[size_t(h)] = float(sum);
  }
  return like_of(slopes, result);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_distance_bwd(
    Tensor grad, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, Tensor slopes, Tensor coords_q, Tensor coords_k, bool causal, double scale,
    bool need_dterm) {
  AttentionArguments arguments(kOp, q, k, v, causal, scale);
  arguments.add_distance_bias(kOp, slopes, coords_q, coords_k);
  StructuredGradView view{};
  Tensor sums;
  if (need_dterm) {
    sums = zero_sums(lse);
    view.slopes = floats(sums);
  }
  const Gradients g =
      differentiate(arguments, {grad, grad_lse, q, k, v, out, lse}, std::nullopt, view);
  return {g.dq, g.dk, g.dv, need_dterm ? sum_over_queries(sums, slopes) : nothing(q)};
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("flash_attention_bwd", TORCH_BOX(&vitkit::cpu::flash_attention_bwd));
  m.impl("flash_attention_decomposed_bwd", TORCH_BOX(&vitkit::cpu::flash_attention_decomposed_bwd));
  m.impl("flash_attention_distance_bwd", TORCH_BOX(&vitkit::cpu::flash_attention_distance_bwd));
}
