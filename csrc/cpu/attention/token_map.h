// Token maps: where the rows of one attention problem (one head of one batch element, sequence,
// window or segment) lie in memory. A map has
//   nq, nk, causal                      queries, keys; whether query i attends only keys j <= i
//   q_row(i), k_row(j), v_row(j)        pointers to head_dim elements
//   out_row(i), lse(i)                  where the result of query i goes
//   zero_keys(i)                        how many more keys query i attends whose score and value
//                                       are zero: they have no rows
// and may have
//   fetch_ahead()                       called now and then: fetches rows that will be needed later
// The core (forward.h) knows nothing else about a layout.
#pragma once

#include "attention/params.h"
#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

template <typename T>
VITKIT_INLINE T* row_pointer(const RowsView& view, int64_t batch, int64_t head, int64_t token) {
  return reinterpret_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         token * view.token_stride;
}

template <typename Map>
VITKIT_INLINE void fetch_ahead(const Map& map) {
  if constexpr (requires { map.fetch_ahead(); }) map.fetch_ahead();
}

// Rows a fixed stride apart: dense batches and packed sequences.
template <typename T>
struct StridedMap {
  const T *q, *k, *v;
  T* out;
  float* lse_row;
  int64_t q_stride, k_stride, v_stride, out_stride;
  int64_t nq, nk;
  bool causal;

  const T* q_row(int64_t i) const { return q + i * q_stride; }
  const T* k_row(int64_t j) const { return k + j * k_stride; }
  const T* v_row(int64_t j) const { return v + j * v_stride; }
  T* out_row(int64_t i) const { return out + i * out_stride; }
  float* lse(int64_t i) const { return lse_row + i; }
  static constexpr int64_t zero_keys(int64_t) { return 0; }
};

}  // namespace vitkit::cpu::VITKIT_ISA
