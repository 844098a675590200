// flash_attention on CUDA: checks, allocations, launches, for dense and packed sequences with no
// bias or a dense one.
#include "flash_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <limits>
#include <tuple>

#include "launch.h"

namespace vitkit::attention {
namespace {

constexpr const char* kOp = "flash_attention";

Element element_of(const char* arg, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::Bool:
      return Element::boolean;
    default:
      STD_TORCH_CHECK(false, kOp, ": ", arg, " must be float32, bfloat16, float16 or bool");
  }
}

int as_int(const char* what, int64_t value) {
  STD_TORCH_CHECK(value <= std::numeric_limits<int>::max(), kOp, ": ", what,
                  " must be below 2^31 on CUDA, got ", value);
  return int(value);
}

// Whether rows can be copied 16 bytes at a time.
bool rows_aligned(const Tensor& t) {
  const int64_t elements = 16 / int64_t(t.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(-1) == 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d)
    aligned = aligned && (t.size(d) <= 1 || t.stride(d) % elements == 0);
  return aligned;
}

Tensor with_aligned_rows(const Tensor& t) {
  if (t.numel() == 0 || rows_aligned(t)) return t;
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  torch::stable::copy_(copy, t);
  return copy;
}

Rows rows_of(const Tensor& t) {
  const int64_t batch = t.dim() == 4 ? t.stride(0) : 0;
  return {const_cast<void*>(t.const_data_ptr()), batch, t.stride(-3), t.stride(-2)};
}

void check_cu_seqlens(const char* arg, const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.size(0) >= 1 &&
                      (t.size(0) == 1 || t.stride(0) == 1) &&
                      t.get_device_index() == q.get_device_index(),
                  kOp, ": ", arg, " must be a dense int32 [S + 1] on the device of q");
}

// The arguments of both directions. Holds the tensors whose memory the parameters point to.
struct Arguments {
  Tensor q, k, v;
  std::optional<Tensor> bias;
  Element element;
  bool packed, causal;
  double scale;
  SequenceMap map;
  DenseTerm term{nullptr, Element::f32, 0, 0, 0, 0};
  std::array<int, 4> bias_sizes{1, 1, 1, 1};
  int head_dim, rows_q, rows_k;

  Arguments(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
            const std::optional<Tensor>& bias_in, const std::optional<Tensor>& cu_seqlens_q,
            const std::optional<Tensor>& cu_seqlens_k, bool causal_in, double scale_in)
      : bias(bias_in), packed(cu_seqlens_q.has_value()), causal(causal_in), scale(scale_in) {
    check_floating(kOp, "q", q_in);
    STD_TORCH_CHECK(packed == cu_seqlens_k.has_value(), kOp,
                    ": cu_seqlens_q and cu_seqlens_k must be given together");
    const int64_t rank = packed ? 3 : 4;
    check_rank(kOp, "q", q_in, rank);
    for (const auto& [arg, t] : {std::pair<const char*, const Tensor*>{"k", &k_in}, {"v", &v_in}}) {
      check_rank(kOp, arg, *t, rank);
      STD_TORCH_CHECK(t->scalar_type() == q_in.scalar_type() &&
                          t->get_device_index() == q_in.get_device_index(),
                      kOp, ": ", arg, " must have the dtype and device of q");
      if (!packed) check_size(kOp, arg, *t, 0, q_in.size(0));
      check_size(kOp, arg, *t, rank - 3, k_in.size(rank - 3));
      check_size(kOp, arg, *t, rank - 2, q_in.size(-2));
      check_size(kOp, arg, *t, rank - 1, q_in.size(-1));
    }
    STD_TORCH_CHECK(q_in.size(-1) % 8 == 0 && q_in.size(-1) >= 8 && q_in.size(-1) <= kMaxHeadDim,
                    kOp, ": q must have a head dim that is a multiple of 8 up to ", kMaxHeadDim,
                    ", got ", q_in.size(-1));
    element = element_of("q", q_in);
    q = with_aligned_rows(q_in);
    k = with_aligned_rows(k_in);
    v = with_aligned_rows(v_in);
    head_dim = int(q.size(-1));
    map = {packed ? 1 : as_int("B", q.size(0)),
           as_int("H", q.size(-2)),
           as_int("the number of queries", q.size(-3)),
           as_int("the number of keys", k.size(-3)),
           packed ? 0 : 1,
           nullptr,
           nullptr};
    if (packed) add_sequences(*cu_seqlens_q, *cu_seqlens_k);
    // Packed lengths are on the device: taken to be equal.
    const int share = std::max(map.sequences, 1);
    rows_q = (map.n_q + share - 1) / share;
    rows_k = (map.n_k + share - 1) / share;
    if (bias) add_bias();
  }

