// rope_2d on the CPU: tensors to Rope, tokens to threads.
#include "rope_2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "attention/inputs.h"
#include "check.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "rows.h"

VITKIT_ISA_TABLE(RopeKernels, rope_kernels)

namespace vitkit::cpu {
namespace {

constexpr const char* kOp = "rope_2d";
// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrainElements = int64_t(1) << 14;

Tensor rotated(const char* arg, const Tensor& x, const Tensor& cos, const Tensor& sin,
               bool interleaved, bool inverse) {
  check_floating(kOp, arg, x);
  check_rank(kOp, arg, x, 4);
  const int64_t tokens = x.size(1), heads = x.size(2), d = x.size(3);
  STD_TORCH_CHECK(d % 2 == 0, kOp, ": ", arg, " must have an even head dim, got ", d);
  check_size(kOp, "sin", sin, 1, cos.size(1));
  const auto cos_table = angle_table<AngleTable>(kOp, "cos", cos, x);
  const auto sin_table = angle_table<AngleTable>(kOp, "sin", sin, x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (y.numel() == 0) return y;  // the strides of nothing mean nothing
  check_last_dim_dense(kOp, arg, x);
  prefer_huge_pages(y.mutable_data_ptr(), y.numel() * int64_t(y.element_size()));
  const Rope p{element_type(x), interleaved,  inverse,   tokens,   tokens - cos.size(1), heads, d,
               rows_view(x),    rows_view(y), cos_table, sin_table};
  const RopeKernels& kernels = rope_kernels();
  parallel_for(0, x.size(0) * tokens, 1 + kGrainElements / (heads * d),
               [&](int64_t begin, int64_t end) { kernels.rotate(p, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const std::optional<Tensor>& k,
                                  const Tensor& cos, const Tensor& sin, bool interleaved,
                                  bool inverse) {
  Tensor turned = rotated("q", q, cos, sin, interleaved, inverse);
  if (!k) return {turned, torch::stable::new_empty(q, {0})};
  return {turned, rotated("k", *k, cos, sin, interleaved, inverse)};
}

std::tuple<Tensor, Tensor> forward(Tensor q, std::optional<Tensor> k, Tensor cos, Tensor sin,
                                   bool interleaved) {
  return rotate(q, k, cos, sin, interleaved, false);
}

std::tuple<Tensor, Tensor> backward(Tensor grad_q, std::optional<Tensor> grad_k, Tensor cos,
                                    Tensor sin, bool interleaved) {
  return rotate(grad_q, grad_k, cos, sin, interleaved, true);
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("rope_2d_fwd", TORCH_BOX(&vitkit::cpu::forward));
  m.impl("rope_2d_bwd", TORCH_BOX(&vitkit::cpu::backward));
}
