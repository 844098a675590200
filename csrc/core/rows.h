// Tensors as rows and as runs of elements: checks that host files of CPU and CUDA kernels share.
#pragma once

#include <algorithm>
#include <vector>

#include "check.h"

namespace vitkit {

// Elements from one row of a non-empty tensor to the next: its leading dimensions must be one run
// of rows.
inline int64_t row_stride(const char* op, const char* arg, const Tensor& t) {
  check_last_dim_dense(op, arg, t);
  int64_t stride = 0, expected = -1;
  for (int64_t d = t.dim() - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (expected < 0) {
      stride = t.stride(d);
    } else {
      STD_TORCH_CHECK(t.stride(d) == expected, op, ": ", arg,
                      " must be rows at one distance from each other");
    }
    expected = t.stride(d) * t.size(d);
  }
  return stride;
}

// Every element of a non-empty tensor must lie between the first and the last, once.
inline void check_dense(const char* op, const char* arg, const Tensor& t) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.push_back(d);
  std::sort(dims.begin(), dims.end(),
            [&](int64_t a, int64_t b) { return t.stride(a) < t.stride(b); });
  int64_t expected = 1;
  for (const int64_t d : dims) {
    STD_TORCH_CHECK(t.stride(d) == expected, op, ": ", arg, " must be dense");
    expected *= t.size(d);
  }
}

inline void check_like(const char* op, const char* arg, const Tensor& t, const char* other,
                       const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", arg, " must have the dtype of ",
                  other);
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), op, ": ", arg,
                  " must be on the device of ", other);
  check_rank(op, arg, t, like.dim());
  for (int64_t d = 0; d < like.dim(); ++d) check_size(op, arg, t, d, like.size(d));
}

// The sizes of value * activation(gate), of two tensors or of the halves of one.
inline std::vector<int64_t> gated_sizes(const char* op, const Tensor& x,
                                        const std::optional<Tensor>& gate) {
  check_floating(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  std::vector<int64_t> sizes(size_t(x.dim()));
  for (int64_t d = 0; d < x.dim(); ++d) sizes[size_t(d)] = x.size(d);
  if (gate) {
    check_like(op, "gate", *gate, "x", x);
  } else {
    STD_TORCH_CHECK(sizes.back() % 2 == 0, op, ": x must have an even last dimension, got ",
                    sizes.back());
    sizes.back() /= 2;
  }
  return sizes;
}

// Of the gradient of such a result.
inline void check_gated_gradient(const char* op, const Tensor& grad, const Tensor& x,
                                 const std::vector<int64_t>& sizes) {
  check_rank(op, "grad", grad, x.dim());
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": grad must have the dtype of x");
  STD_TORCH_CHECK(grad.get_device_index() == x.get_device_index(), op,
                  ": grad must be on the device of x");
  for (int64_t d = 0; d < x.dim(); ++d) check_size(op, "grad", grad, d, sizes[size_t(d)]);
}

// Of an activation alone, which takes elements in the order in which they lie.
inline void check_same_layout(const char* op, const Tensor& grad, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(x.size(d) == 1 || grad.stride(d) == x.stride(d), op,
                    ": grad must have the layout of x");
}

}  // namespace vitkit
