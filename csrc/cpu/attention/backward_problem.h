// From the plain parameters of the host file to one problem: its extent, map, term and sink.
#pragma once

#include "attention/backward_bias.h"
#include "attention/backward_map.h"
#include "attention/score_term.h"
#include "flash_attention_bwd.h"

namespace vitkit::cpu::VITKIT_ISA {

// Queries and keys of one batch element or sequence: first token and count.
struct GradExtent {
  int64_t q, nq, k, nk;

  GradExtent(const AttentionInputs& in, int64_t b) : q(0), nq(in.nq), k(0), nk(in.nk) {
    if (!in.starts_q) return;
    q = in.starts_q[b];
    nq = in.starts_q[b + 1] - q;
    k = in.starts_k[b];
    nk = in.starts_k[b + 1] - k;
  }
};

template <typename T>
VITKIT_INLINE T* row_pointer(const RowsView& view, const BackwardProblem& at, int64_t token) {
  return row_pointer<T>(view, at.batch, at.head, token);
}

template <typename T>
VITKIT_INLINE StridedGradMap<T> grad_map(const FlashBackward& p, const BackwardProblem& at,
                                         const GradExtent& e) {
  StridedGradMap<T> map;
  map.nq = e.nq;
  map.nk = e.nk;
  map.causal = p.in.causal;
  map.q = row_pointer<T>(p.in.q, at, e.q);
  map.k = row_pointer<T>(p.in.k, at, e.k);
  map.v = row_pointer<T>(p.in.v, at, e.k);
  map.q_stride = p.in.q.token_stride;
  map.k_stride = p.in.k.token_stride;
  map.v_stride = p.in.v.token_stride;
  map.out = row_pointer<T>(p.out, at, e.q);
  map.out_stride = p.out.token_stride;
  map.lse_row =
      const_cast<float*>(p.lse) + at.batch * p.lse_batch_stride + at.head * p.lse_head_stride + e.q;
  map.grad = row_pointer<T>(p.grad, at, e.q);
  map.grad_stride = p.grad.token_stride;
  map.grad_dim_stride = p.grad_dim_stride;
  map.head_dim = p.in.head_dim;
  map.grad_lse_stride = p.grad_lse_query_stride;
  map.grad_lse_row = p.grad_lse
                         ? p.grad_lse + at.batch * p.grad_lse_batch_stride +
                               at.head * p.grad_lse_head_stride + e.q * p.grad_lse_query_stride
                         : nullptr;
  map.dq = row_pointer<T>(p.dq, at, e.q);
  map.dk = row_pointer<T>(p.dk, at, e.k);
  map.dv = row_pointer<T>(p.dv, at, e.k);
  map.dq_stride = p.dq.token_stride;
  map.dk_stride = p.dk.token_stride;
  map.dv_stride = p.dv.token_stride;
  return map;
}

VITKIT_INLINE int64_t element_bytes(ElementType type) {
  return type == ElementType::f32 ? 4 : (type == ElementType::boolean ? 1 : 2);
}

VITKIT_INLINE DenseTerm dense_term(const BiasView& bias, const BackwardProblem& at) {
  const int64_t offset = at.batch * bias.batch_stride + at.head * bias.head_stride;
  return {bias.data + offset * element_bytes(bias.type), bias.type, bias.query_stride,
          bias.key_stride};
}

VITKIT_INLINE DenseSink dense_sink(const BiasGradView& dbias, const BackwardProblem& at) {
  const int64_t offset =
      at.copy * dbias.copy_stride + at.batch * dbias.batch_stride + at.head * dbias.head_stride;
  return {dbias.data + offset * element_bytes(dbias.type), dbias.type, dbias.accumulate,
          dbias.query_stride, dbias.key_stride};
}

}  // namespace vitkit::cpu::VITKIT_ISA
