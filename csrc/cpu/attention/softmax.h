// One row of scores at a time: the term, the maximum, and 2^(scaled score - shift) with its sum.
// Rows are padded: reading and writing up to the next multiple of kLanes is allowed. Scores are
// scaled into base-2 units (log2 e is part of `scale`), so a probability is one exp2.
#pragma once

#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

// x where it is larger than `bound` or NaN. (Written as a comparison with a constant, GCC takes two
// instructions.)
VITKIT_INLINE f32v at_least(f32v x, float bound) {
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  return f32v(_mm512_max_ps(__m512(splat(bound)), __m512(x)));
#elif defined(__AVX2__) && VITKIT_SIMD_LANES == 8
  return f32v(_mm256_max_ps(__m256(splat(bound)), __m256(x)));
#else
  return x < bound ? splat(bound) : x;
#endif
}

// 2^x for x <= 1, below 2^-126 exactly 0, NaN stays NaN. Minimax polynomials through 2^0 = 1 on
// [-1/2, 1/2], so that the largest probability of a row is exact: relative
// error 1.0e-4, 2.8e-6, 9.1e-8 (before rounding) for degree 3, 4, 5. Evaluated as a tree, not by
// Horner's rule: latency is what limits this loop.
template <int kDegree>
VITKIT_INLINE f32v exp2_softmax(f32v x) {
  static_assert(kDegree >= 3 && kDegree <= 5);
  constexpr float kTable[3][5] = {
      {0.6932829022f, 0.2422109693f, 0.05500893295f, 0.f, 0.f},
      {0.6931241751f, 0.2402409911f, 0.05590642616f, 0.009582852945f, 0.f},
      {0.6931470037f, 0.2402224243f, 0.05550733581f, 0.009671512991f, 0.001326472731f}};
  constexpr int d = kDegree - 3;
  const f32v magic = splat(
      12582912.f + 127.f);  // 1.5 * 2^23 + bias: adding it leaves round(x) + 127 in the low bits
  const f32v clamped = at_least(x, -127.f);
  const f32v shifted = clamped + magic;
  const f32v r = clamped - (shifted - magic), r2 = r * r;
  const f32v low = fma(splat(kTable[d][0]), r, splat(1.f));
  f32v high = fma(splat(kTable[d][2]), r, splat(kTable[d][1]));
  if constexpr (kDegree == 4) high = fma(splat(kTable[d][3]), r2, high);
  if constexpr (kDegree == 5)
    high = fma(fma(splat(kTable[d][4]), r, splat(kTable[d][3])), r2, high);
  return fma(high, r2, low) * f32v(i32v(shifted) << 23);
}

// ln(2^shift * sum) for a normal positive sum, NaN for NaN. The logarithm of a mantissa m in
// [sqrt(1/2), sqrt(2)] is 2 artanh((m - 1) / (m + 1)), whose series needs five terms for float32.
VITKIT_INLINE f32v log_of_sum(f32v shift, f32v sum) {
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const i32v bits = i32v(sum), exponent = (bits - kSqrtHalf) >> 23;
  const f32v m = f32v(bits - (exponent << 23));
  const f32v s = (m - 1.f) / (m + 1.f), z = s * s;
  f32v p = fma(z, splat(1.f / 9), splat(1.f / 7));
  p = fma(p, z, splat(1.f / 5));
  p = fma(p, z, splat(1.f / 3));
  p = fma(p * z, s, s);
  return fma(shift + __builtin_convertvector(exponent, f32v), splat(kLn2), p + p) + (sum - sum);
}

// The maximum of s[0 .. n), still to be taken over lanes.
VITKIT_INLINE f32v row_max(const float* s, int64_t n) {
  f32v m0 = splat(-INFINITY), m1 = m0;
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    m0 = max(m0, load(s + j));
    m1 = max(m1, load(s + j + kLanes));
  }
  for (; j + kLanes <= n; j += kLanes) m0 = max(m0, load(s + j));
  if (j < n) m1 = max(m1, keep_lanes(load(s + j), n - j, -INFINITY));
  return max(m0, m1);
}

// s[j] = combine(s[j], j, lanes) for j < n, `lanes` <= kLanes elements at a time; returns the
// maximum, still to be taken over lanes.
template <typename Combine>
VITKIT_INLINE f32v row_map_max(float* s, int64_t n, const Combine& combine) {
  f32v m = splat(-INFINITY);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const f32v x = combine(load(s + j), j, kLanes);
    store(s + j, x);
    m = max(m, x);
  }
  if (j < n) {
    const f32v x = keep_lanes(combine(load(s + j), j, int(n - j)), n - j, -INFINITY);
    store(s + j, x);
    m = max(m, x);
  }
  return m;
}

// s[j] = 2^(s[j] * scale - shift) for j < n, 0 for n <= j < padded; returns the sum, still to be
// taken over lanes.
template <int kDegree>
VITKIT_INLINE f32v row_exp(float* s, int64_t n, int64_t padded, float scale, float shift) {
  const f32v c = splat(scale), offset = splat(-shift);
  f32v total = {};
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    const f32v p0 = exp2_softmax<kDegree>(fma(load(s + j), c, offset));
    const f32v p1 = exp2_softmax<kDegree>(fma(load(s + j + kLanes), c, offset));
    store(s + j, p0);
    store(s + j + kLanes, p1);
    total += p0 + p1;
  }
  for (; j < n; j += kLanes) {
    f32v p = exp2_softmax<kDegree>(fma(load(s + j), c, offset));
    if (n - j < kLanes) p = keep_lanes(p, n - j, 0.f);
    store(s + j, p);
    total += p;
  }
  for (; j < padded; j += kLanes) store(s + j, f32v{});
  return total;
}

}  // namespace vitkit::cpu::VITKIT_ISA
