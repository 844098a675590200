// Copies rows of T into float32 buffers the matrix product (gemm.h) can read. A row is head_dim
// consecutive elements (a multiple of 8) found through `row(i) -> const T*`, so any token map can
// be packed without a gathered copy of the tensor. Padding up to whole panels is zero.
#pragma once

#include "gemm.h"

namespace vitkit::cpu::VITKIT_ISA {

// Floats of a packed operand with k rows of `columns` columns.
VITKIT_INLINE int64_t panels_size(int64_t columns, int64_t k) {
  return num_panels(columns) * kPanel * k;
}

constexpr int64_t kMaxHeadDim = 256;

template <typename T>
alignas(64) constexpr T kZeroRow[kMaxHeadDim] = {};

// Eight rows of `depth` elements become eight columns of a panel.
template <typename T>
VITKIT_INLINE void pack_eight_columns(const T* const (&from)[8], int64_t depth, float* out) {
  int64_t d = 0;
#if defined(__AVX2__)
  for (; d + 8 <= depth; d += 8) {
    __m256 in[8];
    for (int r = 0; r < 8; ++r) in[r] = load8(from[r] + d);
    transpose8(in, out + d * kPanel);
  }
#endif
  for (; d < depth; ++d)
    for (int r = 0; r < 8; ++r) out[d * kPanel + r] = to_float(from[r][d]);
}

// Row j of the source becomes column j: panel p is [depth][kPanel] with rows p * kPanel ... of the
// source side by side, and zeros up to a whole vector: a product reads no further (panel_vecs). The
// operand for S = Q K^T (and dP = dO V^T).
template <typename T, typename Row>
VITKIT_INLINE void pack_transposed(const Row& row, int64_t first, int64_t rows, int64_t depth,
                                   float* dst) {
  for (int64_t j = 0; j < round_up(rows, kLanes < 8 ? 8 : kLanes); j += 8) {
    float* out = dst + j / kPanel * kPanel * depth + j % kPanel;
    const T* from[8];
    for (int r = 0; r < 8; ++r) from[r] = j + r < rows ? row(first + j + r) : kZeroRow<T>;
    pack_eight_columns(from, depth, out);
  }
}

// Row j of the source becomes row j of every panel: panel p is [panel_rows][kPanel] with columns p
// * kPanel ... of the source. The operand for O += P V (and dQ += dS K, dK += dS^T Q, dV += P^T
// dO).
template <typename T, typename Row>
VITKIT_INLINE void pack_panels(const Row& row, int64_t first, int64_t rows, int64_t columns,
                               float* dst, int64_t panel_rows) {
  const int64_t padded = num_panels(columns) * kPanel;
  for (int64_t j = 0; j < rows; ++j) {
    const T* from = row(first + j);
    for (int64_t d = 0; d < padded; d += kLanes) {
      const int64_t left = columns - d;
      float* out = dst + d / kPanel * kPanel * panel_rows + j * kPanel + d % kPanel;
      store(out, left > 0 ? load_partial(from + d, int(left < kLanes ? left : kLanes)) : f32v{});
    }
  }
}

template <typename T, typename Row>
VITKIT_INLINE void pack_panels(const Row& row, int64_t first, int64_t rows, int64_t columns,
                               float* dst) {
  pack_panels<T>(row, first, rows, columns, dst, rows);
}

// dst[j * ld + d] = factor * row(first + j)[d]: the left operand A. Rows up to the next even number
// are zeroed.
template <typename T, typename Row>
VITKIT_INLINE void pack_rows(const Row& row, int64_t first, int64_t rows, int64_t columns,
                             float factor, float* dst, int64_t ld) {
  for (int64_t j = 0; j < round_rows(rows); ++j) {
    const T* from = j < rows ? row(first + j) : nullptr;
    each_vector(columns, [&](int64_t d, auto n) {
      store_partial(dst + j * ld + d, from ? load_partial(from + d, n) * factor : f32v{}, n);
    });
  }
}

// to[d] = factor * from[d], rounded to the elements of `to`: a pointer, or what else store_partial
// takes.
template <typename To>
VITKIT_INLINE void write_row(const float* from, int64_t columns, float factor, To to) {
  each_vector(columns, [&](int64_t d, auto n) {
    store_partial(to + d, load_partial(from + d, n) * factor, n);
  });
}

}  // namespace vitkit::cpu::VITKIT_ISA
