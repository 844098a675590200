#include "attention/inputs.h"

#include <algorithm>

#include "check.h"
#include "small_tensor.h"

namespace vitkit::cpu {
namespace {

constexpr int64_t kMaxHeadDim = 256;

// Non-decreasing and inside [0, tokens] whatever the values: sequences are then disjoint and in
// bounds.
std::vector<int64_t> clamped_starts(const Tensor& cu_seqlens, int64_t tokens) {
  const auto* values = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t count = cu_seqlens.numel(), stride = cu_seqlens.stride(0);
  std::vector<int64_t> starts(static_cast<size_t>(count));
  int64_t previous = 0;
  for (int64_t i = 0; i < count; ++i)
    previous = starts[size_t(i)] =
        std::min(std::max<int64_t>(values[i * stride], previous), tokens);
  return starts;
}

void check_shapes(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, bool packed) {
  const int64_t rank = packed ? 3 : 4;
  const std::pair<const char*, const Tensor*> arguments[] = {{"q", &q}, {"k", &k}, {"v", &v}};
  for (const auto& [arg, t] : arguments) {
    check_floating(op, arg, *t);
    check_rank(op, arg, *t, rank);
    check_last_dim_dense(op, arg, *t);
    check_size(op, arg, *t, rank - 1, q.size(rank - 1));
    check_size(op, arg, *t, rank - 2, q.size(rank - 2));
    if (!packed) check_size(op, arg, *t, 0, q.size(0));
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), op, ": ", arg,
                    " must have the dtype of q");
  }
  check_size(op, "v", v, rank - 3, k.size(rank - 3));
  const int64_t head_dim = q.size(rank - 1);
  STD_TORCH_CHECK(head_dim % 8 == 0 && head_dim > 0 && head_dim <= kMaxHeadDim, op,
                  ": head_dim must be a multiple of 8 up to ", kMaxHeadDim, ", got ", head_dim);
}

void check_cu_seqlens(const char* op, const char* arg, const Tensor& t) {
  check_rank(op, arg, t, 1);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.numel() >= 1, op, ": ", arg,
                  " must be int32 with at least one element");
}

BiasView bias_view(const char* op, const Tensor& bias, const AttentionInputs& in) {
  check_rank(op, "bias", bias, 4);
  const int64_t sizes[4] = {in.batch, in.heads, in.nq, in.nk};
  int64_t strides[4];
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(bias.size(d) == 1 || bias.size(d) == sizes[d], op, ": bias.size(", d,
                    ") must be 1 or ", sizes[d], ", got ", bias.size(d));
    strides[d] = bias.size(d) == 1 ? 0 : bias.stride(d);
  }
  return {static_cast<const char*>(bias.const_data_ptr()),
          element_type(bias),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

constexpr int64_t kPadding = 16;  // floats that a vector may read beyond the last one

// The x coordinates of every batch element, then its y coordinates: planes of `tokens` floats.
std::vector<float> planes(const char* op, const char* arg, const Tensor& t, int64_t batch,
                          int64_t tokens) {
  check_rank(op, arg, t, 3);
  if (t.size(0) != 1) check_size(op, arg, t, 0, batch);
  check_size(op, arg, t, 1, tokens);
  check_size(op, arg, t, 2, 2);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", arg, " must be float32");
  const auto* from = static_cast<const float*>(t.const_data_ptr());
  std::vector<float> to(size_t(t.size(0) * 2 * tokens + kPadding));
  float* next = to.data();
  for (int64_t b = 0; b < t.size(0); ++b)
    for (int64_t axis = 0; axis < 2; ++axis)
      for (int64_t i = 0; i < tokens; ++i)
        *next++ = from[b * t.stride(0) + i * t.stride(1) + axis * t.stride(2)];
  return to;
}

}  // namespace

ElementType element_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return ElementType::f32;
    case ScalarType::BFloat16:
      return ElementType::bf16;
    case ScalarType::Half:
      return ElementType::f16;
    case ScalarType::Bool:
      return ElementType::boolean;
    default:
      STD_TORCH_CHECK(false, "vitkit: a tensor must be float32, bfloat16, float16 or bool");
  }
}

RowsView rows_view(const Tensor& t) {
  const int64_t r = t.dim();
  return {static_cast<char*>(t.data_ptr()), r == 4 ? t.stride(0) : 0, t.stride(r - 3),
          t.stride(r - 2)};
}

