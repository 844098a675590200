// The host side of swiglu, geglu and gelu on CUDA: tensors to rows. Each op's own file instantiates
// its activations.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "gated_activation.cuh"
#include "launch.h"
#include "rows.h"

namespace vitkit::gated_activation {

using Optional = std::optional<Tensor>;
using Forward = const char* (*)(ForwardParams, Element, Stream);
using Backward = const char* (*)(BackwardParams, Element, Stream);

inline Rows rows_from(const Tensor& t, int64_t offset, int64_t stride) {
  // Not const because results are rows, too.
  char* const data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  return {data + offset * int64_t(t.element_size()), stride};
}

struct Halves {
  Rows value, gate;
};

// Of two tensors, or the halves of one.
inline Halves halves(const char* op, const Tensor& x, const Optional& gate, bool gate_last) {
  const int64_t stride = row_stride(op, "x", x);
  if (gate) return {rows_from(x, 0, stride), rows_from(*gate, 0, row_stride(op, "gate", *gate))};
  const Rows first = rows_from(x, 0, stride), second = rows_from(x, x.size(-1) / 2, stride);
  return gate_last ? Halves{first, second} : Halves{second, first};
}

inline Tensor gated_forward(const char* op, Forward run, const Tensor& x, const Optional& gate,
                            bool gate_last) {
  const std::vector<int64_t> sizes = gated_sizes(op, x, gate);
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  const Halves in = halves(op, x, gate, gate_last);
  const int64_t columns = sizes.back(), rows = y.numel() / columns;
  const Launch launch(x);
  check_launch(op, run({rows, columns, in.value, in.gate, rows_from(y, 0, columns), Tiling{}},
                       element_of(op, "x", x), launch.stream()));
  return y;
}

inline std::tuple<Tensor, Tensor> gated_backward(const char* op, Backward run, const Tensor& grad,
                                                 const Tensor& x, const Optional& gate,
                                                 bool gate_last) {
  const std::vector<int64_t> sizes = gated_sizes(op, x, gate);
  check_gated_gradient(op, grad, x, sizes);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dgate = gate ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  if (dx.numel() == 0) return {dx, dgate};
  const Halves in = halves(op, x, gate, gate_last);
  const Halves out = halves(op, dx, gate ? Optional(dgate) : std::nullopt, gate_last);
  const int64_t columns = sizes.back(), rows = grad.numel() / columns;
  const Rows of_grad = rows_from(grad, 0, row_stride(op, "grad", grad));
  const Launch launch(x);
  check_launch(op, run({rows, columns, of_grad, in.value, in.gate, out.value, out.gate, Tiling{}},
                       element_of(op, "x", x), launch.stream()));
  return {dx, dgate};
}

// All elements as one row, in whatever order they lie.

inline Tensor activation_forward(const char* op, Forward run, const Tensor& x) {
  check_floating(op, "x", x);
  Tensor y = torch::stable::empty_like(x);
  const int64_t n = x.numel();
  if (n == 0) return y;
  check_dense(op, "x", x);
  const Launch launch(x);
  check_launch(op, run({1, n, {nullptr, 0}, rows_from(x, 0, n), rows_from(y, 0, n), Tiling{}},
                       element_of(op, "x", x), launch.stream()));
  return y;
}

inline Tensor activation_backward(const char* op, Backward run, const Tensor& grad,
                                  const Tensor& x) {
  check_floating(op, "x", x);
  check_like(op, "grad", grad, "x", x);
  Tensor dx = torch::stable::empty_like(x);
  const int64_t n = x.numel();
  if (n == 0) return dx;
  check_dense(op, "x", x);
  check_same_layout(op, grad, x);
  const Rows none{nullptr, 0};
  const Launch launch(x);
  check_launch(op, run({1, n, rows_from(grad, 0, n), none, rows_from(x, 0, n), none,
                        rows_from(dx, 0, n), Tiling{}},
                       element_of(op, "x", x), launch.stream()));
  return dx;
}

}  // namespace vitkit::gated_activation
