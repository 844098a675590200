// The gradient of a dense bias, in the bias's own shape. A block owns a tile of the bias and sums
// ds over all that shares it: batches, heads, and queries or keys where the bias has one for all.
// Where there are fewer tiles than a GPU has room for, several blocks share one (chunks) and leave
// partial sums, which the caller adds.
#pragma once

#include <algorithm>

#include "backward.cuh"
#include "partial_sums.cuh"

namespace vitkit::attention {

// How many there are of what a bias has of its own and of what shares it, in tiles along the
// queries and keys.
struct Extent {
  int batch, head, query, key;

  __host__ __device__ int64_t size() const { return int64_t(batch) * head * query * key; }
  // Part `i` of all, key the fastest.
  __device__ __forceinline__ Extent part(int64_t i) const {
    return {int(i / key / query / head), int(i / key / query % head), int(i / key % query),
            int(i % key)};
  }
};

template <typename Map, typename Term>
struct BiasGradientParams {
  BackwardParams<Map, Term> backward;
  float* sums;  // [chunks or chunks * warps, batches, heads, Nq or 1, Nk or 1]: what the bias has
  int batches, heads, queries, keys;  // of the bias
  int chunks;
  Extent own, shared;
};

// Two blocks: the compiler would spill to have three.
template <typename T, int kHeadDim, typename Map, typename Term>
__global__ void __launch_bounds__(128, 2)
    attention_dbias_kernel(const __grid_constant__ BiasGradientParams<Map, Term> p) {
  using M = Mma<T>;
  using Shared = SharedTile<T, kHeadDim>;
  constexpr Tile kTile = kBiasTile<T, kHeadDim>;
  constexpr int kKeys = kTile.others, kTiles = kKeys / 8, kRows = kTile.warps * 16;
  VITKIT_DYNAMIC_SHARED(memory);
  const auto& b = p.backward;
  const Shared q{memory}, grad{memory + Shared::bytes(kRows)};
  const Shared k{memory + Shared::bytes(2 * kRows)}, v{memory + Shared::bytes(2 * kRows + kKeys)};

  const Extent own = p.own.part(blockIdx.x % p.own.size());
  const int64_t chunk = blockIdx.x / p.own.size(), all = p.shared.size();
  const int warp = int(threadIdx.x) / kWarp, group = lane_id() / 4, pair = lane_id() % 4 * 2;
  float sum[kTiles][4] = {};
  for (int64_t i = all * chunk / p.chunks; i < all * (chunk + 1) / p.chunks; ++i) {
    const Extent other = p.shared.part(i);
    // One of the two is 0: a dimension is the bias's own or shared.
    const auto span = b.map.tile(own.batch + other.batch, own.head + other.head,
                                 (own.query + other.query) * kRows);
    const int first_key = (own.key + other.key) * kKeys;
    const auto query_token = [&](int t) { return b.map.query(span, t); };
    const auto key_token = [&](int t) { return b.map.key(span, t); };
    if (b.causal && first_key > span.first + kRows - 1) continue;
    __syncthreads();  // readers of the previous tiles are done
    load_rows(q, queries_of<T>(b.map, b.q, span), span.first, kRows, span.n_q, b.head_dim,
              query_token);
    load_rows(grad, queries_of<T>(b.map, b.grad, span), span.first, kRows, span.n_q, b.head_dim,
              query_token);
    load_rows(k, keys_of<T>(b.map, b.k, span, 1), first_key, kKeys, span.n_k, b.head_dim,
              key_token);
    load_rows(v, keys_of<T>(b.map, b.v, span, 2), first_key, kKeys, span.n_k, b.head_dim,
              key_token);
    ptx::copy_commit();
    ptx::copy_wait<0>();
    __syncthreads();
    const int valid = min(span.n_k - first_key, kKeys), row = span.first + warp * 16 + group;
    if (span.first + warp * 16 >= span.n_q) continue;
    Statistics of_row[2];
    of_row[0].load(b, span, row);
    of_row[1].load(b, span, row + 8);
    RowScale<Term::kCosine> scale{scale_of(b, span)};
    scale.load(q, warp * 16);
    ColumnScale<Term::kCosine, kTiles> of_column;
    of_column.load(k);
    float s[1][kTiles][4] = {}, ds[1][kTiles][4] = {};
    multiply_rows<false>(
        s, [&](int, int d) { return M::load_a(q, warp * 16, d * M::kDepth); }, k, valid);
    multiply_rows<false>(
        ds, [&](int, int d) { return M::load_a(grad, warp * 16, d * M::kDepth); }, v, valid);
    score_gradients<false>(s[0], ds[0], b, span, scale, of_column, row, first_key + pair,
                           [&](int, int e) { return of_row[e / 2]; });
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] += ds[0][n][e];
  }

