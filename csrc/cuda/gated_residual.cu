// gated_residual on CUDA: checks, allocations, launches.
#include "gated_residual.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "row_tensors.h"

namespace vitkit::gated_residual {
namespace {

constexpr const char* kOp = "gated_residual";
constexpr int64_t kMaxWidth = int64_t(1) << 30;

// `x` stands for grad in the gradient.
Shape read_shape(const char* arg, const Tensor& x, const Tensor& y, const Tensor& gate) {
  const Segments found = segments_of(kOp, arg, x, gate);
  STD_TORCH_CHECK(x.size(-1) <= kMaxWidth, kOp, ": ", arg, " must have E up to ", kMaxWidth);
  check_like(kOp, "y", y, arg, x);
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous(), kOp, ": ", arg,
                  " and y must be contiguous");
  return {found.count, found.rows, int(x.size(-1)), found.per_token, rows_of(kOp, "gate", gate, x)};
}

Tensor forward(Tensor x, Tensor y, Tensor gate) {
  const Shape s = read_shape("x", x, y, gate);
  Tensor out = torch::stable::empty_like(x);
  if (x.numel() == 0) return out;
  const Launch launch(x);
  const ForwardParams p{s, x.const_data_ptr(), y.const_data_ptr(), out.mutable_data_ptr(),
                        Tiling{}};
  check_launch(kOp, gated_residual_forward(p, element_of(kOp, "x", x), launch.stream()));
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor y, Tensor gate) {
  const Shape s = read_shape("grad", grad, y, gate);
  Tensor dy = torch::stable::empty_like(y);
  Tensor dgate = torch::stable::new_empty(gate, gate.sizes());
  if (y.numel() == 0) {
    torch::stable::zero_(dgate);
    return {dy, dgate};
  }
  const Launch launch(y);
  const int64_t part_rows = part_rows_of(s.rows), parts = (s.rows + part_rows - 1) / part_rows;
  Tensor partial = torch::stable::new_empty(y, {s.per_token ? 0 : s.segments * parts * s.width},
                                            ScalarType::Float);
  const BackwardParams p{s,
                         grad.const_data_ptr(),
                         y.const_data_ptr(),
                         dy.mutable_data_ptr(),
                         {dgate.mutable_data_ptr(), element_of(kOp, "gate", gate)},
                         s.per_token ? nullptr : static_cast<float*>(partial.mutable_data_ptr()),
                         parts,
                         part_rows,
                         Tiling{}};
  check_launch(kOp, gated_residual_backward(p, element_of(kOp, "y", y), launch.stream()));
  return {dy, dgate};
}

}  // namespace
}  // namespace vitkit::gated_residual

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("gated_residual_fwd", TORCH_BOX(&vitkit::gated_residual::forward));
  m.impl("gated_residual_bwd", TORCH_BOX(&vitkit::gated_residual::backward));
}
