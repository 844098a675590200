// From run-time dtypes and head dims to the instantiations there are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#include <utility>

#include "score_term.cuh"

namespace vitkit::attention {

template <typename T>
using Type = std::type_identity<T>;

// Head dims that have kernels of their own. Others take the next one: its columns are zeros in
// shared memory, and nothing is padded in global memory. Vision heads are 32 to 96 wide, where a
// step of 16 (what a product is deep) wastes least; float32 is a path for accuracy.
template <typename T>
using HeadDims =
    std::conditional_t<sizeof(T) == 4, std::integer_sequence<int, 32, 64, 96, 128, 256>,
                       std::integer_sequence<int, 32, 48, 64, 80, 96, 128, 192, 256>>;

// f(Type<T>, std::integral_constant<int, head dim>) -> const char*.
template <typename F>
const char* with_kernel(Element element, int head_dim, F&& f) {
  const char* result = "head dims above 256 have no kernel";
  const auto with_type = [&](auto type) {
    using T = typename decltype(type)::type;
    const auto try_all = [&]<int... kHeadDim>(std::integer_sequence<int, kHeadDim...>) {
      // The first that is wide enough.
      (void)((head_dim <= kHeadDim &&
              (result = f(type, std::integral_constant<int, kHeadDim>{}), true)) ||
             ...);
    };
    try_all(HeadDims<T>{});
  };
  switch (element) {
    case Element::f32:
      with_type(Type<float>{});
      break;
    case Element::bf16:
      with_type(Type<__nv_bfloat16>{});
      break;
    case Element::f16:
      with_type(Type<__half>{});
      break;
    case Element::boolean:
      return "there are no kernels for bool";
  }
  return result;
}

}  // namespace vitkit::attention