  // A dimension of one is summed: over the lanes of a column or a row, and warps leave their sums
  // apart.
  const bool sum_queries = p.queries == 1, sum_keys = p.keys == 1;
  if (sum_keys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) total += sum[n][half * 2] + sum[n][half * 2 + 1];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      sum[0][half * 2] = total;
    }
  }
  if (sum_queries) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float total = sum[n][i] + sum[n][i + 2];
#pragma unroll
        for (int lanes = 4; lanes < kWarp; lanes *= 2)
          total += __shfl_xor_sync(0xffffffffu, total, lanes);
        sum[n][i] = total;
      }
  }
  const int64_t copy = sum_queries ? chunk * kTile.warps + warp : chunk;
  float* const plane =
      p.sums + ((copy * p.batches + own.batch) * p.heads + own.head) * p.queries * p.keys;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int query = sum_queries ? (group == 0 && e < 2 ? 0 : 1)
                                    : own.query * kRows + warp * 16 + group + e / 2 * 8;
      const int key = sum_keys ? (pair == 0 && n == 0 && e % 2 == 0 ? 0 : 1)
                               : own.key * kKeys + n * 8 + pair + e % 2;
      if (query < p.queries && key < p.keys) plane[int64_t(query) * p.keys + key] = sum[n][e];
    }
}

// How many partial sums launch_bias_gradient leaves, and how many blocks share a tile.
struct BiasGradientPlan {
  int copies, chunks;
  Extent own, shared;
};

// Of a bias for `scores` that has sizes of 1 where they share it. Extents are numbers of queries
// and keys here, not of tiles.
template <typename T, int kHeadDim>
BiasGradientPlan plan_bias_gradient(const Extent& scores, const Extent& bias) {
  constexpr Tile kTile = kBiasTile<T, kHeadDim>;
  constexpr int kRows = kTile.warps * 16;
  // Enough for any GPU of today; a constant, so that results do not depend on which it is.
  constexpr int64_t kBlocks = 512;
  const int query_tiles = (scores.query + kRows - 1) / kRows;
  const int key_tiles = (scores.key + kTile.others - 1) / kTile.others;
  const bool sum_queries = bias.query == 1, sum_keys = bias.key == 1;
  BiasGradientPlan plan;
  plan.own = {bias.batch, bias.head, sum_queries ? 1 : query_tiles, sum_keys ? 1 : key_tiles};
  plan.shared = {scores.batch / bias.batch, scores.head / bias.head, sum_queries ? query_tiles : 1,
                 sum_keys ? key_tiles : 1};
  plan.chunks = int(
      std::clamp<int64_t>(kBlocks / plan.own.size(), 1, std::min<int64_t>(plan.shared.size(), 32)));
  plan.copies = plan.chunks * (sum_queries ? kTile.warps : 1);
  return plan;
}

template <typename T, int kHeadDim, typename Map, typename Term>
const char* launch_bias_gradient(BiasGradientParams<Map, Term> p, const BiasGradientPlan& plan,
                                 Stream stream) {
  constexpr Tile kTile = kBiasTile<T, kHeadDim>;
  p.own = plan.own;
  p.shared = plan.shared;
  p.chunks = plan.chunks;
  const int64_t blocks = plan.own.size() * plan.chunks;
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  const int shared = SharedTile<T, kHeadDim>::bytes(2 * kTile.warps * 16 + 2 * kTile.others);
  return launch_kernel(&attention_dbias_kernel<T, kHeadDim, Map, Term>, unsigned(blocks),
                       kTile.warps * kWarp, shared, stream, p);
}

}  // namespace vitkit::attention
