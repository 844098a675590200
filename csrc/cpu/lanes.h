// Moving lanes between vectors: what reductions of many rows at once and transpositions are made
// of. A quarter is 128 bits, the width within which moving a lane is cheapest.
#pragma once

#include <utility>

#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

// Lane l of the result is lane kIndex[l] of a (0 .. kLanes - 1) or b (kLanes ...).
template <int... kIndex>
VITKIT_INLINE f32v shuffle(f32v a, f32v b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, i32v{kIndex...});
#endif
}

enum class Lanes { low_singles, high_singles, low_pairs, high_pairs, even_quarters, odd_quarters };

// Singles and pairs of lanes of a and b are interleaved within each quarter; quarters are those of
// a, then those of b.
constexpr int source_lane(Lanes which, int lane) {
  const int quarter = lane / 4 * 4, at = lane % 4;
  switch (which) {
    case Lanes::low_singles:
    case Lanes::high_singles:
      return at % 2 * kLanes + quarter + at / 2 + (which == Lanes::high_singles ? 2 : 0);
    case Lanes::low_pairs:
    case Lanes::high_pairs:
      return at / 2 * kLanes + quarter + at % 2 + (which == Lanes::high_pairs ? 2 : 0);
    case Lanes::even_quarters:
    case Lanes::odd_quarters:
      break;
  }
  // Of 2 kLanes lanes side by side, quarters 0, 2, 4, ... or 1, 3, 5, ...
  return 2 * quarter + at + (which == Lanes::odd_quarters ? 4 : 0);
}

template <Lanes kWhich, int... kLane>
VITKIT_INLINE f32v combine(f32v a, f32v b, std::integer_sequence<int, kLane...>) {
  return shuffle<source_lane(kWhich, kLane)...>(a, b);
}

VITKIT_INLINE f32v low_singles(f32v a, f32v b) {
  return combine<Lanes::low_singles>(a, b, std::make_integer_sequence<int, kLanes>());
}
VITKIT_INLINE f32v high_singles(f32v a, f32v b) {
  return combine<Lanes::high_singles>(a, b, std::make_integer_sequence<int, kLanes>());
}
VITKIT_INLINE f32v low_pairs(f32v a, f32v b) {
  return combine<Lanes::low_pairs>(a, b, std::make_integer_sequence<int, kLanes>());
}
VITKIT_INLINE f32v high_pairs(f32v a, f32v b) {
  return combine<Lanes::high_pairs>(a, b, std::make_integer_sequence<int, kLanes>());
}
VITKIT_INLINE f32v even_quarters(f32v a, f32v b) {
  return combine<Lanes::even_quarters>(a, b, std::make_integer_sequence<int, kLanes>());
}
VITKIT_INLINE f32v odd_quarters(f32v a, f32v b) {
  return combine<Lanes::odd_quarters>(a, b, std::make_integer_sequence<int, kLanes>());
}

// Lane r of the result is `op` over the lanes of v[r]. Destroys v.
template <typename Op>
VITKIT_INLINE f32v reduce_rows(f32v (&v)[kLanes], const Op& op) {
  for (int i = 0; i < kLanes / 2; ++i)
    v[i] = op(low_singles(v[2 * i], v[2 * i + 1]), high_singles(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < kLanes / 4; ++i)
    v[i] = op(low_pairs(v[2 * i], v[2 * i + 1]), high_pairs(v[2 * i], v[2 * i + 1]));
  for (int n = kLanes / 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i)
      v[i] = op(even_quarters(v[2 * i], v[2 * i + 1]), odd_quarters(v[2 * i], v[2 * i + 1]));
  return v[0];
}

}  // namespace vitkit::cpu::VITKIT_ISA
