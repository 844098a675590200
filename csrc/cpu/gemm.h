// Register-tiled float32 matrix product on packed panels: C (+)= A B.
//
// B is a "panel": k rows of kPanel consecutive floats (pack.h writes them). A tile of C stays in
// registers for the whole sum over k; each step loads one row of the panel and broadcasts one
// element of A per row of the tile. Rows come in steps of two, so a buffer for A or C must have its
// row count rounded up to even (round_rows).
#pragma once

#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

// Rows x vectors of the largest tile. It must hide the FMA latency (8 or more independent sums) and
// leave registers for one panel row and a broadcast: 12 + 3 of 16 registers, 28 + 3 of 32.
constexpr int kTileRows = kLanes == 16 ? 14 : (kLanes == 8 ? 6 : 4);
constexpr int kPanelVecs = 2;
constexpr int kPanel = kPanelVecs * kLanes;

enum class Epilogue {
  overwrite,         // C = A B
  accumulate,        // C = C + A B
  scale_accumulate,  // C = diag(row_scale) C + A B
};

VITKIT_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
VITKIT_INLINE int64_t num_panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
// Floats from one row of a matrix in scratch to the next: rows of this length neither alias in the
// cache nor end where a vector would write beyond them.
VITKIT_INLINE int64_t row_stride_of(int64_t columns) { return round_up(columns, 16) + 16; }
VITKIT_INLINE int64_t round_rows(int64_t rows) { return (rows + 1) & ~int64_t(1); }

// kTransA: element (r, i) of A is a[i * lda + r] instead of a[r * lda + i].
template <int kRows, int kVecs, bool kTransA, Epilogue kEpilogue>
__attribute__((noinline)) static void gemm_tile(int64_t k, const float* a, int64_t lda,
                                                const float* b, float* c, int64_t ldc,
                                                const float* row_scale) {
  f32v sum[kRows][kVecs] = {};
#pragma GCC unroll 2
  for (int64_t i = 0; i < k; ++i) {
    f32v row[kVecs];
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + i * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const f32v x = splat(kTransA ? a[i * lda + r] : a[r * lda + i]);
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(x, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      float* p = c + r * ldc + v * kLanes;
      if constexpr (kEpilogue == Epilogue::accumulate) sum[r][v] += load(p);
      if constexpr (kEpilogue == Epilogue::scale_accumulate)
        sum[r][v] = fma(load(p), splat(row_scale[r]), sum[r][v]);
      store(p, sum[r][v]);
    }
  }
}

// One tile of `rows` <= kTileRows rows and `vecs` <= kPanelVecs vectors.
template <bool kTransA, Epilogue kEpilogue, int kRows = kTileRows>
VITKIT_INLINE void gemm_rows(int64_t rows, int vecs, int64_t k, const float* a, int64_t lda,
                             const float* b, float* c, int64_t ldc,
                             const float* row_scale = nullptr) {
  if constexpr (kRows > 2) {
    if (rows <= kRows - 2)
      return gemm_rows<kTransA, kEpilogue, kRows - 2>(rows, vecs, k, a, lda, b, c, ldc, row_scale);
  }
  static_assert(kPanelVecs == 2);
  if (vecs == 1)
    gemm_tile<kRows, 1, kTransA, kEpilogue>(k, a, lda, b, c, ldc, row_scale);
  else
    gemm_tile<kRows, 2, kTransA, kEpilogue>(k, a, lda, b, c, ldc, row_scale);
}

// The vectors of panel `panel` that hold one of `columns` columns.
VITKIT_INLINE int panel_vecs(int64_t columns, int64_t panel) {
  return columns - panel * kPanel > kLanes ? 2 : 1;
}

// ---- what packing a panel is made of ----

#if defined(__AVX2__)

VITKIT_INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
VITKIT_INLINE __m256 load8(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
VITKIT_INLINE __m256 load8(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// out[c * kPanel + r] = in[r][c] for an 8 x 8 block.
VITKIT_INLINE void transpose8(const __m256 in[8], float* out) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; ++h) {
      b[i + 2 * h] = _mm256_shuffle_ps(a[i + h], a[i + h + 2], 0x44);
      b[i + 2 * h + 1] = _mm256_shuffle_ps(a[i + h], a[i + h + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * kPanel, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * kPanel, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}

#endif

}  // namespace vitkit::cpu::VITKIT_ISA
