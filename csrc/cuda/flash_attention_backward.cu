// The instantiations of the backward kernels for dense and packed sequences.
#include "attention/dispatch.h"
#include "flash_attention.h"

namespace vitkit::attention {

const char* flash_backward(const FlashBackward& p, Element element, int rows_q, int rows_k,
                           Stream stream) {
  return with_kernel<FlashDims>(element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    if (p.term.data) return launch_backward<T, head_dim>(p, rows_q, rows_k, stream);
    return launch_backward<T, head_dim>(BackwardParams<SequenceMap, NoTerm>{p, p.map, {}}, rows_q,
                                        rows_k, stream);
  });
}

}  // namespace vitkit::attention
