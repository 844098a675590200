// flash_attention on CUDA with a structured bias: decomposed relative positions, or distances.
#include <torch/csrc/stable/library.h>

#include "attention_arguments.h"
#include "flash_attention.h"
#include "launch.h"

namespace vitkit::attention {
namespace {

StructuredTerm empty_term(const AttentionArguments& a) {
  check_head_dim(a.op, "q", a.q, a.element == Element::f32 ? 128 : kMaxHeadDim);
  StructuredTerm term{};
  term.decomposed.width = Divisor::of(1);
  term.heads = a.map.heads;
  return term;
}

StructuredTerm decomposed_term(const AttentionArguments& a, const Tensor& rel_h,
                               const Tensor& rel_w) {
  for (const auto& [arg, t] :
       {std::pair<const char*, const Tensor*>{"rel_h", &rel_h}, {"rel_w", &rel_w}}) {
    check_floating(a.op, arg, *t);
    check_rank(a.op, arg, *t, 4);
    check_size(a.op, arg, *t, 0, a.map.batch);
    check_size(a.op, arg, *t, 1, a.map.heads);
    check_size(a.op, arg, *t, 2, a.map.n_q);
    check_last_dim_dense(a.op, arg, *t);
    STD_TORCH_CHECK(
        t->scalar_type() == rel_h.scalar_type() && t->get_device_index() == a.q.get_device_index(),
        a.op, ": ", arg, " must have the dtype of rel_h and the device of q");
  }
  STD_TORCH_CHECK(rel_h.size(3) * rel_w.size(3) == a.map.n_k, a.op,
                  ": rel_h and rel_w must have Kh * Kw = ", a.map.n_k, " keys, got ", rel_h.size(3),
                  " * ", rel_w.size(3));
  StructuredTerm term = empty_term(a);
  term.decomposed = {rel_h.const_data_ptr(),
                     rel_w.const_data_ptr(),
                     element_of(a.op, "rel_h", rel_h),
                     rel_h.stride(0),
                     rel_h.stride(1),
                     rel_h.stride(2),
                     rel_w.stride(0),
                     rel_w.stride(1),
                     rel_w.stride(2),
                     int(rel_h.size(3)),
                     Divisor::of(std::max(int(rel_w.size(3)), 1))};
  return term;
}

// Points in pairs of numbers, which are read at once.
Tensor dense_points(const Tensor& t) {
  const bool dense = t.stride(2) == 1 && t.stride(1) == 2 && t.stride(0) % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 8 == 0;
  return dense || t.numel() == 0 ? t : dense_copy(t);
}

struct Points {
  Tensor q, k;

  Points(const AttentionArguments& a, const Tensor& coords_q, const Tensor& coords_k)
      : q(checked(a, "coords_q", coords_q, a.map.n_q)),
        k(checked(a, "coords_k", coords_k, a.map.n_k)) {}

