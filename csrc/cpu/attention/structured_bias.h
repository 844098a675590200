// Score terms that exist only in compact form, and where their gradients go: the decomposed
// relative positions of Segment Anything and the distances of 2-D ALiBi.
//
// A query's gradients are summed in float32 at (batch, head, query): queries are what cells of
// different lanes never share, and a query meets its cells in one order (flash_attention_bwd.h).
#pragma once

#include "attention/params.h"
#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

constexpr int64_t kMostRowKeys = 1024;  // of a call of row(): the longest chunk of any core

// x + row[j ...], a row in base-2 units that may be read up to the next multiple of kLanes.
struct AddRow {
  const float* values;

  f32v operator()(f32v x, int64_t j, int) const { return x + load(values + j); }
};

// to[j] = from[j] * log2(e) for j < n; up to the next multiple of kLanes may be written.
template <typename B>
VITKIT_INLINE void load_base2(const B* from, int64_t n, float* to) {
  each_vector(n, [&](int64_t j, auto lanes) {
    store(to + j, load_partial(from + j, lanes) * splat(kLog2e));
  });
}

// rel_h[ih] + rel_w[iw] for key ih * width + iw.
struct DecomposedTerm {
  static constexpr bool kNone = false;
  const char *rel_h, *rel_w;  // of (batch, head, 0)
  ElementType type;
  int64_t h_stride, w_stride;  // of queries
  int64_t width;

  template <typename Body>
  void row(int64_t i, int64_t j0, int64_t n, const Body& body) const {
    switch (type) {
      case ElementType::f32:
        return typed_row<float>(i, j0, n, body);
      case ElementType::bf16:
        return typed_row<bf16>(i, j0, n, body);
      case ElementType::f16:
        return typed_row<f16>(i, j0, n, body);
      case ElementType::boolean:
        break;
    }
    __builtin_trap();
  }

 private:
  template <typename B, typename Body>
  void typed_row(int64_t i, int64_t j0, int64_t n, const Body& body) const {
    float values[kMostRowKeys + kLanes];
    unfold(reinterpret_cast<const B*>(rel_h) + i * h_stride,
           reinterpret_cast<const B*>(rel_w) + i * w_stride, j0, n, values);
    body(AddRow{values});
  }

  // One row of the grid of keys after the other, each a constant plus (a part of) rel_w. A store
  // beyond the end of one is overwritten by the next.
  template <typename B>
  void unfold(const B* h, const B* w, int64_t j0, int64_t n, float* to) const {
    float columns[kMostRowKeys + kLanes];
    int64_t ih = j0 / width, first = j0 % width, j = 0;
    int64_t run = width - first < n ? width - first : n;
    load_base2(w + first, run, columns);
    while (true) {
      const f32v constant = splat(to_float(h[ih++]) * kLog2e);
      for (int64_t c = 0; c < run; c += kLanes) store(to + j + c, load(columns + c) + constant);
      j += run;
      if (j >= n) return;
      if (first != 0) load_base2(w, width < n - j ? width : n - j, columns);
      first = 0;
      run = width < n - j ? width : n - j;
    }
  }
};

// -slope * |q_i - k_j|; NaN coordinates (a token without a place) give 0.
struct DistanceTerm {
  static constexpr bool kNone = false;
  float slope;
  const float *qx, *qy, *kx, *ky;  // keys: readable up to the next multiple of kLanes

  // Of kLanes keys from j on.
  f32v distance(int64_t i, int64_t j) const {
    const f32v dx = load(kx + j) - splat(qx[i]), dy = load(ky + j) - splat(qy[i]);
    return square_root(max(fma(dx, dx, dy * dy), f32v{}));  // max drops NaN
  }

  template <typename Body>
  void row(int64_t i, int64_t j0, int64_t, const Body& body) const {
    const f32v factor = splat(-slope * kLog2e);
    body([&](f32v x, int64_t j, int) { return fma(distance(i, j0 + j), factor, x); });
  }
};

// Sums of ds over the rows and over the columns of the grid of keys; null without a gradient.
struct DecomposedSink {
  static constexpr bool kNone = false, kExactDelta = false, kChanges = false;
  float *drel_h, *drel_w;  // of (batch, head, 0), rows of height and of width
  int64_t height, width;

  void add(int64_t i, int64_t j0, int64_t n, const float* ds) const {
    if (!drel_h) return;
    float* to_h = drel_h + i * height + j0 / width;
    int64_t first = j0 % width;
    for (int64_t j = 0; j < n; first = 0, ++to_h) {
      const int64_t run = width - first < n - j ? width - first : n - j;
      *to_h += add_run(ds + j, run, drel_w + i * width + first);
      j += run;
    }
  }

 private:
  // to[c] += ds[c]; returns the sum.
  static float add_run(const float* ds, int64_t n, float* to) {
    f32v sum = {};
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
      const f32v x = load(ds + c);
      store(to + c, load(to + c) + x);
      sum += x;
    }
    float rest = 0.f;
    for (; c < n; ++c) {
      to[c] += ds[c];
      rest += ds[c];
    }
    return reduce_add(sum) + rest;
  }
};

// The gradient of a head's slope, per query: -sum ds * distance. Null without a gradient.
struct DistanceSink {
  static constexpr bool kNone = false, kExactDelta = false, kChanges = false;
  DistanceTerm term;
  float* sums;  // of (batch, head, 0)

  void add(int64_t i, int64_t j0, int64_t n, const float* ds) const {
    if (!sums) return;
    f32v sum = {};
    each_vector(n, [&](int64_t j, auto lanes) {
      sum = fma(load_partial(ds + j, lanes), term.distance(i, j0 + j), sum);
    });
    sums[i] -= reduce_add(sum);
  }
};

VITKIT_INLINE DecomposedTerm decomposed_term(const DecomposedView& v, int64_t b, int64_t h) {
  const int64_t bytes = v.type == ElementType::f32 ? 4 : 2;
  return {v.rel_h + (b * v.h_batch_stride + h * v.h_head_stride) * bytes,
          v.rel_w + (b * v.w_batch_stride + h * v.w_head_stride) * bytes,
          v.type,
          v.h_query_stride,
          v.w_query_stride,
          v.width};
}

VITKIT_INLINE DistanceTerm distance_term(const DistanceView& v, int64_t b, int64_t h) {
  const float *q = v.q + b * v.q_batch_stride, *k = v.k + b * v.k_batch_stride;
  return {v.slopes[h], q, q + v.q_plane, k, k + v.k_plane};
}

}  // namespace vitkit::cpu::VITKIT_ISA
