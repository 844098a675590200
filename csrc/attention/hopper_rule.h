// When the forward pass of flash_attention takes its kernel for Hopper GPUs: one rule, for the
// launch and for vitkit.explain (csrc/runtime).
#pragma once

#include <stdint.h>

namespace vitkit::attention {

// Below, whole tiles of 128 x 128 waste more than tensor cores gain, and a forward pass waits for
// memory anyway. Chosen from arithmetic (docs/performance.md), not yet measured on hardware.
constexpr int64_t kHopperMinTokens = 512;
constexpr int64_t kHopperMinHeadDim = 64, kHopperMaxHeadDim = 128;

// [B, N, H, D]
struct HopperTensor {
  uint64_t address;
  int64_t sizes[4], strides[4];  // in elements
};

// Whether the copy engine can read it: rows dense, aligned base and strides of 16 bytes.
inline bool copies_in_boxes(const HopperTensor& t) {
  bool can = t.address % 16 == 0 && t.strides[3] == 1;
  for (int d = 0; d < 4; ++d) {
    const int64_t bytes = t.strides[d] * 2;
    can = can && t.sizes[d] > 0 && t.sizes[d] < int64_t(1) << 31;
    if (d < 3 && t.sizes[d] > 1)
      can = can && bytes > 0 && bytes % 16 == 0 && bytes < int64_t(1) << 40;
  }
  return can;
}

// Null if the kernel for Hopper takes the call, else why the one for sm_80 and later does.
inline const char* why_not_hopper(bool built, int capability, int bytes_of_element, bool packed,
                                  bool with_bias, const HopperTensor& q, const HopperTensor& k,
                                  const HopperTensor& v) {
  if (!built) return "this build has no code for sm_90a";
  if (capability != 90) return "the GPU's compute capability is not 9.0";
  if (bytes_of_element != 2) return "its products are of 16-bit elements";
  if (packed) return "sequences are packed";
  if (with_bias) return "there is a bias";
  if (q.sizes[3] < kHopperMinHeadDim || q.sizes[3] > kHopperMaxHeadDim)
    return "the head dim is not from 64 to 128";
  if (q.sizes[1] < kHopperMinTokens || k.sizes[1] < kHopperMinTokens)
    return "there are fewer than 512 queries or keys";
  for (const HopperTensor* t : {&q, &k, &v})
    if (!copies_in_boxes(*t))
      return "a tensor is expanded, or its base or a stride is no multiple of 16 bytes";
  return nullptr;
}

}  // namespace vitkit::attention
