// Rows of any element type beside rows of the kernel's own: read to float32, in pairs of vectors.
//
// A pair is 2 * kLanes consecutive elements. Where every large operand is bfloat16 a pair is split
// into its even and its odd elements, which costs one shift and one mask (simd.h: load2); float32
// rows beside it must then lie in that order too.
#pragma once

#include "norm/element.h"
#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

constexpr int kPair = 2 * kLanes;

template <typename T>
VITKIT_INLINE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

template <typename T>
VITKIT_INLINE T* at(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}

// Whether pairs of a kernel over elements T beside a tensor of elements M are split.
template <typename T, typename M = T>
constexpr bool kIsSplit = std::is_same_v<T, bf16> && std::is_same_v<M, bf16>;

template <bool kSplit, typename T>
VITKIT_INLINE void load_pair(const T* p, f32v& a, f32v& b) {
  if constexpr (kSplit) {
    load2(p, a, b);
  } else {
    a = load(p);
    b = load(p + kLanes);
  }
}

template <bool kSplit, typename T>
VITKIT_INLINE void store_pair(T* p, f32v a, f32v b) {
  if constexpr (kSplit) {
    store2(p, a, b);
  } else {
    store(p, a);
    store(p + kLanes, b);
  }
}

// Calls pair(i) for the pairs that lie in [0, n) and rest(i, count) for the vectors of what is
// left, which is never split.
template <typename Pair, typename Rest>
VITKIT_INLINE void each_pair(int64_t n, const Pair& pair, const Rest& rest) {
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) pair(i);
  const int64_t begin = i;
  each_vector(n - begin, [&](int64_t k, auto count) { rest(begin + k, count); });
}

// A float32 row from natural order into the order of split pairs, in place, and back.
VITKIT_INLINE void split_pairs(float* row, int64_t n) {
  for (int64_t i = 0; i + kPair <= n; i += kPair) {
    float natural[kPair];
    std::memcpy(natural, row + i, sizeof(natural));
    for (int k = 0; k < kLanes; ++k) {
      row[i + k] = natural[2 * k];
      row[i + kLanes + k] = natural[2 * k + 1];
    }
  }
}

VITKIT_INLINE void join_pairs(float* row, int64_t n) {
  for (int64_t i = 0; i + kPair <= n; i += kPair) {
    float split[kPair];
    std::memcpy(split, row + i, sizeof(split));
    for (int k = 0; k < kLanes; ++k) {
      row[i + 2 * k] = split[k];
      row[i + 2 * k + 1] = split[kLanes + k];
    }
  }
}

// The sums of R vectors. Four at once take a third of the instructions of four times one; fewer
// take the same steps, so that a row has one result whatever it is summed beside.
template <int R>
VITKIT_INLINE void reduce_rows(const f32v* v, float* sums) {
#if defined(__AVX2__) && VITKIT_SIMD_LANES >= 8
  for (int first = 0; first < R; first += 4) {
    __m256 h[4] = {};
    for (int r = 0; r < 4 && first + r < R; ++r) {
#if VITKIT_SIMD_LANES == 8
      h[r] = __m256(v[first + r]);
#else
      __m256 halves[2];
      std::memcpy(halves, v + first + r, sizeof(halves));
      h[r] = _mm256_add_ps(halves[0], halves[1]);
#endif
    }
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    float four[4];
    _mm_storeu_ps(four, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    for (int r = 0; r < 4 && first + r < R; ++r) sums[first + r] = four[r];
  }
#else
  for (int r = 0; r < R; ++r) sums[r] = reduce_add(v[r]);
#endif
}

// Mean and 1 / sqrt(variance + eps) of R rows `stride` elements apart, in two passes: the end of
// one row's sum, a chain of dependent instructions, hides behind the work of the others.
template <typename T, int R>
VITKIT_INLINE void block_statistics(const T* x, int64_t stride, int64_t n, float eps, float* mean,
                                    float* rstd) {
  constexpr bool kSplit = kIsSplit<T>;
  f32v a[R] = {}, b[R] = {};
  each_pair(
      n,
      [&](int64_t i) {
        for (int r = 0; r < R; ++r) {
          f32v u, v;
          load_pair<kSplit>(x + r * stride + i, u, v);
          a[r] += u;
          b[r] += v;
        }
      },
      [&](int64_t i, auto count) {
        for (int r = 0; r < R; ++r) a[r] += load_partial(x + r * stride + i, count);
      });
  float sums[R];
  for (int r = 0; r < R; ++r) a[r] += b[r];
  reduce_rows<R>(a, sums);
  f32v m[R];
  for (int r = 0; r < R; ++r) mean[r] = sums[r] / float(n);
  for (int r = 0; r < R; ++r) {
    m[r] = splat(mean[r]);
    a[r] = b[r] = f32v{};
  }
  each_pair(
      n,
      [&](int64_t i) {
        for (int r = 0; r < R; ++r) {
          f32v u, v;
          load_pair<kSplit>(x + r * stride + i, u, v);
          u -= m[r];
          v -= m[r];
          a[r] = fma(u, u, a[r]);
          b[r] = fma(v, v, b[r]);
        }
      },
      [&](int64_t i, auto count) {
        for (int r = 0; r < R; ++r) {
          const f32v d = load_partial(x + r * stride + i, count, mean[r]) - m[r];
          a[r] = fma(d, d, a[r]);
        }
      });
  for (int r = 0; r < R; ++r) a[r] += b[r];
  reduce_rows<R>(a, sums);
  for (int r = 0; r < R; ++r) rstd[r] = 1.f / __builtin_sqrtf(sums[r] / float(n) + eps);
}

// f(a null pointer of the element type)
template <typename F>
VITKIT_INLINE void with_element(NormElement element, const F& f) {
  switch (element) {
    case NormElement::f32:
      return f(static_cast<const float*>(nullptr));
    case NormElement::bf16:
      return f(static_cast<const bf16*>(nullptr));
    case NormElement::f16:
      return f(static_cast<const f16*>(nullptr));
  }
}

// Calls f(i, v, count) for the vectors of row `index` of a small tensor.
template <typename F>
VITKIT_INLINE void each_of_row(const Rows& rows, int64_t index, int64_t n, const F& f) {
  with_element(rows.element, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(rows.data) + index * rows.stride;
    each_vector(n, [&](int64_t i, auto count) { f(i, load_partial(p + i, count), count); });
  });
}

VITKIT_INLINE void fill(float* to, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

VITKIT_INLINE void copy_row(const Rows& rows, int64_t index, int64_t n, float absent, float* to) {
  if (rows.data == nullptr) return fill(to, n, absent);
  each_of_row(rows, index, n,
              [&](int64_t i, f32v v, auto count) { store_partial(to + i, v, count); });
}

// f(element of x, element of the tensor with a value per token, which is float32 or that of x)
template <typename F>
VITKIT_INLINE void with_elements(NormElement x, NormElement per_token, const F& f) {
  const auto given = [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      if (per_token != NormElement::f32) return f(element, element);
    }
    f(element, float{});
  };
  switch (x) {
    case NormElement::f32:
      return given(float{});
    case NormElement::bf16:
      return given(bf16{});
    case NormElement::f16:
      return given(f16{});
  }
}

}  // namespace vitkit::cpu::VITKIT_ISA
