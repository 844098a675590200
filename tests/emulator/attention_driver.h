// What the drivers of the attention kernels share.
#pragma once

#include "emulator.h"
// The kernels and launches, by the same files nvcc compiles.
#include "attention/backward.cuh"
#include "attention/forward.cuh"

#include <vector>

namespace vitkit::attention {

template <typename T, int... kHeadDim, typename F>
const char* with_head_dim(std::integer_sequence<int, kHeadDim...>, int head_dim, F&& f) {
  const char* result = "no such head dim in this driver";
  (void)((head_dim <= kHeadDim && (result = f.template operator()<T, kHeadDim>(), true)) || ...);
  return result;
}

// f.operator()<T, head dim>() for the first of the head dims that is wide enough. Mutants make do
// with one dtype.
template <int... kHeadDim, typename F>
const char* with_kernel(Element element, int head_dim, F&& f) {
  const std::integer_sequence<int, kHeadDim...> dims;
  if (element == Element::bf16) return with_head_dim<__nv_bfloat16>(dims, head_dim, f);
#ifndef EMULATED_BF16_ONLY
  if (element == Element::f32) return with_head_dim<float>(dims, head_dim, f);
  if (element == Element::f16) return with_head_dim<__half>(dims, head_dim, f);
#endif
  return "no such dtype in this driver";
}

// The same for 32, and for a wider head dim in float32 alone: that is where one is cut in slices.
template <int kWide, typename F>
const char* with_few_kernels(Element element, int head_dim, F&& f) {
#ifndef EMULATED_BF16_ONLY
  if (element == Element::f32)
    return with_head_dim<float>(std::integer_sequence<int, 32, kWide>{}, head_dim, f);
#endif
  return with_kernel<32>(element, head_dim, f);
}

inline ForwardTensors forward_of(const BackwardTensors& b) {
  return {b.q,         b.k,        b.v,        b.out,    const_cast<float*>(b.lse),
          b.lse_batch, b.lse_head, b.head_dim, b.causal, b.scale};
}

// Memory that kernels write before they read it.
inline std::vector<float> poisoned(int64_t count) { return std::vector<float>(size_t(count), NAN); }

}  // namespace vitkit::attention
