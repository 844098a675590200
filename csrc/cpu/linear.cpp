// linear on the CPU: groups of columns and ranges of rows to threads.
#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "attention/inputs.h"
#include "isa.h"
#include "memory.h"
#include "panel_items.h"
#include "small_tensor.h"

VITKIT_ISA_TABLE(LinearKernels, linear_kernels)

namespace vitkit::cpu {
namespace {

// Packed columns of one item: they stay in a 1 MiB cache, or nearly so in one of half that.
constexpr int64_t kGroupBytes = 768 << 10;
// Rows below which packing a group once more costs more than a percent or two of their products.
constexpr int64_t kLeastRows = 768;
constexpr int64_t kItemsPerThread = 4;

// How the work is cut changes no result: every sum is taken in one order.
void cut(LinearForward& p, const LinearKernels& kernels, int64_t threads) {
  const int64_t panels = divide_up(p.columns, kernels.panel);
  const int64_t bytes = p.columns * p.depth * int64_t(sizeof(float));
  const auto [groups, ranges] = share_panels(panels, divide_up(bytes, kGroupBytes),
                                             p.rows / kLeastRows, threads, kItemsPerThread);
  p.group_panels = divide_up(panels, groups);
  p.range_rows = divide_up(divide_up(p.rows, ranges), kernels.row_step) * kernels.row_step;
}

Tensor linear_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, bool gelu, bool tanh) {
  constexpr const char* kOp = "linear";
  check_floating(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x must have at least one dimension");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), kOp,
                  ": weight must have the dtype of x");
  STD_TORCH_CHECK(weight.get_device_index() == x.get_device_index(), kOp,
                  ": weight must be on the device of x");
  check_rank(kOp, "weight", weight, 2);
  check_size(kOp, "weight", weight, 1, x.size(-1));
  std::vector<int64_t> sizes(size_t(x.dim()));
  for (int64_t d = 0; d < x.dim(); ++d) sizes[size_t(d)] = x.size(d);
  LinearForward p{};
  p.depth = sizes.back();
  p.columns = sizes.back() = weight.size(0);
  std::vector<float> shift = small_floats(kOp, "bias", bias, {p.columns});
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  STD_TORCH_CHECK(p.depth > 0, kOp, ": x must have a last dimension of at least 1, got 0");
  p.type = element_type(x);
  p.activation = !gelu   ? LinearActivation::none
                 : !tanh ? LinearActivation::gelu
                         : LinearActivation::gelu_tanh;
  p.rows = y.numel() / p.columns;
  p.x = static_cast<const char*>(x.const_data_ptr());
  p.x_stride = row_stride(kOp, "x", x);
  p.weight = static_cast<const char*>(weight.const_data_ptr());
  p.weight_stride = row_stride(kOp, "weight", weight);
  if (bias) shift.resize(shift.size() + size_t(kLinearPadding));
  p.bias = bias ? shift.data() : nullptr;
  p.y = static_cast<char*>(y.mutable_data_ptr());
  prefer_huge_pages(y);
  const LinearKernels& kernels = linear_kernels();
  const int64_t threads = threads_for(2. * double(p.rows) * double(p.depth) * double(p.columns));
  cut(p, kernels, threads);
  run_panel_items(p, kernels, threads);
  return y;
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&vitkit::cpu::linear_forward));
}