 private:
  static Tensor checked(const AttentionArguments& a, const char* arg, const Tensor& t,
                        int64_t tokens) {
    check_rank(a.op, arg, t, 3);
    if (t.size(0) != 1) check_size(a.op, arg, t, 0, a.map.batch);
    check_size(a.op, arg, t, 1, tokens);
    check_size(a.op, arg, t, 2, 2);
    STD_TORCH_CHECK(
        t.scalar_type() == ScalarType::Float && t.get_device_index() == a.q.get_device_index(),
        a.op, ": ", arg, " must be float32 on the device of q");
    return dense_points(t);
  }
};

StructuredTerm distance_term(const AttentionArguments& a, const Tensor& slopes,
                             const Points& points) {
  check_rank(a.op, "slopes", slopes, 1);
  check_size(a.op, "slopes", slopes, 0, a.map.heads);
  STD_TORCH_CHECK(slopes.scalar_type() == ScalarType::Float && slopes.is_contiguous() &&
                      slopes.get_device_index() == a.q.get_device_index(),
                  a.op, ": slopes must be contiguous float32 on the device of q");
  const auto batch = [](const Tensor& t) { return t.size(0) == 1 ? 0 : t.stride(0); };
  StructuredTerm term = empty_term(a);
  term.is_distance = true;
  term.distance = {floats(slopes), floats(points.q), floats(points.k), batch(points.q),
                   batch(points.k)};
  return term;
}

std::tuple<Tensor, Tensor> attend(const AttentionArguments& a, const StructuredTerm& term) {
  Tensor out = torch::stable::new_empty(a.q, a.q.sizes());
  Tensor lse = torch::stable::new_empty(a.q, a.lse_sizes(), ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  const Launch launch(a.q);
  const StructuredForward p{a.forward(out, lse), a.map, term};
  check_launch(a.op, structured_forward(p, a.element, launch.stream()));
  return {out, lse};
}

AttentionArguments arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             bool causal, double scale) {
  return {op, q, k, v, std::nullopt, std::nullopt, causal, scale};
}

constexpr const char* kDecomposed = "flash_attention_decomposed";
constexpr const char* kDistance = "flash_attention_distance";

std::tuple<Tensor, Tensor> decomposed_forward(Tensor q, Tensor k, Tensor v, Tensor rel_h,
                                              Tensor rel_w, bool causal, double scale) {
  const AttentionArguments a = arguments(kDecomposed, q, k, v, causal, scale);
  return attend(a, decomposed_term(a, rel_h, rel_w));
}

std::tuple<Tensor, Tensor> distance_forward(Tensor q, Tensor k, Tensor v, Tensor slopes,
                                            Tensor coords_q, Tensor coords_k, bool causal,
                                            double scale) {
  const AttentionArguments a = arguments(kDistance, q, k, v, causal, scale);
  const Points points(a, coords_q, coords_k);
  return attend(a, distance_term(a, slopes, points));
}

// What a gradient is written to; zeros if no kernel writes it, empty if nobody asks for it.
Tensor gradient_of(const Tensor& t, bool need_dterm, bool written) {
  if (!need_dterm) return torch::stable::new_empty(t, {0});
  return written ? torch::stable::new_empty(t, t.sizes()) : torch::stable::new_zeros(t, t.sizes());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> decomposed_backward(
    Tensor grad, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, Tensor rel_h, Tensor rel_w, bool causal, double scale, bool need_dterm) {
  const AttentionArguments a = arguments(kDecomposed, q, k, v, causal, scale);
  AttentionGradient g(a, grad, grad_lse, out, lse);
  StructuredBackward p{g.tensors, a.map, decomposed_term(a, rel_h, rel_w)};
  const bool wanted = need_dterm && q.numel() > 0 && k.numel() > 0;
  Tensor drel_h = gradient_of(rel_h, need_dterm, wanted), sums;
  Tensor drel_w = gradient_of(rel_w, need_dterm, wanted);
  const Launch launch(q);
  if (wanted) {
    p.term.drel_h = drel_h.mutable_data_ptr();
    p.term.drel_w = drel_w.mutable_data_ptr();
    const StructuredPlan plan = plan_structured(p, a.element);
    if (plan.sums > 0) {
      sums = torch::stable::new_empty(q, {plan.sums}, ScalarType::Float);
      p.term.sums = floats(sums);
    }
  }
  check_launch(kDecomposed, structured_backward(p, a.element, launch.stream()));
  return {g.dq, g.dk, g.dv, drel_h, drel_w};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> distance_backward(
    Tensor grad, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, Tensor slopes, Tensor coords_q, Tensor coords_k, bool causal, double scale,
    bool need_dterm) {
  const AttentionArguments a = arguments(kDistance, q, k, v, causal, scale);
  AttentionGradient g(a, grad, grad_lse, out, lse);
  const Points points(a, coords_q, coords_k);
  StructuredBackward p{g.tensors, a.map, distance_term(a, slopes, points)};
  const bool wanted = need_dterm && q.numel() > 0 && k.numel() > 0;
  Tensor dslopes = gradient_of(slopes, need_dterm, wanted);
  const int64_t copies = wanted ? plan_structured(p, a.element).copies : 0;
  Tensor sums = torch::stable::new_empty(q, {copies * a.map.heads}, ScalarType::Float);
  if (wanted) p.term.dslopes = floats(sums);
  const Launch launch(q);
  check_launch(kDistance, structured_backward(p, a.element, launch.stream()));
  if (wanted)
    check_launch(kDistance,
                 launch_partial_sums(floats(sums), dslopes.mutable_data_ptr(), Element::f32, copies,
                                     a.map.heads, launch.stream()));
  return {g.dq, g.dk, g.dv, dslopes};
}

}  // namespace
}  // namespace vitkit::attention

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("flash_attention_decomposed_fwd", TORCH_BOX(&vitkit::attention::decomposed_forward));
  m.impl("flash_attention_decomposed_bwd", TORCH_BOX(&vitkit::attention::decomposed_backward));
  m.impl("flash_attention_distance_fwd", TORCH_BOX(&vitkit::attention::distance_forward));
  m.impl("flash_attention_distance_bwd", TORCH_BOX(&vitkit::attention::distance_backward));
}
