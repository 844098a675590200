// Token maps: where the rows of one attention problem (one head of one batch element, sequence,
// window or segment) lie in memory. A map has
//   nq, nk, causal                      queries, keys; whether query i attends only keys j <= i
//   q_row(i), k_row(j), v_row(j)        pointers to head_dim elements
//   out_row(i), lse(i)                  where the result of query i goes
// and may have
//   fetch_ahead()                       called now and then: fetches rows that will be needed later
// The core (forward.h) knows nothing else about a layout.
#pragma once

#include "attention/params.h"
#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

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
};

}  // namespace vitkit::cpu::VITKIT_ISA
