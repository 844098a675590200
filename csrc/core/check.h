// Checks of the C++ host files. User errors are found in Python, before anything runs and
// identically for every backend (vitkit/ops); these guard the operator's own contract when it is
// called directly.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace vitkit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_floating(const char* op, const char* arg, const Tensor& t) {
  STD_TORCH_CHECK(is_floating(t.scalar_type()), op, ": ", arg,
                  " must be float32, bfloat16 or float16");
}

inline void check_rank(const char* op, const char* arg, const Tensor& t, int64_t rank) {
  STD_TORCH_CHECK(t.dim() == rank, op, ": ", arg, " must have ", rank, " dimensions, got ",
                  t.dim());
}

inline void check_size(const char* op, const char* arg, const Tensor& t, int64_t dim,
                       int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, op, ": ", arg, ".size(", dim, ") must be ", size, ", got ",
                  t.size(dim));
}

inline void check_last_dim_dense(const char* op, const char* arg, const Tensor& t) {
  STD_TORCH_CHECK(t.size(-1) <= 1 || t.stride(-1) == 1, op, ": ", arg,
                  " must have stride 1 in its last dimension, got ", t.stride(-1));
}

}  // namespace vitkit
