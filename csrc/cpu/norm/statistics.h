// Mean and M2 (sum of squared deviations) without cancellation: exact two-pass over chunks that
// stay in the first-level cache, chunks merged by Chan's formula in double.
#pragma once

#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  VITKIT_INLINE void merge(Moments& into, double count, double mean, double m2) {
    const double total = into.count + count, delta = mean - into.mean;
    into.mean += delta * (count / total);
    into.m2 += m2 + delta * delta * (into.count * count / total);
    into.count = total;
  }
};

constexpr int64_t kStatisticsChunk = 4096;

template <typename T>
VITKIT_INLINE float sum_of(const T* x, int64_t n) {
  f32v a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  f32v u, v;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    load2(x + i, u, v);
    a += u;
    b += v;
    load2(x + i + 2 * kLanes, u, v);
    c += u;
    d += v;
  }
  for (; i < n; i += kLanes) a += load_partial(x + i, int(n - i < kLanes ? n - i : kLanes));
  return reduce_add((a + b) + (c + d));
}

template <typename T>
VITKIT_INLINE float squares_about(const T* x, int64_t n, float mean) {
  const f32v m = splat(mean);
  f32v a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  const auto square = [&](f32v v) { return (v - m) * (v - m); };
  f32v u, v;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    load2(x + i, u, v);
    a += square(u);
    b += square(v);
    load2(x + i + 2 * kLanes, u, v);
    c += square(u);
    d += square(v);
  }
  for (; i < n; i += kLanes) {
    v = load_partial(x + i, int(n - i < kLanes ? n - i : kLanes), mean) - m;
    a += v * v;
  }
  return reduce_add((a + b) + (c + d));
}

// Adds n contiguous values to the moments.
template <typename T>
VITKIT_INLINE void add_values(Moments& moments, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kStatisticsChunk) {
    const int64_t count = n - i < kStatisticsChunk ? n - i : kStatisticsChunk;
    const float mean = sum_of(x + i, count) / float(count);
    Moments::merge(moments, double(count), mean, squares_about(x + i, count, mean));
  }
}

}  // namespace vitkit::cpu::VITKIT_ISA
