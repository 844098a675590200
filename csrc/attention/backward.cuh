// Attention backward. Weights are computed again from lse; ds = p (dp - delta), with dp = grad v^T
// and delta = sum_d grad * out - grad_lse. One kernel owns queries and sums dq over keys, one owns
// keys and sums dk and dv over queries: seven products where five would do, but no atomics and no
// buffer of partial sums, so that results are the same on every run.
#pragma once

#include "cosine.cuh"
#include "launch_kernel.cuh"
#include "mainloop.cuh"
#include "tiles.h"

namespace vitkit::attention {

struct BackwardTensors {
  Rows q, k, v, out, grad;
  Rows dq, dk, dv;        // float32 where the map says kAdds
  const float* lse;       // [batch, head, statistic]
  const float* grad_lse;  // by strides; null: none
  float* delta;           // laid out as lse
  int64_t lse_batch, lse_head;
  int64_t grad_lse_batch, grad_lse_head, grad_lse_token;
  int head_dim;
  bool causal;
  float scale;  // of the scores, times log2(e)
};

template <typename Map, typename Term>
struct BackwardParams : BackwardTensors {
  Map map;
  Term term;
};

// A row a warp.
template <typename T, typename Map, typename Term>
__global__ void __launch_bounds__(128)
    attention_delta_kernel(const __grid_constant__ BackwardParams<Map, Term> p) {
  const int warps = int(blockDim.x) / kWarp;
  const auto span = p.map.span(blockIdx.x, 32, false);
  const int end = min(span.first + 32, span.n_q);
  for (int i = span.first + int(threadIdx.x) / kWarp; i < end; i += warps) {
    const int64_t token = p.map.result(span, i);
    if (Map::kPads && token < 0) continue;
    const T* const grad = p.grad.template plane<const T>(span) + token * p.grad.token;
    const T* const out = p.out.template plane<const T>(span) + token * p.out.token;
    float sum = 0.f;
    for (int c = lane_id() * 8; c < p.head_dim; c += kWarp * 8) {
#pragma unroll
      for (int part = 0; part < 8; part += kFullPack<T>) {
        const auto g = Pack<T, kFullPack<T>>::load(grad + c + part);
        const auto o = Pack<T, kFullPack<T>>::load(out + c + part);
#pragma unroll
        for (int j = 0; j < kFullPack<T>; ++j) sum += g.get(j) * o.get(j);
      }
    }
    sum = warp_sum(sum);
    if (p.grad_lse)
      sum -= p.grad_lse[span.batch * p.grad_lse_batch + span.head * p.grad_lse_head +
                        token * p.grad_lse_token];
    if (lane_id() == 0)
      p.delta[span.batch * p.lse_batch + span.head * p.lse_head + p.map.statistic(span, i)] = sum;
  }
}

// lse (in log2) and delta of a query: where it attends nothing or does not exist, those by which
// every weight and every ds is 0.
struct Statistics {
  float lse = INFINITY, delta = 0.f;

