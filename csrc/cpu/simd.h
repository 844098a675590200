// SIMD vocabulary of the CPU kernels.
//
// A kernel file (`*_kernel.cpp`) is compiled once per instruction set with -DVITKIT_ISA=<name> and
// the matching -march flags; the host file picks one table of function pointers at run time
// (isa.h). Everything here therefore lives in namespace vitkit::cpu::<name>: an inline function
// with vague linkage compiled for AVX-512 must never be merged by the linker with its twin compiled
// for the baseline. For the same reason kernel files use no std:: containers or algorithms.
//
// Vectors are GCC/Clang vector extensions, so the same source is legal for every width (the
// compiler splits a 64-byte vector on an AVX2 machine: that is how the tests run the 16-lane code
// without AVX-512). Intrinsics appear only where the extensions cannot say it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef VITKIT_ISA
#error "compile kernel files with -DVITKIT_ISA=<base|avx2|avx512|amx>"
#endif

#ifndef VITKIT_SIMD_LANES
#if defined(__AVX512F__)
#define VITKIT_SIMD_LANES 16
#elif defined(__AVX2__)
#define VITKIT_SIMD_LANES 8
#else
#define VITKIT_SIMD_LANES 4
#endif
#endif

#define VITKIT_INLINE static inline __attribute__((always_inline))

namespace vitkit::cpu::VITKIT_ISA {

constexpr int kLanes = VITKIT_SIMD_LANES;

using f32v = float __attribute__((vector_size(kLanes * 4)));
using i32v = int32_t __attribute__((vector_size(kLanes * 4)));
using u32v = uint32_t __attribute__((vector_size(kLanes * 4)));
using u16v = uint16_t __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

VITKIT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- scalar conversions ----

VITKIT_INLINE float to_float(float x) { return x; }
VITKIT_INLINE float to_float(uint8_t x) { return float(x); }

VITKIT_INLINE float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

VITKIT_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift the 15 magnitude bits into place and rescale by 2^112: subnormals come out right, inf/nan
  // need their exponent restored.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((x.bits & 0x7c00u) == 0x7c00u) u |= 0x7f800000u;
  u |= uint32_t(x.bits & 0x8000u) << 16;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

VITKIT_INLINE void from_float(float x, float* y) { *y = x; }

VITKIT_INLINE void from_float(float x, bf16* y) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  y->bits = nan ? uint16_t((u >> 16) | 0x40u) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

VITKIT_INLINE void from_float(float x, f16* y) {
#if defined(__F16C__)
  y->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) {
    y->bits = sign | 0x7e00u;
  } else if (u >= 0x477ff000u) {  // rounds to infinity
    y->bits = sign | 0x7c00u;
  } else if (u < 0x38800000u) {  // subnormal or zero: let the FPU round by adding 0.5
    float magnitude;
    std::memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, 4);
    y->bits = sign | uint16_t(rounded - 0x3f000000u);
  } else {
    y->bits = sign | uint16_t((u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13);
  }
#endif
}

// ---- vector load and store, always computing in float32 ----

VITKIT_INLINE f32v splat(float x) { return x - f32v{}; }

VITKIT_INLINE f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

VITKIT_INLINE void store(float* p, f32v v) { std::memcpy(p, &v, sizeof(v)); }

