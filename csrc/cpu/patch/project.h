// The projection of patches in float32, for any element type: weights in panels (gemm.h), a block
// of patches as rows, sums of a block in scratch, and what happens to a finished row.
#pragma once

#include "attention/arena.h"
#include "gemm.h"
#include "norm/rows.h"
#include "patch/pixels.h"

namespace vitkit::cpu::VITKIT_ISA {

// Depth of one pass over a block: its piece of a panel stays in the first-level cache while all
// rows of the block meet it.
constexpr int64_t kDepthChunk = 256;
// A block of 768 elements a row and its sums stay in a 512 KiB cache.
constexpr int64_t kMostRows = 96 / kTileRows * kTileRows;

// Elements [first, first + n) of row e of the weight, in the order of a patch's elements, times
// their factors. Adds row times offset to *shift.
template <typename T, typename To>
VITKIT_INLINE void weight_row(const PatchEmbed& p, int64_t e, int64_t first, int64_t n, To* row,
                              f32v* shift) {
  const T* from = reinterpret_cast<const T*>(p.weight) + e * p.depth;
  each_vector(n, [&](int64_t i, auto count) {
    const int64_t k = first + i;
    f32v v = {};
    if (p.order)
      for (int j = 0; j < count; ++j) v[j] = to_float(from[p.order[k + j]]);
    else
      v = load_partial(from + k, count);
    if (p.factor) {
      if (shift) *shift = fma(v, load_partial(p.offset + k, count), *shift);
      v *= load_partial(p.factor + k, count);
    }
    store_partial(row + i, v, count);
  });
}

// Eight columns of a panel, from rows e .. e + 7 of the weight in its own order. Returns the depth
// that is done: the rest, less than 8 elements, is the caller's.
#if defined(__AVX2__)
template <typename T>
VITKIT_INLINE int64_t pack_eight_in_order(const PatchEmbed& p, int64_t e, float* dst,
                                          float* offsets) {
  const T* from = reinterpret_cast<const T*>(p.weight) + e * p.depth;
  const int64_t rows = p.embed - e < 8 ? p.embed - e : 8;
  __m256 in[8], sums[8];
  for (int r = 0; r < 8; ++r) sums[r] = in[r] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 8 <= p.depth; k += 8) {
    for (int r = 0; r < 8; ++r)
      in[r] = r < rows ? load8(from + r * p.depth + k) : _mm256_setzero_ps();
    if (p.factor) {
      const __m256 offset = load8(p.offset + k), factor = load8(p.factor + k);
      for (int r = 0; r < 8; ++r) {
        sums[r] = _mm256_fmadd_ps(in[r], offset, sums[r]);
        in[r] = _mm256_mul_ps(in[r], factor);
      }
    }
    transpose8(in, dst + k * kPanel);
  }
  for (int r = 0; r < 8; ++r) {
    float lanes[8];
    _mm256_storeu_ps(lanes, sums[r]);
    for (int i = 0; i < 8; ++i) offsets[r] += lanes[i];
  }
  return k;
}
#else
template <typename T>
VITKIT_INLINE int64_t pack_eight_in_order(const PatchEmbed&, int64_t, float*, float*) {
  return 0;
}
#endif

// Eight columns of a panel and their shift, from rows e .. e + 7 of the weight.
template <typename T>
VITKIT_INLINE void pack_eight(const PatchEmbed& p, int64_t e, float* dst, float* shift) {
  constexpr int64_t kPiece = 16;
  float offsets[8] = {};
  int64_t k = p.order ? 0 : pack_eight_in_order<T>(p, e, dst, offsets);
  for (; k < p.depth; k += kPiece) {
    const int64_t n = p.depth - k < kPiece ? p.depth - k : kPiece;
    for (int r = 0; r < 8; ++r) {
      alignas(64) float row[kPiece] = {};
      f32v sum = {};
      if (e + r < p.embed) weight_row<T>(p, e + r, k, n, row, &sum);
      for (int64_t i = 0; i < n; ++i) dst[(k + i) * kPanel + r] = row[i];
      offsets[r] += reduce_add(sum);
    }
  }
  for (int r = 0; r < 8; ++r)
    shift[e + r] = (p.bias && e + r < p.embed ? p.bias[e + r] : 0.f) + offsets[r];
}

VITKIT_INLINE int64_t float32_weight_panels(const PatchEmbed& p) { return num_panels(p.embed); }
VITKIT_INLINE size_t float32_weight_bytes(const PatchEmbed& p) {
  return size_t(num_panels(p.embed) * kPanel * p.depth) * sizeof(float);
}

static void pack_weight_float32(const PatchEmbed& p, void* weights, float* shift, int64_t begin,
                                int64_t end) {
  with_float_type(p.type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t j = 0; j < kPanel; j += 8)
        pack_eight<T>(p, panel * kPanel + j,
                      static_cast<float*>(weights) + panel * kPanel * p.depth + j, shift);
  });
}

template <typename Pixel>
VITKIT_INLINE void pack_patches(const PatchEmbed& p, int64_t first, int64_t rows, float* a,
                                int64_t stride) {
  Places places(p, first);
  for (int64_t r = 0; r < rows;) {
    const Place at = places.get();
    int64_t count = p.run <= kLanes ? places.whole_neighbours(rows - r) : 0;
    if (count > 1 && vectors_fit(p, at, count)) {
      pack_neighbours<Pixel>(p, at, count, a + r * stride, stride);
    } else {
      pack_lines<Pixel>(p, at, 0, lines_of(p), a + r * stride);
      count = 1;
    }
    for (r += count; count > 0; --count) places.next();
  }
}