  template <typename P, typename Span>
  __device__ __forceinline__ void load(const P& p, const Span& span, int query) {
    if (query >= span.n_q) return;
    const int64_t token = p.map.statistic(span, query);
    if (decltype(p.map)::kPads && token < 0) return;
    const int64_t at = span.batch * p.lse_batch + span.head * p.lse_head + token;
    const float value = p.lse[at];
    if (value == -INFINITY) return;
    lse = value * kLog2e;
    delta = p.delta[at];
  }
};

// Scores to weights p, dp to ds, for a row tile of a warp. `row` and `column` are those of the
// lane's first element; `of` gives the statistics of element (n, i).
template <bool kTransposed, bool kCosine, int kTiles, typename P, typename Span, typename Of>
__device__ __forceinline__ void score_gradients(float (&s)[kTiles][4], float (&dp)[kTiles][4],
                                                const P& p, const Span& span,
                                                const RowScale<kCosine>& of_row,
                                                const ColumnScale<kCosine, kTiles>& of_column,
                                                int row, int column, Of&& of) {
  constexpr bool kActive = decltype(p.term)::kActive;
  if constexpr (kActive) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= of_row.of(i / 2) * of_column.of(n, i);
    p.term.template add<kTransposed>(s, span, row, column);
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + i / 2 * 8, c = column + n * 8 + i % 2;
      const int query = kTransposed ? c : r, key = kTransposed ? r : c;
      const Statistics statistics = of(n, i);
      float x = s[n][i] * (kActive ? 1.f : p.scale) - statistics.lse;
      // At most 0 but for rounding, which is without bounds where a term of -1e38 is part of lse.
      if (kActive && x > 0.f) x = 0.f;
      const bool attends = key < span.n_k && !(p.causal && key > query);
      s[n][i] = attends ? ptx::exp2_approx(x) : 0.f;
      dp[n][i] = s[n][i] * (dp[n][i] - statistics.delta);
    }
}

// Columns of dq, or of dk and dv, that a block sums: with the scores, their accumulators are most
// of its registers. Wider rows take several blocks, which compute the same weights.
template <typename T, int kHeadDim>
constexpr int kQueryColumns = sizeof(T) == 4 && kHeadDim > 128 ? 64 : kHeadDim;
template <typename T, int kHeadDim>
constexpr int kKeyColumns = sizeof(T) == 4 ? (kHeadDim <= 64       ? kHeadDim
                                              : kHeadDim % 64 == 0 ? 64
                                                                   : 48)
                                           : (kHeadDim <= 128 ? kHeadDim : kHeadDim / 2);