VITKIT_INLINE f32v load(const bf16* p) {
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  return f32v(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#elif defined(__AVX2__) && VITKIT_SIMD_LANES == 8
  return f32v(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#else
  u16v h;
  std::memcpy(&h, p, sizeof(h));
  return f32v(__builtin_convertvector(h, u32v) << 16);
#endif
}

VITKIT_INLINE void store(bf16* p, f32v v) {
#if defined(__AVX512BF16__) && VITKIT_SIMD_LANES == 16
  const __m256bh h = _mm512_cvtneps_pbh(__m512(v));
  std::memcpy(p, &h, sizeof(h));
#else
  u32v u = u32v(v);
  // A comparison gives all ones: every NaN becomes the NaN 0xffff instead of rounding up to zero.
  u = ((u + 0x7fffu + ((u >> 16) & 1u)) | u32v(v != v)) >> 16;
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(__m512i(u)));
#elif defined(__AVX2__) && VITKIT_SIMD_LANES == 8
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(__m256i(u), __m256i(u)), 0x8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  const u16v h = __builtin_convertvector(u, u16v);
  std::memcpy(p, &h, sizeof(h));
#endif
#endif
}

VITKIT_INLINE f32v load(const f16* p) {
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  return f32v(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && VITKIT_SIMD_LANES == 8
  return f32v(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  f32v v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

VITKIT_INLINE void store(f16* p, f32v v) {
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && VITKIT_SIMD_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}

VITKIT_INLINE f32v load(const uint8_t* p) {
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  return f32v(_mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__) && VITKIT_SIMD_LANES == 8
  return f32v(_mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  f32v v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// The first n (0 <= n <= kLanes) elements; the rest of a load is `fill`, the rest of memory is not
// touched.
template <typename T>
VITKIT_INLINE f32v load_partial(const T* p, int n, float fill = 0.f) {
  if (n >= kLanes) return load(p);
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  if constexpr (std::is_same_v<T, float>)
    return f32v(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1u), p));
#endif
  float buffer[kLanes];
  for (int i = 0; i < kLanes; ++i) buffer[i] = i < n ? to_float(p[i]) : fill;
  return load(buffer);
}

template <typename T>
VITKIT_INLINE void store_partial(T* p, f32v v, int n) {
  if (n >= kLanes) return store(p, v);
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// 2 * kLanes consecutive elements as two vectors, split in whichever way is cheapest: for bfloat16
// the even and the odd ones, which one shift and one mask separate. store2 puts them back the same
// way.
template <typename T>
VITKIT_INLINE void load2(const T* p, f32v& a, f32v& b) {
  if constexpr (std::is_same_v<T, bf16>) {
    u32v u;
    std::memcpy(&u, p, sizeof(u));
    a = f32v(u << 16);
    b = f32v(u & 0xffff0000u);
  } else {
    a = load(p);
    b = load(p + kLanes);
  }
}

template <typename T>
VITKIT_INLINE void store2(T* p, f32v a, f32v b) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto rounded = [](f32v v) {
      const u32v u = u32v(v);
      return (u + 0x7fffu + ((u >> 16) & 1u)) | u32v(v != v);
    };
    const u32v u = (rounded(a) >> 16) | (rounded(b) & 0xffff0000u);
    std::memcpy(p, &u, sizeof(u));
  } else {
    store(p, a);
    store(p + kLanes, b);
  }
}

// Calls f(i, count) for the vectors that cover [0, n); count is the constant kLanes but for the
// last.
template <typename F>
VITKIT_INLINE void each_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<int, kLanes>{});
  if (i < n) f(i, int(n - i));
}

// ---- arithmetic ----

VITKIT_INLINE i32v lane_index() {
  i32v index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

// The first n lanes of v, `fill` in the others.
VITKIT_INLINE f32v keep_lanes(f32v v, int64_t n, float fill) {
  return lane_index() < int32_t(n) ? v : splat(fill);
}

// a * b + c; contracted to one FMA where the target has it (-ffp-contract=fast).
VITKIT_INLINE f32v fma(f32v a, f32v b, f32v c) { return a * b + c; }

// NaN in b wins, NaN in a is dropped only by max(NaN, x): callers that must keep NaN test for it.
VITKIT_INLINE f32v max(f32v a, f32v b) {
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  return f32v(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__) && VITKIT_SIMD_LANES == 8
  return f32v(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}

VITKIT_INLINE f32v min(f32v a, f32v b) {
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  return f32v(_mm512_min_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__) && VITKIT_SIMD_LANES == 8
  return f32v(_mm256_min_ps(__m256(a), __m256(b)));
#else
  return a < b ? a : b;
#endif
}

// In GCC's own vectors of 16 lanes without AVX-512 and of 4 lanes: lane by lane, which it
// vectorises.
VITKIT_INLINE f32v square_root(f32v v) {
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  return f32v(_mm512_sqrt_ps(__m512(v)));
#elif defined(__AVX2__) && VITKIT_SIMD_LANES == 8
  return f32v(_mm256_sqrt_ps(__m256(v)));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// All lanes combined: halves with halves, so that any number of lanes above 4 sums in one order.
template <typename Combine>
VITKIT_INLINE float reduce(f32v v, const Combine& combine) {
  typedef float f32x4 __attribute__((vector_size(16)));
#if VITKIT_SIMD_LANES == 4
  f32x4 x = v;
#else
  typedef float f32x8 __attribute__((vector_size(32)));
#if VITKIT_SIMD_LANES == 16
  f32x8 y = combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  f32x8 y = v;
#endif
  f32x4 x =
      combine(__builtin_shufflevector(y, y, 0, 1, 2, 3), __builtin_shufflevector(y, y, 4, 5, 6, 7));
#endif
  x = combine(x, __builtin_shufflevector(x, x, 2, 3, 2, 3));
  x = combine(x, __builtin_shufflevector(x, x, 1, 1, 1, 1));
  return x[0];
}

VITKIT_INLINE float reduce_add(f32v v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

VITKIT_INLINE float reduce_max(f32v v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// 2^x for x in (-inf, 127], flushing results below 2^-126 to 0. Relative error < 1.2e-7 (degree 6),
// which is one rounding of float32. NaN in, NaN out; -inf gives 0.
VITKIT_INLINE f32v exp2_bounded(f32v x) {
  const f32v clamped = x < -126.5f ? splat(-126.5f) : x;
#if defined(__AVX512F__) && VITKIT_SIMD_LANES == 16
  const f32v n =
      f32v(_mm512_roundscale_ps(__m512(clamped), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && VITKIT_SIMD_LANES == 8
  const f32v n =
      f32v(_mm256_round_ps(__m256(clamped), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const f32v magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32v n = (clamped + magic) - magic;
#endif
  const f32v r = clamped - n;
  f32v p = splat(1.54353e-4f);
  p = fma(p, r, splat(1.3398874e-3f));
  p = fma(p, r, splat(9.6184373e-3f));
  p = fma(p, r, splat(5.5503324e-2f));
  p = fma(p, r, splat(2.4022648e-1f));
  p = fma(p, r, splat(6.9314718e-1f));
  p = fma(p, r, splat(1.f));
  const i32v exponent = (__builtin_convertvector(n, i32v) + 127) << 23;
  const f32v y = p * f32v(exponent);
  return x < -126.f ? f32v{} : y;
}

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

}  // namespace vitkit::cpu::VITKIT_ISA
