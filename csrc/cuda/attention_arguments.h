// q, k and v of the attention operators, and what their outputs look like.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/backward.cuh"
#include "attention/forward.cuh"
#include "attention_tensors.h"

namespace vitkit::attention {

inline void check_cu_seqlens(const char* op, const char* arg, const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.size(0) >= 1 &&
                      (t.size(0) == 1 || t.stride(0) == 1) &&
                      t.get_device_index() == q.get_device_index(),
                  op, ": ", arg, " must be a dense int32 [S + 1] on the device of q");
}

// The arguments of both directions but the score term. Holds the tensors whose memory the
// parameters point to.
struct AttentionArguments {
  const char* op;
  Tensor q, k, v;
  Element element;
  bool packed, causal;
  double scale;
  SequenceMap map;
  int head_dim, rows_q, rows_k;

  AttentionArguments(const char* op_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                     const std::optional<Tensor>& cu_seqlens_q,
                     const std::optional<Tensor>& cu_seqlens_k, bool causal_in, double scale_in)
      : op(op_in), packed(cu_seqlens_q.has_value()), causal(causal_in), scale(scale_in) {
    check_floating(op, "q", q_in);
    STD_TORCH_CHECK(packed == cu_seqlens_k.has_value(), op,
                    ": cu_seqlens_q and cu_seqlens_k must be given together");
    const int64_t rank = packed ? 3 : 4;
    check_rank(op, "q", q_in, rank);
    for (const auto& [arg, t] : {std::pair<const char*, const Tensor*>{"k", &k_in}, {"v", &v_in}}) {
      check_rank(op, arg, *t, rank);
      check_like_q(arg, *t, q_in);
      if (!packed) check_size(op, arg, *t, 0, q_in.size(0));
      check_size(op, arg, *t, rank - 3, k_in.size(rank - 3));
      check_size(op, arg, *t, rank - 2, q_in.size(-2));
      check_size(op, arg, *t, rank - 1, q_in.size(-1));
    }
    check_head_dim(op, "q", q_in, kMaxHeadDim);
    element = element_of(op, "q", q_in);
    q = with_aligned_rows(q_in);
    k = with_aligned_rows(k_in);
    v = with_aligned_rows(v_in);
    head_dim = int(q.size(-1));
    map = {packed ? 1 : as_int(op, "B", q.size(0)),
           as_int(op, "H", q.size(-2)),
           as_int(op, "the number of queries", q.size(-3)),
           as_int(op, "the number of keys", k.size(-3)),
           packed ? 0 : 1,
           nullptr,
           nullptr};
    if (packed) add_sequences(*cu_seqlens_q, *cu_seqlens_k);
    // Packed lengths are on the device: taken to be equal.
    const int share = std::max(map.sequences, 1);
    rows_q = (map.n_q + share - 1) / share;
    rows_k = (map.n_k + share - 1) / share;
  }

  float scale_log2() const { return float(scale * double(kLog2e)); }
  std::vector<int64_t> lse_sizes() const {
    if (packed) return {map.heads, map.n_q};
    return {map.batch, map.heads, map.n_q};
  }
  int64_t lse_batch() const { return packed ? 0 : int64_t(map.heads) * map.n_q; }

  void check_like_q(const char* arg, const Tensor& t, const Tensor& like) const {
    STD_TORCH_CHECK(
        t.scalar_type() == like.scalar_type() && t.get_device_index() == like.get_device_index(),
        op, ": ", arg, " must have the dtype and device of q");
  }

  // q, k and v, and results laid out as q and [B, H, Nq].
  ForwardTensors forward(Tensor& out, Tensor& lse) const {
    return {rows_of(q),  rows_of(k), rows_of(v), rows_of(out), floats(lse),
            lse_batch(), map.n_q,    head_dim,   causal,       scale_log2()};
  }

 private:
  void add_sequences(const Tensor& cu_q, const Tensor& cu_k) {
    check_cu_seqlens(op, "cu_seqlens_q", cu_q, q);
    check_cu_seqlens(op, "cu_seqlens_k", cu_k, q);
    check_size(op, "cu_seqlens_k", cu_k, 0, cu_q.size(0));
    map.sequences = as_int(op, "the number of sequences", cu_q.size(0) - 1);
    map.cu_seqlens_q = static_cast<const int32_t*>(cu_q.const_data_ptr());
    map.cu_seqlens_k = static_cast<const int32_t*>(cu_k.const_data_ptr());
  }
};

// The gradient's arguments, and its results but that of the term. Without `out` there is no delta.
struct AttentionGradient {
  Tensor dq, dk, dv;
  BackwardTensors tensors{};

  AttentionGradient(const AttentionArguments& a, const Tensor& grad,
                    const std::optional<Tensor>& grad_lse, const std::optional<Tensor>& out,
                    const Tensor& lse) {
    check_rows(a, "grad", grad);
    if (out) check_rows(a, "out", *out);
    const std::vector<int64_t> sizes = a.lse_sizes();
    STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(), a.op,
                    ": lse must be contiguous float32");
    STD_TORCH_CHECK(!grad_lse || grad_lse->scalar_type() == ScalarType::Float, a.op,
                    ": grad_lse must be float32");
    for (const Tensor* t : {&lse, grad_lse ? &*grad_lse : &lse}) {
      check_rank(a.op, "lse", *t, int64_t(sizes.size()));
      for (size_t d = 0; d < sizes.size(); ++d) check_size(a.op, "lse", *t, int64_t(d), sizes[d]);
    }
    dq = torch::stable::new_empty(a.q, a.q.sizes());
    dk = torch::stable::new_empty(a.k, a.k.sizes());
    dv = torch::stable::new_empty(a.v, a.v.sizes());
    grad_ = with_aligned_rows(grad);
    tensors.q = rows_of(a.q);
    tensors.k = rows_of(a.k);
    tensors.v = rows_of(a.v);
    tensors.grad = rows_of(grad_);
    tensors.dq = rows_of(dq);
    tensors.dk = rows_of(dk);
    tensors.dv = rows_of(dv);
    tensors.lse = floats(lse);
    if (out) {
      out_ = with_aligned_rows(*out);
      delta_ = torch::stable::empty_like(lse);
      tensors.out = rows_of(out_);
      tensors.delta = floats(delta_);
    }
    tensors.lse_batch = a.lse_batch();
    tensors.lse_head = a.map.n_q;
    if (grad_lse) {
      tensors.grad_lse = floats(*grad_lse);
      tensors.grad_lse_batch = a.packed ? 0 : grad_lse->stride(0);
      tensors.grad_lse_head = grad_lse->stride(-2);
      tensors.grad_lse_token = grad_lse->stride(-1);
    }
    tensors.head_dim = a.head_dim;
    tensors.causal = a.causal;
    tensors.scale = a.scale_log2();
  }

 private:
  static void check_rows(const AttentionArguments& a, const char* arg, const Tensor& t) {
    check_rank(a.op, arg, t, a.q.dim());
    a.check_like_q(arg, t, a.q);
    for (int64_t d = 0; d < a.q.dim(); ++d) check_size(a.op, arg, t, d, a.q.size(d));
  }

  Tensor grad_, out_, delta_;
};

}  // namespace vitkit::attention
