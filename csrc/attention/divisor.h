// Division by a number that the host knows: a product and a shift.
#pragma once

#include <stdint.h>

namespace vitkit::attention {

// For dividends in [0, 2^31). With p = 32 + shift, d <= 2^(p - 31) and m = ceil(2^p / d): n m / 2^p
// exceeds n / d by less than n / 2^p < 2^(31 - p) <= 1 / d, too little to reach the next integer.
struct Divisor {
  int value;
  uint32_t multiplier;
  int shift;

  static Divisor of(int d) {
    int shift = 0;
    while ((int64_t(1) << (shift + 1)) < d) ++shift;
    const uint64_t power = uint64_t(1) << (32 + shift);
    return {d, d == 1 ? 0u : uint32_t((power + uint64_t(d) - 1) / uint64_t(d)), shift};
  }

  __device__ __forceinline__ int divide(int n) const {
    const auto product = uint64_t(uint32_t(n)) * multiplier;
    return value == 1 ? n : int(uint32_t(product >> 32) >> shift);
  }
};

}  // namespace vitkit::attention
