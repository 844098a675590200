// Attention gradient: which queries meet which keys, and when sums are begun and written. The
// arithmetic is a `Compute` (backward_float32.h, backward_amx.h), the layout a token map, the bias
// a score term and a sink.
//
// A cell is a range of queries against a range of keys. Its keys and values are packed once; blocks
// of queries then pass by, and all five products happen while a block's scores are in cache:
//   S = Q K^T, dP = dO V^T, P = exp(S - lse), dS = P (dP - delta), dV += P^T dO, dK += dS^T Q, dQ
//   += dS K
// with delta = rowsum(dO O) - grad_lse. Sums over cells are kept in float32, per problem.
#pragma once

#include "attention/arena.h"
#include "attention/backward_bias.h"
#include "attention/backward_map.h"
#include "attention/score_term.h"
#include "attention/softmax.h"
#include "flash_attention_bwd.h"

namespace vitkit::cpu::VITKIT_ISA {

// Packing the keys of a cell is paid for by so many times as many queries.
constexpr int64_t kQueriesPerKey = 2;
constexpr int64_t kFineCellKeys = 128;

// Tokens of each of the fewest equal ranges of at most `limit`; `limit` is a multiple of `step`.
VITKIT_INLINE int64_t range_of(int64_t tokens, int64_t limit, int64_t step) {
  if (tokens <= 0) return step;
  const int64_t ranges = (tokens + limit - 1) / limit;
  return round_up((tokens + ranges - 1) / ranges, step);
}

template <typename Compute>
VITKIT_INLINE int64_t most_keys(int64_t head_dim, bool fine) {
  const int64_t keys = Compute::most_keys(head_dim);
  return round_up(fine && keys > kFineCellKeys ? kFineCellKeys : keys, Compute::kKeyStep);
}

template <typename Compute>
VITKIT_INLINE BackwardGrid backward_grid(int64_t head_dim, bool fine, int64_t nq, int64_t nk) {
  const int64_t keys = most_keys<Compute>(head_dim, fine);
  BackwardGrid g;
  g.key_range = range_of(nk, keys, Compute::kKeyStep);
  g.query_range =
      range_of(nq, round_up(kQueriesPerKey * keys, Compute::kRowStep), Compute::kRowStep);
  g.key_ranges = nk > 0 ? (nk + g.key_range - 1) / g.key_range : 1;
  g.query_ranges = nq > 0 ? (nq + g.query_range - 1) / g.query_range : 1;
  return g;
}

// The cell of a step and lane, and whether it is the first or last one that its rows meet.
struct Cell {
  int64_t query, key;
  bool first_of_query, last_of_query, first_of_key, last_of_key;

  Cell(const BackwardGrid& g, int64_t step, int64_t lane) {
    const int64_t steps = g.steps(), lanes = g.lanes(), across = (lane + step) % steps;
    // Ranges across meet lanes downwards from the first that reaches them, cyclically.
    const bool first_across = lane == (across < lanes ? across : lanes - 1);
    const bool last_across = lane == (across + 1 < lanes ? across + 1 : 0);
    const bool by_key = g.key_ranges <= g.query_ranges;
    key = by_key ? lane : across;
    query = by_key ? across : lane;
    first_of_key = by_key ? step == 0 : first_across;
    last_of_key = by_key ? step == steps - 1 : last_across;
    first_of_query = by_key ? first_across : step == 0;
    last_of_query = by_key ? last_across : step == steps - 1;
  }
};

// Queries [q0, q0 + rows) against keys [k0, k0 + nk). While it is computed, rows of the queries
// from `ahead` to `ahead_end` are fetched: each lies in pages of its own, too far apart for the
// hardware to foresee.
struct GradBlock {
  int64_t q0, rows, k0, nk, ahead, ahead_end;

