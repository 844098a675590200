// Token map of the gradient: where the rows of one attention problem, its saved results and its
// gradients lie in memory.
//   nq, nk, causal, q_row(i), k_row(j), v_row(j), out_row(i), lse(i)    as in the forward pass
//   grad_row(i, buffer)              row i of grad_out; `buffer` holds it where it is not dense
//   grad_lse(i)                      gradient of lse(i)
//   prefetch_query(i)                fetches row i of q, out and grad_out into the cache
//   dq_row(i), dk_row(j), dv_row(j)  where gradients go: pointers, or what else store_partial takes
#pragma once

#include "attention/token_map.h"

namespace vitkit::cpu::VITKIT_ISA {

// What is read.
template <typename T>
struct StridedGradSource : StridedMap<T> {
  const T* grad;
  int64_t grad_stride, grad_dim_stride, head_dim;
  const float* grad_lse_row;  // null: zero
  int64_t grad_lse_stride;

  const T* grad_row(int64_t i, T* buffer) const {
    const T* row = grad + i * grad_stride;
    if (grad_dim_stride == 1) return row;
    for (int64_t d = 0; d < head_dim; ++d) buffer[d] = row[d * grad_dim_stride];
    return buffer;
  }
  float grad_lse(int64_t i) const { return grad_lse_row ? grad_lse_row[i * grad_lse_stride] : 0.f; }
  void prefetch_query(int64_t i) const {
    constexpr int64_t kLine = 64 / int64_t(sizeof(T));
    for (int64_t d = 0; d < head_dim; d += kLine) {
      __builtin_prefetch(this->q_row(i) + d);
      __builtin_prefetch(this->out_row(i) + d);
      if (grad_dim_stride == 1) __builtin_prefetch(grad + i * grad_stride + d);
    }
  }
};

template <typename T>
struct StridedGradMap : StridedGradSource<T> {
  T *dq, *dk, *dv;
  int64_t dq_stride, dk_stride, dv_stride;

  T* dq_row(int64_t i) const { return dq + i * dq_stride; }
  T* dk_row(int64_t j) const { return dk + j * dk_stride; }
  T* dv_row(int64_t j) const { return dv + j * dv_stride; }
};

}  // namespace vitkit::cpu::VITKIT_ISA
