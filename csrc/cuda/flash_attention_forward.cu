// The instantiations of the forward kernel for dense and packed sequences.
#include "attention/dispatch.h"
#include "flash_attention.h"

namespace vitkit::attention {

const char* flash_forward(const FlashForward& p, Element element, int rows, Stream stream) {
  return with_kernel(element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    if (p.term.data || !(p.scale > 0.f)) return launch_forward<T, head_dim>(p, rows, stream);
    return launch_forward<T, head_dim>(without_term(p), rows, stream);
  });
}

}  // namespace vitkit::attention