  template <typename Map>
  void fetch_ahead(const Map& map) {
    if (ahead < ahead_end) map.prefetch_query(ahead++);
  }
};

// How many of the block's keys row r of the block attends: the first so many.
template <typename Map>
VITKIT_INLINE int64_t visible(const Map& map, const GradBlock& b, int64_t r) {
  if (!map.causal) return b.nk;
  const int64_t keys = b.q0 + r + 1 - b.k0;
  return keys < 0 ? 0 : (keys < b.nk ? keys : b.nk);
}

// What a row of scores is shifted by (its log-sum-exp in base-2 units, as a sum of two floats:
// rounding it would cost as much accuracy as lse has lost already), and delta. An infinite shift
// makes P = dS = 0: a query that attends nothing.
struct RowConstants {
  float shift, shift_rest, delta;
};

template <typename T, typename Map>
VITKIT_INLINE RowConstants row_constants(const Map& map, int64_t i, const T* grad,
                                         int64_t head_dim) {
  const float lse = *map.lse(i);
  if (lse == -INFINITY) return {INFINITY, 0.f, 0.f};
  const double exact_shift = double(lse) * 1.4426950408889634;
  const float shift = float(exact_shift);
  const T* out = map.out_row(i);
  f32v sum = {};
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int n = int(head_dim - d < kLanes ? head_dim - d : kLanes);
    sum = fma(load_partial(grad + d, n), load_partial(out + d, n), sum);
  }
  return {shift, float(exact_shift - shift), reduce_add(sum) - map.grad_lse(i)};
}

// A Compute has
//   Element, kBlockRows, kRowStep, kKeyStep, most_keys(head_dim)
//   sums_floats(head_dim, nq, nk)         size of the float32 sums of a problem
//   Compute(arena, head_dim, keys)        working memory for cells of at most `keys` keys
//   attach(sums, nq, nk)                  the sums of a problem
//   pack_keys(map, k0, nk)                then, for blocks of at most kBlockRows queries and these
//   keys, block(map, term, sink, block, scale) clear_queries, clear_keys(first, n), write_queries,
//   write_keys(map, first, n, scale)
template <typename Compute, typename Map, typename Term, typename Sink>
class Backward {
 public:
  Backward(const Map& map, const Term& term, const Sink& sink, float scale, const Compute& compute)
      : map_(map), term_(term), sink_(sink), scale_(scale), compute_(compute) {}

  void run(const BackwardGrid& g, const Cell& cell) const {
    const int64_t q0 = cell.query * g.query_range, k0 = cell.key * g.key_range;
    const int64_t nq = map_.nq - q0 < g.query_range ? map_.nq - q0 : g.query_range;
    const int64_t nk = map_.nk - k0 < g.key_range ? map_.nk - k0 : g.key_range;
    if (cell.first_of_query) compute_.clear_queries(q0, nq);
    if (cell.first_of_key) compute_.clear_keys(k0, nk);
    if (nk > 0 && nq > 0 && !(map_.causal && q0 + nq <= k0)) multiply(q0, nq, k0, nk);
    if (cell.last_of_query) compute_.write_queries(map_, q0, nq, scale_);
    if (cell.last_of_key) compute_.write_keys(map_, k0, nk, scale_);
  }

 private:
  void multiply(int64_t q0, int64_t nq, int64_t k0, int64_t nk) const {
    compute_.pack_keys(map_, k0, nk);
    const int64_t step = range_of(nq, Compute::kBlockRows, Compute::kRowStep);
    for (int64_t r = 0; r < nq; r += step) {
      const int64_t rows = nq - r < step ? nq - r : step;
      const int64_t after = r + rows + step;
      if (map_.causal && q0 + r + rows <= k0) continue;
      compute_.block(map_, term_, sink_,
                     {q0 + r, rows, k0, nk, q0 + r + rows, q0 + (after < nq ? after : nq)}, scale_);
    }
  }

  const Map& map_;
  const Term& term_;
  const Sink& sink_;
  const float scale_;
  const Compute& compute_;
};

}  // namespace vitkit::cpu::VITKIT_ISA
