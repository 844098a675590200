// gated_residual on the CPU: checks, cuts of the work, and the sum of the gates' gradient.
#include "gated_residual.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "small_tensor.h"

VITKIT_ISA_TABLE(GatedKernels, gated_residual_kernels)

namespace vitkit::cpu {
namespace {

constexpr const char* kOp = "gated_residual";
// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrainElements = int64_t(1) << 15;
// Parts of a segment in the gradient. Constants, not the number of threads: results must not depend
// on it.
constexpr int64_t kPartRows = 64, kMaxParts = 256;

// `x` stands for grad in the gradient.
GatedShape read_shape(const char* arg, const Tensor& x, const Tensor& y, const Tensor& gate) {
  const Segments found = segments_of(kOp, arg, x, gate);
  check_like(kOp, "y", y, arg, x);
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous(), kOp, ": ", arg,
                  " and y must be contiguous");
  const GatedShape s{norm_element(kOp, arg, x),  found.count,    found.rows, x.size(-1),
                     rows_of(kOp, "gate", gate), found.per_token};
  STD_TORCH_CHECK(!s.per_token || s.gate.element == s.element || s.gate.element == NormElement::f32,
                  kOp, ": gate per token must be float32 or have the dtype of ", arg);
  return s;
}

Tensor forward(Tensor x, Tensor y, Tensor gate) {
  const GatedShape s = read_shape("x", x, y, gate);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  prefer_huge_pages(out.mutable_data_ptr(), x.numel() * int64_t(x.element_size()));
  const GatedForward p{s, x.const_data_ptr(), y.const_data_ptr(), out.mutable_data_ptr()};
  const GatedKernels& kernels = gated_residual_kernels();
  parallel_for(0, s.segments * s.rows, 1 + kGrainElements / s.width,
               [&](int64_t begin, int64_t end) { kernels.forward(p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor y, Tensor gate) {
  const GatedShape s = read_shape("grad", grad, y, gate);
  Tensor dy = torch::stable::empty_like(y);
  if (y.numel() == 0) return {dy, like_of(gate, std::vector<float>(size_t(gate.numel()), 0.f))};
  prefer_huge_pages(dy.mutable_data_ptr(), y.numel() * int64_t(y.element_size()));
  std::optional<Tensor> dgate;
  if (s.per_token) dgate = torch::stable::new_empty(gate, gate.sizes());
  const int64_t rows = std::max(kPartRows, (s.rows + kMaxParts - 1) / kMaxParts);
  const int64_t parts = (s.rows + rows - 1) / rows;
  std::vector<float> partial(s.per_token ? 0 : size_t(s.segments * parts * s.width));
  const GatedBackward p{s,
                        grad.const_data_ptr(),
                        y.const_data_ptr(),
                        dy.mutable_data_ptr(),
                        dgate ? dgate->mutable_data_ptr() : nullptr,
                        partial.data(),
                        parts};
  const GatedKernels& kernels = gated_residual_kernels();
  const int64_t per_part = std::max<int64_t>(1, s.rows / parts) * s.width;
  parallel_for(0, s.segments * parts, 1 + kGrainElements / per_part,
               [&](int64_t begin, int64_t end) { kernels.backward(p, begin, end); });
  if (dgate) return {dy, *dgate};
  std::vector<float> sums(size_t(s.segments * s.width), 0.f);
  for (int64_t item = 0; item < s.segments * parts; ++item)
    for (int64_t e = 0; e < s.width; ++e)
      sums[size_t(item / parts * s.width + e)] += partial[size_t(item * s.width + e)];
  return {dy, like_of(gate, sums)};
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("gated_residual_fwd", TORCH_BOX(&vitkit::cpu::forward));
  m.impl("gated_residual_bwd", TORCH_BOX(&vitkit::cpu::backward));
}
