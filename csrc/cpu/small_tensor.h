// Small tensors (weights, biases, modulation vectors) as float32 on the host side of a kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <initializer_list>
#include <vector>

#include "norm/element.h"
#include "rows.h"

namespace vitkit::cpu {

// Calls f with a null pointer of the element type of t.
template <typename F>
void with_element_type(const char* op, const char* arg, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<c10::BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<c10::Half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, op, ": ", arg, " must be float32, bfloat16 or float16");
  }
}

inline NormElement norm_element(const char* op, const char* arg, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return NormElement::f32;
    case ScalarType::BFloat16:
      return NormElement::bf16;
    case ScalarType::Half:
      return NormElement::f16;
    default:
      STD_TORCH_CHECK(false, op, ": ", arg, " must be float32, bfloat16 or float16");
  }
}

// t as rows of its last dimension, which must be dense, the rows one stride apart.
inline Rows rows_of(const char* op, const char* arg, const Tensor& t) {
  return {t.const_data_ptr(), norm_element(op, arg, t), t.numel() > 0 ? row_stride(op, arg, t) : 0};
}

// The values of a tensor of rank 1 or 2 in row-major order, whatever its strides; empty if absent.
inline std::vector<float> small_floats(const char* op, const char* arg,
                                       const std::optional<Tensor>& t,
                                       std::initializer_list<int64_t> sizes) {
  if (!t) return {};
  check_rank(op, arg, *t, int64_t(sizes.size()));
  int64_t dim = 0;
  for (const int64_t size : sizes) check_size(op, arg, *t, dim++, size);
  const bool matrix = t->dim() == 2;
  const int64_t rows = matrix ? t->size(0) : 1, columns = t->size(-1);
  const int64_t row_stride = matrix ? t->stride(0) : 0, column_stride = t->stride(-1);
  std::vector<float> out(size_t(rows * columns));
  with_element_type(op, arg, *t, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* data = static_cast<const T*>(t->const_data_ptr());
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        out[size_t(i * columns + j)] = float(data[i * row_stride + j * column_stride]);
  });
  return out;
}

// A new contiguous tensor with the shape and dtype of `like`, holding `values`.
inline Tensor like_of(const Tensor& like, const std::vector<float>& values) {
  Tensor out = torch::stable::new_empty(like, like.sizes());
  with_element_type("vitkit", "gradient", out, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    T* data = static_cast<T*>(out.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) data[i] = T(values[i]);
  });
  return out;
}

}  // namespace vitkit::cpu