  float scale_log2() const {
    const double scaled = scale * double(kLog2e);
    return float(scaled);
  }
  std::vector<int64_t> lse_sizes() const {
    if (packed) return {map.heads, map.n_q};
    return {map.batch, map.heads, map.n_q};
  }
  int64_t lse_batch() const { return packed ? 0 : int64_t(map.heads) * map.n_q; }

 private:
  void add_sequences(const Tensor& cu_q, const Tensor& cu_k) {
    check_cu_seqlens("cu_seqlens_q", cu_q, q);
    check_cu_seqlens("cu_seqlens_k", cu_k, q);
    check_size(kOp, "cu_seqlens_k", cu_k, 0, cu_q.size(0));
    STD_TORCH_CHECK(!bias, kOp, ": bias must be None for packed sequences");
    map.sequences = as_int("the number of sequences", cu_q.size(0) - 1);
    map.cu_seqlens_q = static_cast<const int32_t*>(cu_q.const_data_ptr());
    map.cu_seqlens_k = static_cast<const int32_t*>(cu_k.const_data_ptr());
  }

  void add_bias() {
    STD_TORCH_CHECK(bias->dim() <= 4 && bias->get_device_index() == q.get_device_index(), kOp,
                    ": bias must have at most 4 dimensions and be on the device of q");
    const std::array<int, 4> full{map.batch, map.heads, map.n_q, map.n_k};
    std::array<int64_t, 4> strides{};
    for (int d = 0; d < int(bias->dim()); ++d) {
      const int at = 4 - int(bias->dim()) + d;
      bias_sizes[size_t(at)] = int(bias->size(d));
      STD_TORCH_CHECK(bias->size(d) == 1 || bias->size(d) == full[size_t(at)], kOp,
                      ": bias must broadcast to [B, H, Nq, Nk], got size ", bias->size(d),
                      " in dimension ", d);
      strides[size_t(at)] = bias->size(d) == 1 ? 0 : bias->stride(d);
    }
    term = {bias->const_data_ptr(),
            element_of("bias", *bias),
            strides[0],
            strides[1],
            strides[2],
            strides[3]};
  }
};

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, kOp, ": kernel launch failed: ", error);
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                                   std::optional<Tensor> cu_seqlens_q,
                                   std::optional<Tensor> cu_seqlens_k, bool causal, double scale) {
  const Arguments a(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, causal, scale);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, a.lse_sizes(), ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  const Launch launch(q);
  const FlashForward p{rows_of(a.q),
                       rows_of(a.k),
                       rows_of(a.v),
                       rows_of(out),
                       static_cast<float*>(lse.mutable_data_ptr()),
                       a.lse_batch(),
                       a.map.n_q,
                       a.head_dim,
                       a.causal,
                       a.scale_log2(),
                       a.map,
                       a.term};
  check_launch(flash_forward(p, a.element, a.rows_q, launch.stream()));
  return {out, lse};
}

