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

// Whether [N, C, *] lies as [N, *, C] and not as it is written.
inline bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  bool dense = x.dim() == 4 || x.dim() == 5;
  int64_t expected = 1;
  const auto check = [&](int64_t d) {
    if (x.size(d) != 1 && x.stride(d) != expected) dense = false;
    expected *= x.size(d);
  };
  check(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) check(d);
  check(0);
  return dense;
}

// [N, C, *] as it lies where it is contiguous or channels_last, else a contiguous copy.
inline Tensor dense_image(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(x);
}

// The same values in the layout of another image, which is dense.
inline Tensor in_layout_of(const Tensor& x, const Tensor& t) {
  using torch::headeronly::MemoryFormat;
  if (!is_channels_last(x)) return torch::stable::contiguous(t);
  return torch::stable::contiguous(
      t, x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
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

// Rows of x that share a row of gate: all, those of one sample, or none.
struct Segments {
  int64_t count, rows;
  bool per_token;
};

inline Segments segments_of(const char* op, const char* arg, const Tensor& x, const Tensor& gate) {
  check_floating(op, arg, x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, op, ": ", arg,
                  " must have shape [*, E] with E >= 1");
  check_size(op, "gate", gate, -1, x.size(-1));
  const int64_t rows = x.numel() / x.size(-1);
  if (gate.dim() == x.dim()) {
    for (int64_t d = 0; d + 1 < x.dim(); ++d) check_size(op, "gate", gate, d, x.size(d));
    return {1, rows, true};
  }
  if (gate.dim() == 2) {
    check_size(op, "gate", gate, 0, x.size(0));
    const int64_t count = std::max<int64_t>(1, x.size(0));
    return {count, rows / count, false};
  }
  check_rank(op, "gate", gate, 1);
  return {1, rows, false};
}

// cos or sin, [B or 1, N', H or 1, D], of heads x [B, N, H, D]: where it lies and three strides, 0
// where it is shared.
template <typename Table>
Table angle_table(const char* op, const char* arg, const Tensor& t, const Tensor& x) {
  check_rank(op, arg, t, 4);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", arg, " must be float32");
  STD_TORCH_CHECK(t.get_device_index() == x.get_device_index(), op, ": ", arg,
                  " must be on the device of q");
  if (t.numel() > 0) check_last_dim_dense(op, arg, t);
  check_size(op, arg, t, 3, x.size(3));
  STD_TORCH_CHECK(t.size(1) <= x.size(1), op, ": ", arg, " must have at most ", x.size(1),
                  " positions, got ", t.size(1));
  for (const int64_t d : {0, 2})
    STD_TORCH_CHECK(t.size(d) == 1 || t.size(d) == x.size(d), op, ": ", arg, ".size(", d,
                    ") must be 1 or ", x.size(d), ", got ", t.size(d));
  const auto stride = [&](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  return {static_cast<const float*>(t.const_data_ptr()), stride(0), stride(1), stride(2)};
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