LseView lse_view(const char* op, const char* arg, const Tensor& t, const AttentionInputs& in) {
  const int64_t h = in.starts_q ? 0 : 1;
  check_rank(op, arg, t, h + 2);
  if (h) check_size(op, arg, t, 0, in.batch);
  check_size(op, arg, t, h, in.heads);
  check_size(op, arg, t, h + 1, in.nq);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", arg, " must be float32");
  return {static_cast<const float*>(t.const_data_ptr()), h ? t.stride(0) : 0, t.stride(h),
          t.stride(h + 1)};
}

AttentionArguments::AttentionArguments(const char* op, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& cu_seqlens_q,
                                       const std::optional<Tensor>& cu_seqlens_k, bool causal,
                                       double scale)
    : in{} {
  STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), op,
                  ": cu_seqlens_q and cu_seqlens_k must be given together");
  const bool is_packed = cu_seqlens_q.has_value();
  check_shapes(op, q, k, v, is_packed);
  const int64_t r = q.dim();
  in.type = element_type(q);
  in.q = rows_view(q);
  in.k = rows_view(k);
  in.v = rows_view(v);
  in.nq = q.size(r - 3);
  in.nk = k.size(r - 3);
  in.heads = q.size(r - 2);
  in.head_dim = q.size(r - 1);
  in.scale = static_cast<float>(scale);
  in.causal = causal;
  if (is_packed) {
    check_cu_seqlens(op, "cu_seqlens_q", *cu_seqlens_q);
    check_cu_seqlens(op, "cu_seqlens_k", *cu_seqlens_k);
    check_size(op, "cu_seqlens_k", *cu_seqlens_k, 0, cu_seqlens_q->numel());
    STD_TORCH_CHECK(!bias.has_value(), op, ": bias must be absent with cu_seqlens");
    starts_q_ = clamped_starts(*cu_seqlens_q, in.nq);
    starts_k_ = clamped_starts(*cu_seqlens_k, in.nk);
    in.batch = static_cast<int64_t>(starts_q_.size()) - 1;
    in.starts_q = starts_q_.data();
    in.starts_k = starts_k_.data();
    queries_covered_ = starts_q_.back() - starts_q_.front();
    keys_covered_ = starts_k_.back() - starts_k_.front();
  } else {
    in.batch = q.size(0);
    if (bias) in.bias = bias_view(op, *bias, in);
  }
}

void AttentionArguments::add_decomposed_bias(const char* op, const Tensor& rel_h,
                                             const Tensor& rel_w) {
  const std::pair<const char*, const Tensor*> arguments[] = {{"rel_h", &rel_h}, {"rel_w", &rel_w}};
  for (const auto& [arg, t] : arguments) {
    check_floating(op, arg, *t);
    check_rank(op, arg, *t, 4);
    check_last_dim_dense(op, arg, *t);
    check_size(op, arg, *t, 0, in.batch);
    check_size(op, arg, *t, 1, in.heads);
    check_size(op, arg, *t, 2, in.nq);
  }
  STD_TORCH_CHECK(rel_h.scalar_type() == rel_w.scalar_type(), op,
                  ": rel_w must have the dtype of rel_h");
  STD_TORCH_CHECK(rel_h.size(3) * rel_w.size(3) == in.nk, op, ": rel_h and rel_w must have ", in.nk,
                  " keys, got ", rel_h.size(3), " * ", rel_w.size(3));
  in.decomposed = {static_cast<const char*>(rel_h.const_data_ptr()),
                   static_cast<const char*>(rel_w.const_data_ptr()),
                   element_type(rel_h),
                   rel_h.stride(0),
                   rel_h.stride(1),
                   rel_h.stride(2),
                   rel_w.stride(0),
                   rel_w.stride(1),
                   rel_w.stride(2),
                   rel_h.size(3),
                   rel_w.size(3)};
}

void AttentionArguments::add_distance_bias(const char* op, const Tensor& slopes,
                                           const Tensor& coords_q, const Tensor& coords_k) {
  slopes_ = small_floats(op, "slopes", slopes, {in.heads});
  coords_q_ = planes(op, "coords_q", coords_q, in.batch, in.nq);
  coords_k_ = planes(op, "coords_k", coords_k, in.batch, in.nk);
  in.distance = {slopes_.data(),
                 coords_q_.data(),
                 coords_k_.data(),
                 coords_q.size(0) == 1 ? 0 : 2 * in.nq,
                 in.nq,
                 coords_k.size(0) == 1 ? 0 : 2 * in.nk,
                 in.nk};
}

}  // namespace vitkit::cpu