// dbias in the shape and dtype of the bias.
Tensor bias_gradient(const Arguments& a, const FlashBackward& backward, const Launch& launch) {
  const Tensor& bias = *a.bias;
  Tensor dbias = torch::stable::new_empty(bias, bias.sizes());
  if (dbias.numel() == 0) return dbias;
  if (a.q.numel() == 0 || a.k.numel() == 0) return torch::stable::zero_(dbias);
  FlashBiasGradient p{};
  p.backward = backward;
  p.batches = a.bias_sizes[0];
  p.heads = a.bias_sizes[1];
  p.queries = a.bias_sizes[2];
  p.keys = a.bias_sizes[3];
  const BiasGradientPlan plan = plan_flash_bias_gradient(p, a.element);
  const int64_t count = bias.numel();
  Tensor sums = torch::stable::new_empty(a.q, {plan.copies * count}, ScalarType::Float);
  p.sums = static_cast<float*>(sums.mutable_data_ptr());
  check_launch(flash_bias_gradient(p, plan, a.element, launch.stream()));
  const BiasSumParams sum{p.sums, dbias.mutable_data_ptr(), a.term.element, count, plan.copies};
  check_launch(launch_bias_sum(sum, launch.stream()));
  return dbias;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, std::optional<Tensor> grad_lse,
                                                    Tensor q, Tensor k, Tensor v, Tensor out,
                                                    Tensor lse, std::optional<Tensor> bias,
                                                    std::optional<Tensor> cu_seqlens_q,
                                                    std::optional<Tensor> cu_seqlens_k, bool causal,
                                                    double scale, bool need_dterm) {
  const Arguments a(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, causal, scale);
  for (const auto& [arg, t] :
       {std::pair<const char*, const Tensor*>{"grad", &grad}, {"out", &out}}) {
    check_rank(kOp, arg, *t, q.dim());
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), kOp, ": ", arg,
                    " must have the dtype of q");
    for (int64_t d = 0; d < q.dim(); ++d) check_size(kOp, arg, *t, d, q.size(d));
  }
  const std::vector<int64_t> sizes = a.lse_sizes();
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(), kOp,
                  ": lse must be contiguous float32");
  STD_TORCH_CHECK(!grad_lse || grad_lse->scalar_type() == ScalarType::Float, kOp,
                  ": grad_lse must be float32");
  for (const Tensor* t : {&lse, grad_lse ? &*grad_lse : &lse}) {
    check_rank(kOp, "lse", *t, int64_t(sizes.size()));
    for (size_t d = 0; d < sizes.size(); ++d) check_size(kOp, "lse", *t, int64_t(d), sizes[d]);
  }
  STD_TORCH_CHECK(!need_dterm || (bias && a.term.element != Element::boolean), kOp,
                  ": need_dterm needs a floating bias");

  Tensor dq = torch::stable::new_empty(q, q.sizes());
  Tensor dk = torch::stable::new_empty(k, k.sizes());
  Tensor dv = torch::stable::new_empty(v, v.sizes());
  Tensor delta = torch::stable::empty_like(lse);
  const Tensor grad_rows = with_aligned_rows(grad), out_rows = with_aligned_rows(out);
  const Launch launch(q);
  const FlashBackward p{rows_of(a.q),
                        rows_of(a.k),
                        rows_of(a.v),
                        rows_of(out_rows),
                        rows_of(grad_rows),
                        rows_of(dq),
                        rows_of(dk),
                        rows_of(dv),
                        static_cast<const float*>(lse.const_data_ptr()),
                        grad_lse ? static_cast<const float*>(grad_lse->const_data_ptr()) : nullptr,
                        static_cast<float*>(delta.mutable_data_ptr()),
                        a.lse_batch(),
                        a.map.n_q,
                        grad_lse && !a.packed ? grad_lse->stride(0) : 0,
                        grad_lse ? grad_lse->stride(-2) : 0,
                        grad_lse ? grad_lse->stride(-1) : 0,
                        a.head_dim,
                        a.causal,
                        a.scale_log2(),
                        float(a.scale),
                        a.map,
                        a.term};
  // Also without queries: dk and dv are zeros then, and so is dq without keys.
  check_launch(flash_backward(p, a.element, a.rows_q, a.rows_k, launch.stream()));
  Tensor dterm = need_dterm ? bias_gradient(a, p, launch) : torch::stable::new_empty(q, {0});
  return {dq, dk, dv, dterm};
}

}  // namespace
}  // namespace vitkit::attention

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("flash_attention_fwd", TORCH_BOX(&vitkit::attention::forward));
  m.impl("flash_attention_bwd", TORCH_BOX(&vitkit::attention::backward));
}
