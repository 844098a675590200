// The instantiations of the forward kernel for windows.
#include "attention/dispatch.h"
#include "window_attention.h"

namespace vitkit::attention {

const char* window_forward(const WindowForward& p, Element element, Stream stream) {
  const int places = p.map.places();
  if (p.term.logit_scale)
    return with_kernel<CosineDims>(element, p.head_dim, [&](auto type, auto head_dim) {
      using T = typename decltype(type)::type;
      return launch_forward<T, head_dim>(p, places, stream);
    });
  return with_kernel<WindowDims>(element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    return launch_forward<T, head_dim>(
        ForwardParams<WindowMap, WindowTerm<false>>{p, p.map, without_cosine(p.term)}, places,
        stream);
  });
}

}  // namespace vitkit::attention
