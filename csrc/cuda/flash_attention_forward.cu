// The instantiations of the forward kernel for dense and packed sequences.
#include "attention/dispatch.h"
#include "flash_attention.h"

namespace vitkit::attention {

const char* flash_forward(const FlashForward& p, Element element, int rows, Stream stream) {
  return with_kernel<FlashDims>(element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    if (p.term.data) return launch_forward<T, head_dim>(p, rows, stream);
    return launch_forward<T, head_dim>(ForwardParams<SequenceMap, NoTerm>{p, p.map, {}}, rows,
                                       stream);
  });
}

}  // namespace vitkit::attention
