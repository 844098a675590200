// Host side of the attention ops: tensors to AttentionInputs, with the operator's own checks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "attention/params.h"

namespace vitkit::cpu {

// Dense q [B, Nq, H, D], k, v [B, Nk, H, D], or packed q [Tq, H, D], k, v [Tk, H, D] with int32
// cu_seqlens [S + 1]. bias [B|1, H|1, Nq|1, Nk|1]. Owns the clamped sequence starts that `in`
// points to.
class AttentionArguments {
 public:
  using Tensor = torch::stable::Tensor;

  AttentionArguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& cu_seqlens_q,
                     const std::optional<Tensor>& cu_seqlens_k, bool causal, double scale);
  // Dense, without a bias so far.
  AttentionArguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                     double scale)
      : AttentionArguments(op, q, k, v, {}, {}, {}, causal, scale) {}
  AttentionArguments(const AttentionArguments&) = delete;

  bool packed() const { return in.starts_q != nullptr; }
  int64_t queries(int64_t b) const {
    return packed() ? in.starts_q[b + 1] - in.starts_q[b] : in.nq;
  }
  int64_t keys(int64_t b) const { return packed() ? in.starts_k[b + 1] - in.starts_k[b] : in.nk; }
  // False when some tokens belong to no sequence, which no kernel will then visit.
  bool covers_queries() const { return !packed() || queries_covered_ == in.nq; }
  bool covers_keys() const { return !packed() || keys_covered_ == in.nk; }

  // rel_h [B, H, Nq, Kh], rel_w [B, H, Nq, Kw] of one type, rows dense, Kh * Kw = Nk.
  void add_decomposed_bias(const char* op, const Tensor& rel_h, const Tensor& rel_w);
  // slopes [H], coords_q [B|1, Nq, 2], coords_k [B|1, Nk, 2], float32.
  void add_distance_bias(const char* op, const Tensor& slopes, const Tensor& coords_q,
                         const Tensor& coords_k);

  AttentionInputs in;  // packed: nq and nk are the totals Tq and Tk

 private:
  std::vector<int64_t> starts_q_, starts_k_;
  std::vector<float> slopes_, coords_q_, coords_k_;
  int64_t queries_covered_ = 0, keys_covered_ = 0;
};

ElementType element_type(const torch::stable::Tensor& t);

// Rows of a [B, N, H, D] or packed [T, H, D] tensor. `data` is not const because outputs are rows
// too.
RowsView rows_view(const torch::stable::Tensor& t);

// lse, or its gradient: float32 [B, H, N], packed [H, T].
LseView lse_view(const char* op, const char* arg, const torch::stable::Tensor& t,
                 const AttentionInputs& in);

}  // namespace vitkit::cpu
