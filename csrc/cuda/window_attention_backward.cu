// The instantiations of the backward kernels for windows.
#include "attention/dispatch.h"
#include "window_attention.h"

namespace vitkit::attention {
namespace {

// f(params, Type<T>, head dim) with the kernels for a term.
template <typename F>
const char* with_window_kernel(const WindowBackward& p, Element element, F&& f) {
  if (p.term.logit_scale)
    return with_kernel<CosineDims>(element, p.head_dim,
                                   [&](auto type, auto head_dim) { return f(p, type, head_dim); });
  const BackwardParams<WindowMap, WindowTerm<false>> plain{p, p.map, without_cosine(p.term)};
  return with_kernel<WindowDims>(
      element, p.head_dim, [&](auto type, auto head_dim) { return f(plain, type, head_dim); });
}

}  // namespace

const char* window_backward(const WindowBackward& p, Element element, Stream stream) {
  const int places = p.map.places();
  return with_window_kernel(p, element, [&](const auto& params, auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    return launch_backward<T, head_dim>(params, places, places, stream);
  });
}

WindowPlan plan_window(const WindowBackward& p, Element element) {
  WindowPlan plan{};
  with_window_kernel(p, element, [&](const auto& params, auto type, auto head_dim) -> const char* {
    using T = typename decltype(type)::type;
    const int warps = dq_warps<T, head_dim>(params.term, p.map.places());
    plan = {p.map.blocks(16 * warps, false) / p.map.heads * warps,
            plan_window_scores<T, head_dim>(p.map)};
    return nullptr;
  });
  return plan;
}

const char* window_score_gradient(const WindowBackward& p, const BiasGradientPlan& plan,
                                  float* sums, Element element, Stream stream) {
  return with_window_kernel(p, element, [&](const auto& params, auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    return launch_window_scores<T, head_dim>(params, plan, sums, stream);
  });
}

}  // namespace vitkit::attention
