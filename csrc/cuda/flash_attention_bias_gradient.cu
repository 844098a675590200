// The instantiations of the bias gradient's kernel.
#include "attention/dispatch.h"
#include "flash_attention.h"

namespace vitkit::attention {

BiasGradientPlan plan_flash_bias_gradient(const FlashBiasGradient& p, Element element) {
  BiasGradientPlan plan{};
  const SequenceMap& map = p.backward.map;
  with_kernel<FlashDims>(
      element, p.backward.head_dim, [&](auto type, auto head_dim) -> const char* {
        using T = typename decltype(type)::type;
        plan = plan_bias_gradient<T, head_dim>({map.batch, map.heads, map.n_q, map.n_k},
                                               {p.batches, p.heads, p.queries, p.keys});
        return nullptr;
      });
  return plan;
}

const char* flash_bias_gradient(const FlashBiasGradient& p, const BiasGradientPlan& plan,
                                Element element, Stream stream) {
  return with_kernel<FlashDims>(element, p.backward.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    return launch_bias_gradient<T, head_dim>(p, plan, stream);
  });
}

}  // namespace vitkit::attention
