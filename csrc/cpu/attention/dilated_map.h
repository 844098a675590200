// Token maps of dilated attention: slots of a segment, `ratio` tokens apart, of which the last may
// hold zeros; and sums over branches as the place where gradients go.
#pragma once

#include "attention/backward_map.h"
#include "attention/pack.h"
#include "dilated_attention.h"

namespace vitkit::cpu::VITKIT_ISA {

// Over a strided map whose queries from nk on are zero.
template <typename T, typename Strided>
struct Dilated : Strided {
  int64_t slots;

  const T* q_row(int64_t i) const { return i < this->nk ? Strided::q_row(i) : kZeroRow<T>; }
  // A causal query attends the slots up to its own.
  int64_t zero_keys(int64_t i) const {
    const int64_t seen = this->causal ? i + 1 : slots;
    return seen > this->nk ? seen - this->nk : 0;
  }
};

// Elements that a row is added to; null where nobody asks for them.
struct AddTo {
  float* data;
  AddTo operator+(int64_t d) const { return {data ? data + d : nullptr}; }
};

VITKIT_INLINE void store_partial(AddTo to, f32v v, int n) {
  if (to.data) store_partial(to.data, load_partial(to.data, n) + v, n);
}

template <typename T>
using DilatedMap = Dilated<T, StridedMap<T>>;

template <typename T>
struct DilatedGradMap : Dilated<T, StridedGradSource<T>> {
  int64_t lse_stride;
  float *dq, *dk, *dv;
  int64_t dq_stride, dk_stride, dv_stride;

  const float* lse(int64_t i) const { return this->lse_row + i * lse_stride; }
  AddTo dq_row(int64_t i) const { return {i < this->nk ? dq + i * dq_stride : nullptr}; }
  AddTo dk_row(int64_t j) const { return {dk + j * dk_stride}; }
  AddTo dv_row(int64_t j) const { return {dv + j * dv_stride}; }
};

// All but the results.
template <typename T, typename Map>
VITKIT_INLINE void set_tokens(const AttentionInputs& in, const DilatedBranch& b,
                              const DilatedSegment& s, int64_t batch, int64_t head, Map* map) {
  map->q = row_pointer<const T>(in.q, batch, head, s.token);
  map->k = row_pointer<const T>(in.k, batch, head, s.token);
  map->v = row_pointer<const T>(in.v, batch, head, s.token);
  map->q_stride = b.ratio * in.q.token_stride;
  map->k_stride = b.ratio * in.k.token_stride;
  map->v_stride = b.ratio * in.v.token_stride;
  map->nq = s.nq;
  map->nk = s.nk;
  map->causal = in.causal;
  map->slots = b.slots;
}

}  // namespace vitkit::cpu::VITKIT_ISA
