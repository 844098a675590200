// flash_attention on CUDA: checks, allocations, launches, for dense and packed sequences with no
// bias or a dense one.
#include "flash_attention.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "attention/hopper_rule.h"
#include "attention_arguments.h"
#include "launch.h"

namespace vitkit::attention {
namespace {

constexpr const char* kOp = "flash_attention";
#ifdef VITKIT_SM_90A
constexpr bool kHopperBuilt = true;
#else
constexpr bool kHopperBuilt = false;
#endif

bool takes_hopper(const AttentionArguments& a, bool with_bias) {
  return why_not_hopper(kHopperBuilt, compute_capability(a.q), a.element == Element::f32 ? 4 : 2,
                        a.packed, with_bias, hopper_tensor(a.q), hopper_tensor(a.k),
                        hopper_tensor(a.v)) == nullptr;
}

// A tensor that broadcasts to the scores. Null without one.
struct DenseBias {
  DenseTerm term{nullptr, Element::f32, 0, 0, 0, 0};
  std::array<int, 4> sizes{1, 1, 1, 1};

  DenseBias(const AttentionArguments& a, const std::optional<Tensor>& bias) {
    if (!bias) return;
    STD_TORCH_CHECK(!a.packed, kOp, ": bias must be None for packed sequences");
    STD_TORCH_CHECK(bias->dim() <= 4 && bias->get_device_index() == a.q.get_device_index(), kOp,
                    ": bias must have at most 4 dimensions and be on the device of q");
    const std::array<int, 4> full{a.map.batch, a.map.heads, a.map.n_q, a.map.n_k};
    std::array<int64_t, 4> strides{};
    for (int d = 0; d < int(bias->dim()); ++d) {
      const int at = 4 - int(bias->dim()) + d;
      sizes[size_t(at)] = int(bias->size(d));
      STD_TORCH_CHECK(bias->size(d) == 1 || bias->size(d) == full[size_t(at)], kOp,
                      ": bias must broadcast to [B, H, Nq, Nk], got size ", bias->size(d),
                      " in dimension ", d);
      strides[size_t(at)] = bias->size(d) == 1 ? 0 : bias->stride(d);
    }
    term = {bias->const_data_ptr(),
            element_of(kOp, "bias", *bias, true),
            strides[0],
            strides[1],
            strides[2],
            strides[3]};
  }
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                                   std::optional<Tensor> cu_seqlens_q,
                                   std::optional<Tensor> cu_seqlens_k, bool causal, double scale) {
  const AttentionArguments a(kOp, q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale);
  const DenseBias dense(a, bias);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, a.lse_sizes(), ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  const Launch launch(q);
  const FlashForward p{a.forward(out, lse), a.map, dense.term};
  check_launch(kOp, takes_hopper(a, bias.has_value())
                        ? flash_forward_hopper(p, a.element, launch.stream())
                        : flash_forward(p, a.element, a.rows_q, launch.stream()));
  return {out, lse};
}

// dbias in the shape and dtype of the bias.
Tensor bias_gradient(const AttentionArguments& a, const Tensor& bias, const DenseBias& dense,
                     const FlashBackward& backward, const Launch& launch) {
  Tensor dbias = torch::stable::new_empty(bias, bias.sizes());
  if (dbias.numel() == 0) return dbias;
  if (a.q.numel() == 0 || a.k.numel() == 0) return torch::stable::zero_(dbias);
  FlashBiasGradient p{};
  p.backward = backward;
  p.batches = dense.sizes[0];
  p.heads = dense.sizes[1];
  p.queries = dense.sizes[2];
  p.keys = dense.sizes[3];
  const BiasGradientPlan plan = plan_flash_bias_gradient(p, a.element);
  const int64_t count = bias.numel();
  Tensor sums = torch::stable::new_empty(a.q, {plan.copies * count}, ScalarType::Float);
  p.sums = floats(sums);
  check_launch(kOp, flash_bias_gradient(p, plan, a.element, launch.stream()));
  check_launch(kOp, launch_partial_sums(p.sums, dbias.mutable_data_ptr(), dense.term.element,
                                        plan.copies, count, launch.stream()));
  return dbias;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, std::optional<Tensor> grad_lse,
                                                    Tensor q, Tensor k, Tensor v, Tensor out,
                                                    Tensor lse, std::optional<Tensor> bias,
                                                    std::optional<Tensor> cu_seqlens_q,
                                                    std::optional<Tensor> cu_seqlens_k, bool causal,
                                                    double scale, bool need_dterm) {
  const AttentionArguments a(kOp, q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale);
  const DenseBias dense(a, bias);
  STD_TORCH_CHECK(!need_dterm || (bias && dense.term.element != Element::boolean), kOp,
                  ": need_dterm needs a floating bias");
  AttentionGradient g(a, grad, grad_lse, out, lse);
  const Launch launch(q);
  const FlashBackward p{g.tensors, a.map, dense.term};
  // Also without queries: dk and dv are zeros then, and so is dq without keys.
  check_launch(kOp, flash_backward(p, a.element, a.rows_q, a.rows_k, launch.stream()));
  Tensor dterm =
      need_dterm ? bias_gradient(a, *bias, dense, p, launch) : torch::stable::new_empty(q, {0});
  return {g.dq, g.dk, g.dv, dterm};
}

}  // namespace
}  // namespace vitkit::attention

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("flash_attention_fwd", TORCH_BOX(&vitkit::attention::forward));
  m.impl("flash_attention_bwd", TORCH_BOX(&vitkit::attention::backward));
}
