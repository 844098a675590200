// From tensors to what the attention kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "attention/hopper_rule.h"
#include "attention/mainloop.cuh"
#include "check.h"
#include "launch.h"

namespace vitkit::attention {

inline int as_int(const char* op, const char* what, int64_t value) {
  STD_TORCH_CHECK(value <= std::numeric_limits<int>::max(), op, ": ", what,
                  " must be below 2^31 on CUDA, got ", value);
  return int(value);
}

inline void check_head_dim(const char* op, const char* arg, const Tensor& t, int most) {
  STD_TORCH_CHECK(t.size(-1) % 8 == 0 && t.size(-1) >= 8 && t.size(-1) <= most, op, ": ", arg,
                  " must have a head dim that is a multiple of 8 up to ", most, ", got ",
                  t.size(-1));
}

// Whether rows can be copied 16 bytes at a time.
inline bool rows_aligned(const Tensor& t) {
  const int64_t elements = 16 / int64_t(t.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(-1) == 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d)
    aligned = aligned && (t.size(d) <= 1 || t.stride(d) % elements == 0);
  return aligned;
}

inline Tensor dense_copy(const Tensor& t) {
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensor with_aligned_rows(const Tensor& t) {
  return t.numel() == 0 || rows_aligned(t) ? t : dense_copy(t);
}

// [B, N, H, D], or packed [T, H, D].
inline Rows rows_of(const Tensor& t) {
  const int64_t batch = t.dim() == 4 ? t.stride(0) : 0;
  return {const_cast<void*>(t.const_data_ptr()), batch, t.stride(-3), t.stride(-2)};
}

// Packed [T, H, D] as a batch of one.
inline HopperTensor hopper_tensor(const Tensor& t) {
  HopperTensor h{reinterpret_cast<uintptr_t>(t.const_data_ptr()), {1, 1, 1, 1}, {}};
  for (int64_t d = 0; d < t.dim(); ++d) {
    h.sizes[4 - t.dim() + d] = t.size(d);
    h.strides[4 - t.dim() + d] = t.stride(d);
  }
  return h;
}

inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline const float* floats(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}

}  // namespace vitkit::attention