// c[r][panel by panel] = sum over depth of a[r] and the panels. Rows of a and c up to the next even
// number are read and written.
static void multiply_panels(const float* a, int64_t a_stride, const float* panels, int64_t depth,
                            float* c, int64_t c_stride, int64_t rows, int64_t columns) {
  for (int64_t k = 0; k < depth; k += kDepthChunk) {
    const int64_t n = depth - k < kDepthChunk ? depth - k : kDepthChunk;
    for (int64_t panel = 0; panel < num_panels(columns); ++panel) {
      const float* b = panels + (panel * depth + k) * kPanel;
      const int vecs = panel_vecs(columns, panel);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t tile = rows - r < kTileRows ? rows - r : kTileRows;
        float* to = c + r * c_stride + panel * kPanel;
        if (k == 0)
          gemm_rows<false, Epilogue::overwrite>(tile, vecs, n, a + r * a_stride, a_stride, b, to,
                                                c_stride);
        else
          gemm_rows<false, Epilogue::accumulate>(tile, vecs, n, a + r * a_stride + k, a_stride, b,
                                                 to, c_stride);
      }
    }
  }
}

// ---- what happens to a finished row ----

// z = scale z + shift for R rows `stride` apart, and their moments.
template <int R>
VITKIT_INLINE void complete_rows(const PatchEmbed& p, const float* shift, float* z, int64_t stride,
                                 float* mean, float* rstd) {
  const f32v scale = splat(p.scale);
  each_vector(p.embed, [&](int64_t i, auto n) {
    const f32v add = load_partial(shift + i, n);
    for (int r = 0; r < R; ++r) {
      float* at = z + r * stride + i;
      store_partial(at, fma(load_partial(at, n), scale, add), n);
    }
  });
  block_statistics<float, R>(z, stride, p.embed, p.norm_eps, mean, rstd);
}

// to = f(i, count) + pos[i]
template <typename T, typename Position, typename F>
VITKIT_INLINE void write_added(int64_t n, const Position* pos, T* to, const F& f) {
  if (pos)
    each_vector(n, [&](int64_t i, auto count) {
      store_partial(to + i, f(i, count) + load_partial(pos + i, count), count);
    });
  else
    each_vector(n, [&](int64_t i, auto count) { store_partial(to + i, f(i, count), count); });
}

// f(the row of `rows`), a null pointer without them.
template <typename F>
VITKIT_INLINE void with_row(const TokenRows& rows, int64_t row, int64_t embed, const F& f) {
  if (!rows.data) return f(static_cast<const float*>(nullptr));
  with_float_type(rows.type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    f(reinterpret_cast<const T*>(rows.data) + row * embed);
  });
}

// A row with its sums in z; mean and rstd are those of LayerNorm's input, which z then is.
template <typename T>
VITKIT_INLINE void finish_row(const PatchForward& forward, const float* z, float mean, float rstd,
                              const Place& at) {
  const PatchEmbed& p = forward.in;
  T* to = reinterpret_cast<T*>(forward.out) + at.out * p.embed;
  with_row(p.position, at.position, p.embed, [&](const auto* pos) {
    if (!p.norm_weight) {
      const f32v scale = splat(p.scale);
      return write_added(p.embed, pos, to, [&](int64_t i, auto n) {
        return fma(load_partial(z + i, n), scale, load_partial(forward.shift + i, n));
      });
    }
    write_added(p.embed, pos, to, [&](int64_t i, auto n) {
      const f32v x = (load_partial(z + i, n) - mean) * rstd;
      const f32v gain = load_partial(p.norm_weight + i, n);
      return p.norm_bias ? fma(x, gain, load_partial(p.norm_bias + i, n)) : x * gain;
    });
  });
}

// The tokens before the patches of an image.
template <typename T>
VITKIT_INLINE void write_prefix(const PatchForward& forward, int64_t image) {
  const PatchEmbed& p = forward.in;
  for (int64_t r = 0; r < p.prefixes; ++r) {
    T* to = reinterpret_cast<T*>(forward.out) + (image * p.out_rows() + r) * p.embed;
    const TokenRows position = p.position_of_prefix ? p.position : TokenRows{};
    with_row(position, r, p.embed, [&](const auto* pos) {
      with_row(p.prefix, r, p.embed, [&](const auto* from) {
        write_added(p.embed, pos, to, [&](int64_t i, auto n) { return load_partial(from + i, n); });
      });
    });
  }
}

// R rows of the output from their sums, `stride` apart. Advances places.
template <typename T, int R>
VITKIT_INLINE void finish_rows(const PatchForward& forward, float* z, int64_t stride,
                               Places& places) {
  float mean[R] = {}, rstd[R] = {};
  if (forward.in.norm_weight) complete_rows<R>(forward.in, forward.shift, z, stride, mean, rstd);
  for (int r = 0; r < R; ++r, places.next())
    finish_row<T>(forward, z + r * stride, mean[r], rstd[r], places.get());
}

// Rows [first, first + rows) of the output from their sums; z_row(r) is a row of them, `stride`
// from the next one. Without a stride there is one row at a time.
template <typename T, typename ZRow>
VITKIT_INLINE void finish_block(const PatchForward& forward, int64_t first, int64_t rows,
                                int64_t stride, const ZRow& z_row) {
  constexpr int kTogether = 4;
  const PatchEmbed& p = forward.in;
  Places places(p, first);
  int64_t r = 0;
  for (; stride > 0 && r + kTogether <= rows; r += kTogether)
    finish_rows<T, kTogether>(forward, z_row(r), stride, places);
  for (; r < rows; ++r) finish_rows<T, 1>(forward, z_row(r), 0, places);
  if (p.prefixes)
    for (r = (first + p.patches - 1) / p.patches * p.patches; r < first + rows; r += p.patches)
      write_prefix<T>(forward, r / p.patches);
}

}  // namespace vitkit::cpu::VITKIT_ISA
