// The instantiations of the forward kernel for Hopper. Head dims between take the next one.
#include "attention/dispatch.h"
#include "attention/hopper_forward.cuh"
#include "flash_attention.h"

namespace vitkit::attention {

const char* flash_forward_hopper(const FlashForward& p, Element element, Stream stream) {
  using HopperDims = HeadDims<Dims<>, Dims<64, 80, 96, 128>>;
  return with_kernel<HopperDims>(element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    return launch_hopper_forward<T, head_dim>(p, p.map, stream);
  });
}

}  // namespace vitkit::attention
