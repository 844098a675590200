// The instantiations of the attention kernels for structured biases.
#include "attention/dispatch.h"
#include "flash_attention.h"

namespace vitkit::attention {

const char* structured_forward(const StructuredForward& p, Element element, Stream stream) {
  return with_kernel<StructuredDims>(element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    return launch_forward<T, head_dim>(p, p.map.n_q, stream);
  });
}

const char* structured_backward(const StructuredBackward& p, Element element, Stream stream) {
  return with_kernel<StructuredDims>(element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    return launch_backward<T, head_dim>(p, p.map.n_q, p.map.n_k, stream);
  });
}

StructuredPlan plan_structured(const StructuredBackward& p, Element element) {
  StructuredPlan plan{};
  with_kernel<StructuredDims>(element, p.head_dim, [&](auto type, auto head_dim) -> const char* {
    using T = typename decltype(type)::type;
    plan = plan_structured_gradient<T, head_dim>(p, p.map.n_q);
    return nullptr;
  });
  return plan;
}

}  // namespace vitkit::attention
