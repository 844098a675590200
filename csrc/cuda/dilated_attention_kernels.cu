// The instantiations of the kernels of dilated attention.
#include "attention/dispatch.h"
#include "dilated_attention.h"

namespace vitkit::attention {

const char* dilated_forward(const DilatedForward& p, const DilatedLayout& layout, Element element,
                            Stream stream) {
  return with_kernel<DilatedDims>(element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    return launch_dilated_forward<T, head_dim>(p, layout, stream);
  });
}

const char* dilated_gradient(const DilatedBackward& p, const DilatedLayout& layout, bool keys,
                             Element element, Stream stream) {
  return with_kernel<DilatedDims>(element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    return launch_dilated_gradient<T, head_dim>(p, layout, keys, stream);
  });
}

const char* dilated_mix(const MixParams& p, bool backward, Element element, Stream stream) {
  return with_kernel<HeadDims<Dims<256>, Dims<256>>>(element, p.head_dim, [&](auto type, auto) {
    using T = typename decltype(type)::type;
    return launch_mix<T>(p, backward, stream);
  });
}

}  // namespace vitkit::attention