template <typename T, int kHeadDim, typename Map, typename Term>
__global__ void __launch_bounds__(128, 2)
    attention_bwd_dq_kernel(const __grid_constant__ BackwardParams<Map, Term> p) {
  using M = Mma<T>;
  using Shared = SharedTile<T, kHeadDim>;
  constexpr Tile kTile = kBackwardTile<T, kHeadDim, Term::kCosine>;
  constexpr int kKeys = kTile.others, kStages = kTile.stages, kTiles = kKeys / 8;
  constexpr int kColumns = kQueryColumns<T, kHeadDim>, kSlices = kHeadDim / kColumns;
  VITKIT_DYNAMIC_SHARED(memory);

  const int rows = int(blockDim.x) / kWarp * 16;
  const auto span = p.map.span(blockIdx.x / kSlices, rows, false);
  const int column = int(blockIdx.x % kSlices) * kColumns;
  if (span.first >= span.n_q || column >= p.head_dim) return;
  const Shared q{memory}, grad{memory + Shared::bytes(rows)};
  const auto keys = [&](int stage) {
    return Shared{memory + Shared::bytes(2 * rows + 2 * stage * kKeys)};
  };
  const auto values = [&](int stage) {
    return Shared{memory + Shared::bytes(2 * rows + (2 * stage + 1) * kKeys)};
  };
  const auto query_token = [&](int i) { return p.map.query(span, i); };
  const auto key_token = [&](int i) { return p.map.key(span, i); };
  const auto result_token = [&](int i) { return p.map.result(span, i); };
  const auto k_source = keys_of<T>(p.map, p.k, span, 1), v_source = keys_of<T>(p.map, p.v, span, 2);
  const int n_k = p.causal ? min(span.n_k, span.first + rows) : span.n_k;
  const int steps = (n_k + kKeys - 1) / kKeys;
  const auto load_step = [&](int step) {
    if (step < steps) {
      const int first = step * kKeys, stage = step % kStages;
      load_rows(keys(stage), k_source, first, kKeys, n_k, p.head_dim, key_token);
      load_rows(values(stage), v_source, first, kKeys, n_k, p.head_dim, key_token);
    }
    ptx::copy_commit();
  };
  load_rows(q, queries_of<T>(p.map, p.q, span), span.first, rows, p.map.held(span), p.head_dim,
            query_token);
  load_rows(grad, queries_of<T>(p.map, p.grad, span), span.first, rows, span.n_q, p.head_dim,
            result_token);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load_step(step);

  const int warp_row = int(threadIdx.x) / kWarp * 16, first_row = span.first + warp_row;
  const int row = first_row + lane_id() / 4, pair = lane_id() % 4 * 2;
  const int end = first_row >= span.n_q ? 0 : p.causal ? min(n_k, first_row + 16) : n_k;
  Statistics of_row[2];
  of_row[0].load(p, span, row);
  of_row[1].load(p, span, row + 8);
  float dq[1][kColumns / 8][4] = {};
  RowScale<Term::kCosine> scale{scale_of(p, span)};
  typename Term::Sink sink(p.term, span, memory + Shared::bytes(2 * rows + 2 * kStages * kKeys),
                           blockIdx.x / kSlices, column == 0);

  for (int step = 0; step < steps; ++step) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    load_step(step + kStages - 1);
    const int first = step * kKeys, valid = min(end - first, kKeys), stage = step % kStages;
    if (step == 0) scale.load(q, warp_row);
    if (valid <= 0) continue;
    ColumnScale<Term::kCosine, kTiles> of_column;
    of_column.load(keys(stage));
    float s[1][kTiles][4] = {}, dp[1][kTiles][4] = {};
    multiply_rows<false>(
        s, [&](int, int k) { return M::load_a(q, warp_row, k * M::kDepth); }, keys(stage), valid);
    multiply_rows<false>(
        dp, [&](int, int k) { return M::load_a(grad, warp_row, k * M::kDepth); }, values(stage),
        valid);
    score_gradients<false>(s[0], dp[0], p, span, scale, of_column, row, first + pair,
                           [&](int, int i) { return of_row[i / 2]; });
    sink.add(dp[0], span, row, first + pair);
    of_column.template weigh<T>(dp[0]);
    multiply_columns<false>(dq, dp, keys(stage), column, valid);
  }

  ptx::copy_wait<0>();
  __syncthreads();
  scale.differentiate(dq[0], q, warp_row);
  if constexpr (Term::kCosine) p.term.store_gain_gradient(span, scale.along);
  if constexpr (Map::kAdds) {
    add_rows(dq[0], p.dq.template plane<float>(span), p.dq.token, p.map.adds, first_row,
             p.map.held(span), column, p.head_dim, query_token);
  } else {
    store_rows(dq, q, warp_row, p.dq.template plane<T>(span), p.dq.token, first_row, span.n_q,
               column, p.head_dim, query_token);
  }
  sink.finish(span);
}

