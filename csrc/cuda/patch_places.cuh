// Device code of packed calls: their tokens from places, and the gradient of positions that any
// number of tokens share.
//
// Places lie on the device and may hold anything: what is read here is checked once, and no kernel
// behind it leaves the tensors. Each tile of kTokensOfUnit tokens agrees on the largest unit of its
// patches, and sorts its tokens by position: the sum over a position then finds its tokens in every
// tile, in order, and nothing is atomic.
#pragma once

#include <limits.h>

#include "patch_gather.cuh"
#include "place_columns.h"

namespace vitkit::patch_embed {

// One image of as many patches; where they lie, each of them says.
inline Geometry packed_geometry(int tokens, int channels, int patch_rows, int patch_columns) {
  Geometry g{};
  g.column = g.frames = g.patch_frames = g.grid_rows = g.grid_columns = 1;
  g.rows = g.patch_rows = patch_rows;
  g.columns = g.patch_columns = patch_columns;
  g.channels = channels;
  g.patches = g.tokens = tokens;
  return g;
}

struct Slot {
  int position, token;
};

struct PlacesParams {
  const int64_t* places;  // [tokens, kPlaceColumns]
  Geometry g;
  int64_t pixels;     // that there are
  int position_rows;  // 0: no positions
  Token* tokens;      // [tokens]
  int* units;         // [tiles], elements
  int* positions;     // [tokens], -1 where the place is broken
  Slot* by_position;  // [tokens], each tile of them by position; null: not wanted
};

// A patch of which nothing lies inside an image needs no pixels. Sums cannot overflow: there are at
// most 2^40 pixels, and 2^16 channels and rows.
__device__ __forceinline__ Token token_at(const PlacesParams& p, const int64_t* at, bool& broken) {
  const auto within = [](int64_t v, int64_t most) { return v >= 0 && v <= most; };
  const int64_t rows = max(min(at[kRows], int64_t(p.g.patch_rows)), int64_t(0));
  const int64_t columns = max(min(at[kColumns], int64_t(p.g.patch_columns)), int64_t(0));
  Token t{};
  if (rows == 0 || columns == 0) return t;
  t.origin = at[kOrigin];
  t.channel = p.g.channels > 1 ? at[kChannelStride] : 0;
  t.row = rows > 1 ? at[kRowStride] : 0;
  broken = !within(t.origin, p.pixels) || !within(t.channel, p.pixels) ||
           !within(t.row, p.pixels) ||
           t.origin + (p.g.channels - 1) * t.channel + (rows - 1) * t.row + columns > p.pixels;
  t.frames = 1;
  t.rows = uint16_t(rows);
  t.columns = uint16_t(columns);
  return t;
}

// One block: a tile of tokens.
static __global__ void __launch_bounds__(kTokensOfUnit)
    patch_places_kernel(const __grid_constant__ PlacesParams p) {
  __shared__ int units[kTokensOfUnit / kWarp], positions[kTokensOfUnit];
  const int i = int(threadIdx.x), m = int(blockIdx.x) * kTokensOfUnit + i;
  int unit = 16, position = INT_MAX;  // behind all others
  if (m < p.g.tokens) {
    const int64_t* const at = p.places + int64_t(m) * kPlaceColumns;
    bool broken = false;
    Token t = token_at(p, at, broken);
    if (p.position_rows > 0) broken |= at[kPositionRow] < 0 || at[kPositionRow] >= p.position_rows;
    if (broken) t = {};
    position = broken ? -1 : p.position_rows > 0 ? int(at[kPositionRow]) : 0;
    p.tokens[m] = t;
    p.positions[m] = position;
    const int all = int((t.origin | t.channel | t.row | t.columns) & 15) | 16;
    unit = all & -all;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    unit = min(unit, __shfl_xor_sync(0xffffffffu, unit, offset));
  if (lane_id() == 0) units[i / kWarp] = unit;
  positions[i] = position;
  __syncthreads();
  if (i == 0) {
    for (const int of_warp : units) unit = min(unit, of_warp);
    p.units[blockIdx.x] = unit;
  }
  if (p.by_position == nullptr || m >= p.g.tokens) return;
  int before = 0;
#pragma unroll 8
  for (int j = 0; j < kTokensOfUnit; ++j)
    before += positions[j] < position || (positions[j] == position && j < i);
  p.by_position[int64_t(blockIdx.x) * kTokensOfUnit + before] = {position, m};
}

// ---- the gradient of positions ----

constexpr int kPositionThreads = 256, kPositionPack = 4;

struct PositionSumParams {
  const void* grad;         // [tokens, embed]
  const Slot* by_position;  // [tokens]
  int tokens, embed;
  bool packs;  // kPositionPack elements of a token are one access
  SmallGradient to;

  __host__ __device__ int column_blocks() const {
    return (embed + kPositionThreads * kPositionPack - 1) / (kPositionThreads * kPositionPack);
  }
};

// The first of slots [begin, end) at `position` or behind it.
__device__ __forceinline__ int lower_bound(const Slot* slots, int begin, int end, int position) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (slots[middle].position < position)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The sum over the threads before this one, and over all.
__device__ __forceinline__ int sum_before(int count, int& all) {
  __shared__ int of_warp[kPositionThreads / kWarp];
  int sum = count;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_sync(0xffffffffu, sum, max(lane_id() - distance, 0));
    if (lane_id() >= distance) sum += other;
  }
  __syncthreads();  // readers of the previous call are done
  if (lane_id() == kWarp - 1) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  all = 0;
#pragma unroll
  for (int w = 0; w < kPositionThreads / kWarp; ++w) {
    if (w < int(threadIdx.x) / kWarp) sum += of_warp[w];
    all += of_warp[w];
  }
  return sum - count;
}

// One block: a row of positions and 1024 columns. A thread looks for the row in a tile, and lists
// its tokens; all add them.
template <typename T>
__global__ void __launch_bounds__(kPositionThreads, 4)
    patch_position_sum_kernel(const __grid_constant__ PositionSumParams p) {
  constexpr int kPack = kPositionPack, kThreads = kPositionThreads;
  __shared__ int list[kThreads];
  const int row = int(blockIdx.x) / p.column_blocks(), i = int(threadIdx.x);
  const int column = (int(blockIdx.x) % p.column_blocks() * kThreads + i) * kPack;
  const int tiles = (p.tokens + kTokensOfUnit - 1) / kTokensOfUnit;
  const T* const grad = static_cast<const T*>(p.grad) + column;
  const int columns = min(p.embed - column, kPack);
  float sum[kPack] = {};
  for (int first = 0; first < tiles; first += kThreads) {
    const int tile = (first + i) * kTokensOfUnit;
    const int end = min(tile + kTokensOfUnit, p.tokens);
    const int begin = lower_bound(p.by_position, tile, end, row);
    const int count = max(lower_bound(p.by_position, begin, end, row + 1) - begin, 0);
    int all;
    const int before = sum_before(count, all);
    for (int listed = 0; listed < all; listed += kThreads) {
      for (int k = max(listed - before, 0); k < min(count, listed + kThreads - before); ++k)
        list[before + k - listed] = p.by_position[begin + k].token;
      __syncthreads();
      const int tokens = min(all - listed, kThreads);
      if (p.packs && columns > 0) {
#pragma unroll 4
        for (int k = 0; k < tokens; ++k) {
          const auto v = Pack<T, kPack>::load(grad + int64_t(list[k]) * p.embed);
#pragma unroll
          for (int c = 0; c < kPack; ++c) sum[c] += v.get(c);
        }
      } else {
        for (int k = 0; k < tokens; ++k)
#pragma unroll
          for (int c = 0; c < kPack; ++c)
            if (c < columns) sum[c] += to_float(grad[int64_t(list[k]) * p.embed + c]);
      }
      __syncthreads();
    }
  }
  const int64_t at = int64_t(row) * p.embed + column;
  if (p.packs && columns > 0) return p.to.store(at, sum);
#pragma unroll
  for (int c = 0; c < kPack; ++c)
    if (c < columns) p.to.store(at + c, sum[c]);
}

}  // namespace vitkit::patch_embed
