// SiLU and its derivative on vectors, as accurate as the element type they will be rounded to
// needs.
#pragma once

#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

// 1 / d for d in [1, 2^121].
template <typename T>
VITKIT_INLINE f32v reciprocal(f32v d) {
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  const f32v r = f32v(_mm512_rcp14_ps(__m512(d)));
#elif defined(__AVX2__) && VITKIT_SIMD_LANES == 8
  const f32v r = f32v(_mm256_rcp_ps(__m256(d)));
#else
  const f32v r = 1.f / d;
#endif
  // 12 to 14 bits are enough for bfloat16's 8; one Newton step doubles them for the others.
  if constexpr (std::is_same_v<T, bf16>) return r;
  return r * (2.f - d * r);
}

// 2^x for x in [-126, 127]; relative error 1e-4 for bfloat16, 2.8e-6 for float16, 1e-7 for float32.
template <typename T>
VITKIT_INLINE f32v exp2_for(f32v x) {
  const f32v magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v shifted = x + magic;
  const f32v r = x - (shifted - magic);
  f32v p;
  if constexpr (std::is_same_v<T, bf16>) {
    p = fma(splat(0.05500891f), r, splat(0.24221101f));
    p = fma(p, r, splat(0.69328294f));
  } else if constexpr (std::is_same_v<T, f16>) {
    p = fma(splat(0.00958285f), r, splat(0.05590643f));
    p = fma(p, r, splat(0.24024099f));
    p = fma(p, r, splat(0.69312419f));
  } else {
    p = fma(splat(0.00132647f), r, splat(0.00967151f));
    p = fma(p, r, splat(0.05550734f));
    p = fma(p, r, splat(0.24022242f));
    p = fma(p, r, splat(0.69314698f));
  }
  p = fma(p, r, splat(1.f));
  return f32v(i32v(p) + (i32v(shifted) << 23));
}

// 1 / (1 + exp(-z)); NaN stays NaN. Below -83 the result is held at 2^-120 instead of falling on.
template <typename T>
VITKIT_INLINE f32v sigmoid(f32v z) {
  const f32v t = max(splat(-120.f), min(splat(120.f), z * -kLog2e));
  return reciprocal<T>(1.f + exp2_for<T>(t));
}

template <typename T, bool kSilu>
VITKIT_INLINE f32v activate(f32v z) {
  if constexpr (kSilu) return z * sigmoid<T>(z);
  return z;
}

// d activate(z) / dz
template <typename T, bool kSilu>
VITKIT_INLINE f32v activation_slope(f32v z) {
  if constexpr (kSilu) {
    const f32v s = sigmoid<T>(z);
    return s * fma(z, 1.f - s, splat(1.f));
  }
  return splat(1.f);
}

}  // namespace vitkit::cpu::VITKIT_ISA
