// Windows of a map: token map and score term.
//
// A sequence is a window of the shifted grid. Where its tokens lie in the map, which slot of the
// bias table a pair of them has and whether the shift has brought the two together is arithmetic on
// places (y, x): nothing is rolled, padded or partitioned.
#pragma once

#include "cosine.cuh"
#include "divisor.h"
#include "score_term.cuh"
#include "token_map.cuh"

namespace vitkit::attention {

struct WindowSpan : Span {
  int y, x;  // of the window's first place in the shifted grid
  int part;  // of (window, tile) pairs
};

struct WindowMap {
  static constexpr bool kPads = true, kZeros = false, kAdds = false;
  using Span = WindowSpan;

  int batch, heads, height, width;
  int rows, columns;  // of windows
  int window_height;
  Divisor window_width;
  int shift_y, shift_x;
  bool ragged;                 // the window does not divide the map
  bool roll_first;             // and where it does not: roll, then pad
  const void* pads;            // [3, heads, head_dim]; null: zeros
  int64_t pad_part, pad_head;  // strides
  float* dpads;  // gradient of pads, [windows * tiles * warps, heads, 2, head_dim]; null: none

  __host__ __device__ int places() const { return window_height * window_width.value; }
  __host__ __device__ int64_t windows() const { return int64_t(batch) * rows * columns; }
  __host__ __device__ int64_t blocks(int rows_of_block, bool) const {
    return windows() * heads * ((places() + rows_of_block - 1) / rows_of_block);
  }

  // Heads of a window are neighbours: their rows share cache lines.
  __device__ __forceinline__ WindowSpan span(int64_t block, int rows_of_block, bool) const {
    const int tiles = (places() + rows_of_block - 1) / rows_of_block;
    const int tile_of_window = int(block % tiles);
    const int64_t window = block / tiles / heads;
    WindowSpan s = tile(window, block / tiles % heads, tile_of_window * rows_of_block);
    s.part = int(window) * tiles + tile_of_window;
    return s;
  }
  __device__ __forceinline__ WindowSpan tile(int64_t window, int64_t head, int first) const {
    const int64_t row = window / columns;
    return {{row / rows, head, first, places(), places(), 0, 0},
            int(row % rows) * window_height,
            int(window % columns) * window_width.value,
            0};
  }

  // -1 where there is no token.
  __device__ __forceinline__ int64_t query(const WindowSpan& s, int i) const {
    const int iy = window_width.divide(i), ix = i - iy * window_width.value;
    const int y = source(s.y + iy, height, rows * window_height, shift_y);
    const int x = source(s.x + ix, width, columns * window_width.value, shift_x);
    return (y | x) < 0 ? -1 : int64_t(y) * width + x;
  }
  __device__ __forceinline__ int64_t key(const WindowSpan& s, int i) const { return query(s, i); }
  __device__ __forceinline__ int64_t result(const WindowSpan& s, int i) const {
    return query(s, i);
  }
  // Statistics are [B, H, W, heads].
  __device__ __forceinline__ int64_t statistic(const WindowSpan& s, int i) const {
    const int64_t token = query(s, i);
    return token < 0 ? -1 : token * heads;
  }
  __device__ __forceinline__ int held(const WindowSpan& s) const { return s.n_q; }

  template <typename T>
  __device__ __forceinline__ const T* pad(const WindowSpan& s, int part) const {
    return pads ? static_cast<const T*>(pads) + part * pad_part + s.head * pad_head : nullptr;
  }

  // Sums the gradients d of a warp's keys, from `row` of the lane on, over those that are pads.
  template <int kTiles>
  __device__ __forceinline__ void store_pad_gradient(const WindowSpan& s, int part,
                                                     const float (&d)[kTiles][4], int row,
                                                     int column, int head_dim) const {
    if (dpads == nullptr) return;
    const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
    const bool low = row < s.n_k && key(s, row) < 0, high = row + 8 < s.n_k && key(s, row + 8) < 0;
    const int64_t copy = int64_t(s.part) * warps + warp;
    float* const to = dpads + ((copy * heads + s.head) * 2 + part) * head_dim;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = (low ? d[n][i] : 0.f) + (high ? d[n][i + 2] : 0.f);
#pragma unroll
        for (int lanes = 4; lanes < kWarp; lanes *= 2)
          sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        const int at = column + n * 8 + lane_id() % 4 * 2 + i;
        if (lane_id() < 4 && at < head_dim) to[at] = sum;
      }
  }

 private:
  // Token at a place of the shifted grid along one axis, -1 at a pad.
  __device__ __forceinline__ int source(int place, int size, int places, int shift) const {
    const int from = place + shift;
    if (!ragged) return from < size ? from : from - size;
    if (roll_first) return place < size ? from % size : -1;
    const int rolled = from < places ? from : from - places;
    return rolled < size ? rolled : -1;
  }
};

// Relative position bias, the mask of the shift, and for Swin V2 cosine attention.
template <bool kSwinV2>
struct WindowTerm {
  static constexpr bool kActive = true, kCosine = kSwinV2;
  static constexpr float kMask = -100.f;  // additive, as every published checkpoint was trained
  using Sink = NoSink;

  const float* table;  // [heads, (2 wh - 1) (2 ww - 1)]; null: zeros
  int window_height;
  Divisor window_width;
  // First row and column of the shifted grid that the shift has brought there; beyond the grid if
  // there is none.
  int limit_y, limit_x;
  const float* logit_scale;  // [heads], of Swin V2
  float* dlogit_scale;       // [windows * tiles * warps, heads]
  int heads;

  template <bool kTransposed, int kTiles>
  __device__ __forceinline__ void add(float (&s)[kTiles][4], const WindowSpan& span, int row,
                                      int column) const {
    const bool apart = span.y + window_height > limit_y || span.x + window_width.value > limit_x;
    if (table == nullptr && !apart) return;
    const int line = 2 * window_width.value - 1;
    const int last = (window_height - 1) * line + window_width.value - 1;
    const float* const slots = table ? table + span.head * (2 * last + 1) : nullptr;
    const Place rows[2] = {place(span, row, line), place(span, row + 8, line)};
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Place other = place(span, column + n * 8 + i, line);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int distance = rows[half].slot - other.slot;
          const float bias = slots ? slots[last + (kTransposed ? -distance : distance)] : 0.f;
          const float mask = apart && rows[half].region != other.region ? kMask : 0.f;
          s[n][half * 2 + i] += (bias + mask) * kLog2e;
        }
      }
  }

  // along: of a lane's two rows, the same in its quad. Pads and rows beyond the end have none.
  __device__ __forceinline__ void store_gain_gradient(const WindowSpan& span,
                                                      const float (&along)[2]) const {
    const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
    const float sum = warp_sum(lane_id() % 4 == 0 ? along[0] + along[1] : 0.f);
    const bool constant = logit_scale[span.head] > kMaxLogitScale;
    const int64_t copy = int64_t(span.part) * warps + warp;
    if (lane_id() == 0) dlogit_scale[copy * heads + span.head] = constant ? 0.f : sum;
  }

 private:
  // Slots of pairs are differences of those of places.
  struct Place {
    int slot, region;
  };
  __device__ __forceinline__ Place place(const WindowSpan& span, int i, int line) const {
    i = min(i, span.n_k - 1);
    const int iy = window_width.divide(i), ix = i - iy * window_width.value;
    return {iy * line + ix, (span.y + iy >= limit_y) * 2 + (span.x + ix >= limit_x)};
  }
};

}  // namespace vitkit::attention