// Rows are keys here: scores are those of the transposed tile.
template <typename T, int kHeadDim, typename Map, typename Term>
__global__ void __launch_bounds__(128, 2)
    attention_bwd_dkv_kernel(const __grid_constant__ BackwardParams<Map, Term> p) {
  using M = Mma<T>;
  using Shared = SharedTile<T, kHeadDim>;
  constexpr Tile kTile = kBackwardTile<T, kHeadDim, Term::kCosine>;
  constexpr int kQueries = kTile.others, kStages = kTile.stages, kTiles = kQueries / 8;
  constexpr int kColumns = kKeyColumns<T, kHeadDim>, kSlices = kHeadDim / kColumns;
  static_assert(kSlices * kColumns == kHeadDim);
  VITKIT_DYNAMIC_SHARED(memory);

  const int rows = int(blockDim.x) / kWarp * 16;
  const auto span = p.map.span(blockIdx.x / kSlices, rows, true);
  const int column = int(blockIdx.x % kSlices) * kColumns;
  if (span.first >= span.n_k || column >= p.head_dim) return;
  const Shared k{memory}, v{memory + Shared::bytes(rows)};
  const auto queries = [&](int stage) {
    return Shared{memory + Shared::bytes(2 * rows + 2 * stage * kQueries)};
  };
  const auto grads = [&](int stage) {
    return Shared{memory + Shared::bytes(2 * rows + (2 * stage + 1) * kQueries)};
  };
  const auto query_token = [&](int i) { return p.map.query(span, i); };
  const auto key_token = [&](int i) { return p.map.key(span, i); };
  const auto result_token = [&](int i) { return p.map.result(span, i); };
  const auto q_source = queries_of<T>(p.map, p.q, span);
  const auto grad_source = queries_of<T>(p.map, p.grad, span);
  const int begin = p.causal ? span.first / kQueries : 0;
  const int steps = (span.n_q + kQueries - 1) / kQueries;
  const auto load_step = [&](int step) {
    if (step < steps) {
      const int first = step * kQueries, stage = step % kStages;
      load_rows(queries(stage), q_source, first, kQueries, p.map.held(span), p.head_dim,
                query_token);
      load_rows(grads(stage), grad_source, first, kQueries, span.n_q, p.head_dim, result_token);
    }
    ptx::copy_commit();
  };
  load_rows(k, keys_of<T>(p.map, p.k, span, 1), span.first, rows, span.n_k, p.head_dim, key_token);
  load_rows(v, keys_of<T>(p.map, p.v, span, 2), span.first, rows, span.n_k, p.head_dim, key_token);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load_step(begin + step);

  const int warp_row = int(threadIdx.x) / kWarp * 16, first_row = span.first + warp_row;
  const int row = first_row + lane_id() / 4, pair = lane_id() % 4 * 2;
  const bool idle = first_row >= span.n_k;
  float dk[1][kColumns / 8][4] = {}, dv[1][kColumns / 8][4] = {};
  RowScale<Term::kCosine> scale{scale_of(p, span)};

  for (int step = begin; step < steps; ++step) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    load_step(step + kStages - 1);
    const int first = step * kQueries, valid = min(span.n_q - first, kQueries);
    const int stage = step % kStages;
    if (step == begin) scale.load(k, warp_row);
    if (idle || (p.causal && first + kQueries <= first_row)) continue;
    Statistics of_column[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) of_column[n][i].load(p, span, first + n * 8 + pair + i);
    ColumnScale<Term::kCosine, kTiles> of_queries;
    of_queries.load(queries(stage));
    float s[1][kTiles][4] = {}, dp[1][kTiles][4] = {};
    multiply_rows<false>(
        s, [&](int, int d) { return M::load_a(k, warp_row, d * M::kDepth); }, queries(stage),
        valid);
    multiply_rows<false>(
        dp, [&](int, int d) { return M::load_a(v, warp_row, d * M::kDepth); }, grads(stage), valid);
    score_gradients<true>(s[0], dp[0], p, span, scale, of_queries, row, first + pair,
                          [&](int n, int i) { return of_column[n][i % 2]; });
    multiply_columns<false>(dv, s, grads(stage), column, valid);
    of_queries.template weigh<T>(dp[0]);
    multiply_columns<false>(dk, dp, queries(stage), column, valid);
  }

  ptx::copy_wait<0>();
  __syncthreads();
  scale.differentiate(dk[0], k, warp_row);
  if constexpr (Map::kAdds) {
    add_rows(dk[0], p.dk.template plane<float>(span), p.dk.token, p.map.adds, first_row, span.n_k,
             column, p.head_dim, key_token);
    add_rows(dv[0], p.dv.template plane<float>(span), p.dv.token, p.map.adds, first_row, span.n_k,
             column, p.head_dim, key_token);
  } else {
    store_rows(dk, k, warp_row, p.dk.template plane<T>(span), p.dk.token, first_row, span.n_k,
               column, p.head_dim, key_token);
    store_rows(dv, v, warp_row, p.dv.template plane<T>(span), p.dv.token, first_row, span.n_k,
               column, p.head_dim, key_token);
  }
  if constexpr (Map::kPads) {
    p.map.store_pad_gradient(span, 0, dk[0], row, column, p.head_dim);
    p.map.store_pad_gradient(span, 1, dv[0], row, column, p.head_dim);
  }
}

