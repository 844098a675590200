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

// Head dims that have kernels of their own, of 32 and of 16 bits. Others take the next one: its
// columns are zeros in shared memory, and nothing is padded in global memory.
template <typename Of32, typename Of16>
struct HeadDims {
  template <typename T>
  using of = std::conditional_t<sizeof(T) == 4, Of32, Of16>;
};

template <int... kHeadDim>
using Dims = std::integer_sequence<int, kHeadDim...>;

// Vision heads are 32 to 96 wide, where a step of 16 (what a product is deep) wastes least; float32
// is a path for accuracy.
using FlashDims = HeadDims<Dims<32, 64, 96, 128, 256>, Dims<32, 48, 64, 80, 96, 128, 192, 256>>;
// Segment Anything has heads of 64 and 80, the slide encoder TITAN of 64. Wider ones of float32
// would spill.
using StructuredDims = HeadDims<Dims<64, 128>, Dims<64, 80, 256>>;
// Every Swin Transformer has heads of 32; windows of wider heads than 128 are left to Triton. The
// gradient of a direction needs whole rows in the registers of one block.
using WindowDims = HeadDims<Dims<32, 64, 128>, Dims<32, 64, 128>>;
using CosineDims = HeadDims<Dims<32, 64>, Dims<32, 64>>;
// LongViT has heads of 24, Prov-GigaPath's slide encoder of 48.
using DilatedDims = HeadDims<Dims<64, 128, 256>, Dims<32, 48, 64, 128, 256>>;

// f(Type<T>, std::integral_constant<int, head dim>) -> const char*.
template <typename Kernels, typename F>
const char* with_kernel(Element element, int head_dim, F&& f) {
  const char* result = "there is no kernel for this head dim";
  const auto with_type = [&](auto type) {
    using T = typename decltype(type)::type;
    const auto try_all = [&]<int... kHeadDim>(std::integer_sequence<int, kHeadDim...>) {
      // The first that is wide enough.
      (void)((head_dim <= kHeadDim &&
              (result = f(type, std::integral_constant<int, kHeadDim>{}), true)) ||
             ...);
    };
    try_all(typename Kernels::template of<T>{});
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
