// What turns products of rows into scores of the exp2 domain: a number, or for cosine attention
// (Swin V2) a factor gain / |row| of every row of a tile and 1 / |row| of every column.
//
// Rows are multiplied as they are, and scores by the inverse norms: tiles go from memory to the
// tensor cores untouched, and no rounded direction is ever formed. Norms are taken of tiles in
// shared memory, where the rows of both sides lie anyway.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "score_term.cuh"

namespace vitkit::attention {

constexpr float kMinNormSquared = 1e-24f;
constexpr float kMaxLogitScale = 4.605170185988092f;  // ln 100

// exp(min(logit_scale, ln 100)), in units of log2. NaN stays one.
__device__ __forceinline__ float cosine_gain(float logit_scale) {
  return expf(logit_scale > kMaxLogitScale ? kMaxLogitScale : logit_scale) * kLog2e;
}

__device__ __forceinline__ float inverse_norm(float squared) {
  return rsqrtf(fmaxf(squared, kMinNormSquared));
}

// Sum of squares of every kStep-th chunk of a row, from `first` on.
template <int kStep, typename T, int kColumns>
__device__ __forceinline__ float squares(const SharedTile<T, kColumns>& tile, int row, int first) {
  using Tile = SharedTile<T, kColumns>;
  static_assert(Tile::kChunks % kStep == 0);
  float sum = 0.f;
#pragma unroll
  for (int chunk = 0; chunk < Tile::kChunks; chunk += kStep) {
    const auto x = Pack<T, Tile::kChunk>::load(tile.chunk(row, chunk + first));
#pragma unroll
    for (int i = 0; i < Tile::kChunk; ++i) sum += x.get(i) * x.get(i);
  }
  return sum;
}

// Of rows lane / 4 and lane / 4 + 8 of a row tile of a warp. `all` is that of all scores of the
// head, in units of log2: scale_of.
template <bool kCosine>
struct RowScale {
  float all;

  template <typename Tile>
  __device__ __forceinline__ void load(const Tile&, int) {}
  __device__ __forceinline__ float of(int) const { return all; }
  // Turns sums of rows weighted by ds into gradients.
  template <int kTiles, typename Tile>
  __device__ __forceinline__ void differentiate(float (&d)[kTiles][4], const Tile&, int) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] *= all * kLn2;
  }
};

template <>
struct RowScale<true> {
  float all, scale[2], squared[2];
  float along[2];  // of differentiate: row . gradient, as if scores were not divided by its norm

  // The tile's rows from `row` on.
  template <typename T, int kColumns>
  __device__ __forceinline__ void load(const SharedTile<T, kColumns>& tile, int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      squared[half] = quad_sum(squares<4>(tile, row + lane_id() / 4 + half * 8, lane_id() % 4));
      scale[half] = all * inverse_norm(squared[half]);
    }
  }
  __device__ __forceinline__ float of(int half) const { return scale[half]; }

  // What changes a row's length changes no score. (A norm that was clamped is a constant.)
  template <int kTiles, typename T, int kColumns>
  __device__ __forceinline__ void differentiate(float (&d)[kTiles][4],
                                                const SharedTile<T, kColumns>& tile, int row) {
    static_assert(kTiles * 8 == kColumns, "the gradient of a direction needs the whole row");
    const auto pair = [&](int half, int n) {
      return Pack<T, 2>::load(tile.at(row + lane_id() / 4 + half * 8, n * 8 + lane_id() % 4 * 2));
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = scale[half] * kLn2;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          d[n][half * 2 + i] *= factor;
          sum += d[n][half * 2 + i] * pair(half, n).get(i);
        }
      along[half] = quad_sum(sum);
      const float share = squared[half] > kMinNormSquared ? along[half] / squared[half] : 0.f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) d[n][half * 2 + i] -= share * pair(half, n).get(i);
    }
  }

 private:
  static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
};

// Of columns n * 8 + lane % 4 * 2 and the next one of a tile, which are rows of the other side.
template <bool kCosine, int kTiles>
struct ColumnScale {
  template <typename Tile>
  __device__ __forceinline__ void load(const Tile&) {}
  __device__ __forceinline__ float of(int, int) const { return 1.f; }
  template <typename T>
  __device__ __forceinline__ void weigh(float (&)[kTiles][4]) const {}
};

template <int kTiles>
struct ColumnScale<true, kTiles> {
  float inverse[kTiles][2];

  template <typename T, int kColumns>
  __device__ __forceinline__ void load(const SharedTile<T, kColumns>& tile) {
    constexpr int kRows = kTiles * 8;
    float of_lane[(kRows + kWarp - 1) / kWarp];
#pragma unroll
    for (int row = 0; row < kRows; row += kWarp)
      of_lane[row / kWarp] = inverse_norm(squares<1>(tile, (row + lane_id()) % kRows, 0));
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        inverse[n][i] =
            __shfl_sync(0xffffffffu, of_lane[n * 8 / kWarp], n * 8 % kWarp + lane_id() % 4 * 2 + i);
  }
  __device__ __forceinline__ float of(int n, int i) const { return inverse[n][i % 2]; }

  // ds to the weights of the rows. float16 cannot hold those of the shortest; infinity times the
  // zeros among them would be NaN.
  template <typename T>
  __device__ __forceinline__ void weigh(float (&ds)[kTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float w = ds[n][i] * inverse[n][i % 2];
        ds[n][i] = std::is_same_v<T, __half> ? fminf(fmaxf(w, -65504.f), 65504.f) : w;
      }
  }
};

template <typename P>
__device__ __forceinline__ float scale_of(const P& p, const Span& span) {
  if constexpr (decltype(p.term)::kCosine) {
    return cosine_gain(p.term.logit_scale[span.head]);
  } else {
    return p.scale;
  }
}

}  // namespace vitkit::attention