// Of the kernels of dq and of dk and dv, with `warps` warps.
template <typename T, int kHeadDim, typename Term>
int backward_shared_bytes(int warps) {
  constexpr Tile kTile = kBackwardTile<T, kHeadDim, Term::kCosine>;
  static_assert(kTile.stages >= 2 && kTile.warps * kWarp <= 128);
  return SharedTile<T, kHeadDim>::bytes(2 * 16 * warps + 2 * kTile.stages * kTile.others);
}

template <typename T, int kHeadDim, typename Term>
int dq_shared_bytes(const Term& term, int warps) {
  return backward_shared_bytes<T, kHeadDim, Term>(warps) +
         Term::Sink::shared_bytes(term, warps, kBackwardTile<T, kHeadDim, Term::kCosine>.others);
}

// `rows`: queries, or keys, of the longest sequence, as far as is known.
template <typename T, int kHeadDim, typename Term>
int dq_warps(const Term& term, int rows) {
  int warps = warps_for(rows, 16, kBackwardTile<T, kHeadDim, Term::kCosine>.warps);
  while (warps > 1 && dq_shared_bytes<T, kHeadDim>(term, warps) > kMaxShared) --warps;
  return warps;
}
template <typename T, int kHeadDim, typename Term>
int dkv_warps(int rows) {
  return warps_for(rows, 16, kBackwardTile<T, kHeadDim, Term::kCosine>.warps);
}

template <typename T, int kHeadDim, typename Map, typename Term>
const char* launch_delta(const BackwardParams<Map, Term>& p, Stream stream) {
  const int64_t blocks = p.map.blocks(32, false);
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  if (blocks == 0) return nullptr;
  return launch_kernel(&attention_delta_kernel<T, Map, Term>, unsigned(blocks), 128, 0, stream, p);
}

template <typename T, int kHeadDim, typename Map, typename Term>
const char* launch_dq(const BackwardParams<Map, Term>& p, int rows, Stream stream) {
  const int warps = dq_warps<T, kHeadDim>(p.term, rows);
  const int64_t blocks = p.map.blocks(16 * warps, false) * (kHeadDim / kQueryColumns<T, kHeadDim>);
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  if (blocks == 0) return nullptr;
  return launch_kernel(&attention_bwd_dq_kernel<T, kHeadDim, Map, Term>, unsigned(blocks),
                       warps * kWarp, dq_shared_bytes<T, kHeadDim>(p.term, warps), stream, p);
}

template <typename T, int kHeadDim, typename Map, typename Term>
const char* launch_dkv(const BackwardParams<Map, Term>& p, int rows, Stream stream) {
  const int warps = dkv_warps<T, kHeadDim, Term>(rows);
  const int64_t blocks = p.map.blocks(16 * warps, true) * (kHeadDim / kKeyColumns<T, kHeadDim>);
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  if (blocks == 0) return nullptr;
  return launch_kernel(&attention_bwd_dkv_kernel<T, kHeadDim, Map, Term>, unsigned(blocks),
                       warps * kWarp, backward_shared_bytes<T, kHeadDim, Term>(warps), stream, p);
}

// delta, dq, dk and dv.
template <typename T, int kHeadDim, typename Map, typename Term>
const char* launch_backward(const BackwardParams<Map, Term>& p, int rows_q, int rows_k,
                            Stream stream) {
  const char* error = launch_delta<T, kHeadDim>(p, stream);
  if (!error) error = launch_dq<T, kHeadDim>(p, rows_q, stream);
  if (!error) error = launch_dkv<T, kHeadDim>(p, rows_k, stream);
  return error;
}

}  // namespace vitkit::attention
