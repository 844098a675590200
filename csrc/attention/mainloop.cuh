// What every attention kernel does with tiles: loads rows, multiplies, stores.
#pragma once

#include "mma.cuh"
#include "score_term.cuh"
#include "token_map.cuh"

namespace vitkit::attention {

// A tensor of rows: [batch, token, head, column] by strides in elements, columns dense. Rows begin
// at multiples of 16 bytes.
struct Rows {
  void* data;
  int64_t batch, token, head;

  template <typename T>
  __device__ __forceinline__ T* plane(const Span& s) const {
    return static_cast<T*>(data) + s.batch * batch + s.head * head;
  }
};

// Where the rows of one head lie, and if kPads what stands for tokens below 0; null: zeros.
template <typename T, bool kPads>
struct Source {
  const T* plane;
  int64_t stride;
  const T* pad = nullptr;
};

template <typename T, typename Map>
__device__ __forceinline__ Source<T, Map::kPads> queries_of(const Map&, const Rows& rows,
                                                            const Span& span) {
  return {rows.plane<const T>(span), rows.token};
}
// part: 1 for k, 2 for v.
template <typename T, typename Map>
__device__ __forceinline__ Source<T, Map::kPads> keys_of(const Map& map, const Rows& rows,
                                                         const typename Map::Span& span, int part) {
  Source<T, Map::kPads> source{rows.plane<const T>(span), rows.token};
  if constexpr (Map::kPads) source.pad = map.template pad<T>(span, part);
  return source;
}

// Starts the copy of rows [first, first + rows) of `n` into a tile, zeros beyond n and head_dim.
// `token` maps a row to its token.
template <typename T, bool kPads, int kColumns, typename Token>
__device__ __forceinline__ void load_rows(const SharedTile<T, kColumns>& tile,
                                          const Source<T, kPads>& source, int first, int rows,
                                          int n, int head_dim, Token&& token) {
  using Tile = SharedTile<T, kColumns>;
#pragma unroll 2
  for (int i = int(threadIdx.x); i < rows * Tile::kChunks; i += int(blockDim.x)) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    bool exists = first + row < n && chunk * Tile::kChunk < head_dim;
    const T* from = source.plane;
    if (exists) {
      const int64_t at = token(first + row);
      if (!kPads || at >= 0) {
        from += at * source.stride + chunk * Tile::kChunk;
      } else if (source.pad) {
        from = source.pad + chunk * Tile::kChunk;
      } else {
        exists = false;
      }
    }
    ptx::copy_async(tile.address(row, chunk), from, exists);
  }
}

// d[r] += rows [row + 16 r, ...) of `a` times the rows of `b`, transposed, over all columns. Only
// the first `valid` rows of b, in units of 16, unless kWhole. `held`: the rows of a, if they are
// kept.
template <bool kWhole, typename T, int kColumns, int kRowTiles, int kTiles, typename LoadA>
__device__ __forceinline__ void multiply_rows(float (&d)[kRowTiles][kTiles][4], LoadA&& load_a,
                                              const SharedTile<T, kColumns>& b, int valid) {
  using M = Mma<T>;
  constexpr int kSteps = kColumns / M::kDepth;
  // Of rows of a KiB all loads in flight would not leave registers for the accumulators.
  constexpr int kUnroll = kSteps > 16 ? 8 : kSteps;
#pragma unroll kUnroll
  for (int k = 0; k < kSteps; ++k) {
    typename M::A a[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) a[r] = load_a(r, k);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      if (!kWhole && n * 8 >= valid) break;
      const typename M::B f = M::load_rows(b, n * 8, k * M::kDepth);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) M::multiply(&d[r][n], a[r], f);
    }
  }
}

// d[r] += w[r] b: w has a column for each of the first `valid` rows of b. kFirst: the first of the
// columns of b that d holds.
template <bool kWhole, typename T, int kColumns, int kRowTiles, int kTiles, int kOut>
__device__ __forceinline__ void multiply_columns(float (&d)[kRowTiles][kOut][4],
                                                 const float (&w)[kRowTiles][kTiles][4],
                                                 const SharedTile<T, kColumns>& b, int first,
                                                 int valid) {
  using M = Mma<T>;
#pragma unroll
  for (int k = 0; k < kTiles * 8 / M::kDepth; ++k) {
    if (!kWhole && k * M::kDepth >= valid) break;
    typename M::A a[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) a[r] = M::from_accumulators(&w[r][k * M::kDepth / 8]);
#pragma unroll
    for (int n = 0; n < kOut; n += 2) {
      const typename M::B f = M::load_columns(b, k * M::kDepth, first + n * 8);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) M::multiply(&d[r][n], a[r], f);
    }
  }
}

// Writes a warp's accumulators to rows [first, ...) below `n`, by way of its own rows of a tile, in
// 16-byte stores. Columns of the accumulators begin at `column`. Rows whose token is below 0 are
// not stored. Behind a barrier that follows every copy to the tile and every read of another lane's
// elements.
template <typename T, int kColumns, int kRowTiles, int kTiles, typename Token>
__device__ __forceinline__ void store_rows(const float (&d)[kRowTiles][kTiles][4],
                                           const SharedTile<T, kColumns>& tile, int tile_row,
                                           T* plane, int64_t stride, int first, int n, int column,
                                           int head_dim, Token&& token) {
  const int lane = lane_id(), group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pack<T, 2> out;
        out.set(0, d[r][t][half * 2]);
        out.set(1, d[r][t][half * 2 + 1]);
        out.store(tile.at(tile_row + r * 16 + half * 8 + group, t * 8 + pair));
      }
  __syncwarp();
  constexpr int kChunk = 16 / sizeof(T), kChunks = kTiles * 8 / kChunk;
  for (int i = lane; i < kRowTiles * 16 * kChunks; i += kWarp) {
    const int row = i / kChunks, at = column + i % kChunks * kChunk;
    if (first + row >= n || at >= head_dim) continue;
    if (const int64_t to = token(first + row); to >= 0)
      Pack<T, kChunk>::load(tile.chunk(tile_row + row, i % kChunks))
          .store(plane + to * stride + at);
  }
}

// Adds a row tile of a warp to float32 rows [first, ...) below `n`, or writes it unless `add`. A
// quad of lanes fills a sector of 32 bytes.
template <int kTiles, typename Token>
__device__ __forceinline__ void add_rows(const float (&d)[kTiles][4], float* plane, int64_t stride,
                                         bool add, int first, int n, int column, int head_dim,
                                         Token&& token) {
  const int row = first + lane_id() / 4, at = column + lane_id() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 >= n) return;
    float* const to = plane + token(row + half * 8) * stride + at;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (at + t * 8 >= head_dim) break;
      Pack<float, 2> sum{{d[t][half * 2], d[t][half * 2 + 1]}};
      if (add) {
        const auto held = Pack<float, 2>::load(to + t * 8);
        sum.element[0] += held.element[0];
        sum.element[1] += held.element[1];
      }
      sum.store(to + t * 8);
    }
  }
}

}  // namespace vitkit::attention
