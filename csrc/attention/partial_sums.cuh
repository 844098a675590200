// Sums of what blocks have left beside each other, always in the same order.
#pragma once

#include "launch_kernel.cuh"
#include "score_term.cuh"

namespace vitkit::attention {

struct PartialSums {
  float* sums;  // [copies, count]
  void* out;    // [count]; null: the sum of every chunk takes the place of its first copy
  Element element;
  int64_t count, copies;
  int64_t stride;  // of copies
  int64_t chunk;   // copies of a thread
};

static __global__ void __launch_bounds__(128)
    attention_partial_sums_kernel(const __grid_constant__ PartialSums p) {
  const int64_t columns = (p.count + blockDim.x - 1) / blockDim.x;
  const int64_t i = blockIdx.x % columns * blockDim.x + threadIdx.x;
  const int64_t first = blockIdx.x / columns * p.chunk;
  if (i >= p.count) return;
  const int64_t end = min(first + p.chunk, p.copies);
  float total = 0.f;
  for (int64_t copy = first; copy < end; ++copy) total += p.sums[copy * p.stride + i];
  if (p.out == nullptr) {
    p.sums[first * p.stride + i] = total;
  } else if (p.element == Element::bf16) {
    from_float(total, static_cast<__nv_bfloat16*>(p.out) + i);
  } else if (p.element == Element::f16) {
    from_float(total, static_cast<__half*>(p.out) + i);
  } else {
    static_cast<float*>(p.out)[i] = total;
  }
}

// out [count] from sums [copies, count], which are overwritten. Many copies are summed in two
// steps, for the few elements of a small gradient to keep a GPU busy.
inline const char* launch_partial_sums(float* sums, void* out, Element element, int64_t copies,
                                       int64_t count, Stream stream) {
  constexpr int64_t kChunks = 64;
  const int64_t columns = (count + 127) / 128;
  if (columns * kChunks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  if (count == 0) return nullptr;
  PartialSums p{sums, nullptr, element, count, copies, count, 1};
  if (copies > 2 * kChunks) {
    p.chunk = (copies + kChunks - 1) / kChunks;
    const int64_t chunks = (copies + p.chunk - 1) / p.chunk;
    if (const char* error = launch_kernel(&attention_partial_sums_kernel,
                                          unsigned(columns * chunks), 128, 0, stream, p))
      return error;
    p.copies = chunks;
    p.stride = p.chunk * count;
  }
  p.out = out;
  p.chunk = p.copies;
  return launch_kernel(&attention_partial_sums_kernel, unsigned(columns), 128, 0, stream, p);
}

}  // namespace vitkit::attention
