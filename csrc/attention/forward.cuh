// Attention forward: online softmax over tiles of keys. A warp keeps its scores, weights and
// outputs in registers; keys and values come by asynchronous copies, a stage ahead.
#pragma once

#include "cosine.cuh"
#include "launch_kernel.cuh"
#include "mainloop.cuh"
#include "tiles.h"

namespace vitkit::attention {

struct ForwardTensors {
  Rows q, k, v, out;
  float* lse;  // [batch, head, statistic]
  int64_t lse_batch, lse_head;
  int head_dim;
  bool causal;
  float scale;  // times log2(e)
};

template <typename Map, typename Term>
struct ForwardParams : ForwardTensors {
  Map map;
  Term term;
};

// Maximum and sum of exp2 of the scores of a lane's rows.
template <int kRowTiles>
struct OnlineSoftmax {
  float peak[kRowTiles][2], total[kRowTiles][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) peak[r][half] = -INFINITY, total[r][half] = 0.f;
  }

  // A row begins with `zeros` scores of 0. Sums are those of a quad of lanes.
  __device__ __forceinline__ void begin(int r, int half, int zeros) {
    if (zeros <= 0) return;
    peak[r][half] = 0.f;
    total[r][half] = lane_id() % 4 == 0 ? float(zeros) : 0.f;
  }

  // Turns the scores of a row into weights. What was accumulated under another maximum is to be
  // multiplied by the result.
  template <int kTiles>
  __device__ __forceinline__ float weigh(float (&s)[kTiles][4], int r, int half, float factor) {
    float top = peak[r][half];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float base = top == -INFINITY ? 0.f : top * factor;
    const float keep = ptx::exp2_approx(peak[r][half] * factor - base);
    peak[r][half] = top;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = half * 2; i < half * 2 + 2; ++i) {
        s[n][i] = ptx::exp2_approx(s[n][i] * factor - base);
        sum += s[n][i];
      }
    total[r][half] = total[r][half] * keep + sum;
    return keep;
  }

  template <int kOut>
  static __device__ __forceinline__ void rescale(float (&out)[kOut][4], int half, float keep) {
#pragma unroll
    for (int n = 0; n < kOut; ++n) {
      out[n][half * 2] *= keep;
      out[n][half * 2 + 1] *= keep;
    }
  }

  template <int kTiles, int kOut>
  __device__ __forceinline__ void update(float (&s)[kRowTiles][kTiles][4],
                                         float (&out)[kRowTiles][kOut][4], float factor) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) rescale(out[r], half, weigh(s[r], r, half, factor));
  }

  // Divides by the sums and returns lse, natural log. Rows that attended nothing: 0 and -inf.
  template <int kOut>
  __device__ __forceinline__ float finish(float (&out)[kRowTiles][kOut][4], int r, int half,
                                          float factor) {
    float sum = total[r][half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
    for (int n = 0; n < kOut; ++n) {
      out[r][n][half * 2] *= inverse;
      out[r][n][half * 2 + 1] *= inverse;
    }
    return sum == 0.f ? -INFINITY : peak[r][half] * factor * kLn2 + logf(sum);
  }
};

template <typename T, int kHeadDim, typename Map, typename Term>
__global__ void __launch_bounds__(128, 2)
    attention_fwd_kernel(const __grid_constant__ ForwardParams<Map, Term> p) {
  using M = Mma<T>;
  using Shared = SharedTile<T, kHeadDim>;
  constexpr Tile kTile = kForwardTile<T, kHeadDim>;
  constexpr int kRowTiles = kTile.row_tiles, kKeys = kTile.others, kStages = kTile.stages;
  constexpr int kTiles = kKeys / 8, kOut = kHeadDim / 8, kSteps = kHeadDim / M::kDepth;
  // Queries stay in registers where those of scores, outputs and a term leave room.
  constexpr bool kHold = sizeof(T) == 2 && kRowTiles * kHeadDim <= (Term::kActive ? 96 : 128);
  VITKIT_DYNAMIC_SHARED(memory);

  const int rows = int(blockDim.x) / kWarp * 16 * kRowTiles;
  const auto span = p.map.span(blockIdx.x, rows, false);
  if (span.first >= span.n_q) return;
  const Shared q{memory};
  const auto keys = [&](int stage) {
    return Shared{memory + Shared::bytes(rows + 2 * stage * kKeys)};
  };
  const auto values = [&](int stage) {
    return Shared{memory + Shared::bytes(rows + (2 * stage + 1) * kKeys)};
  };
  const auto query_token = [&](int i) { return p.map.query(span, i); };
  const auto key_token = [&](int i) { return p.map.key(span, i); };
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
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load_step(step);

  const int warp_row = int(threadIdx.x) / kWarp * 16 * kRowTiles;
  const int first_row = span.first + warp_row;
  const int row = first_row + lane_id() / 4, pair = lane_id() % 4 * 2;
  // Keys that any row of this warp attends.
  const int end = first_row >= span.n_q ? 0 : p.causal ? min(n_k, first_row + 16 * kRowTiles) : n_k;
  // A positive scale can wait for the exponent.
  const bool fold = !Term::kActive && p.scale > 0.f;
  const float factor = fold ? p.scale : 1.f;
  typename M::A held[kHold ? kSteps : 1][kRowTiles];
  const auto load_query = [&](int r, int k) {
    if constexpr (kHold) {
      return held[k][r];
    } else {
      return M::load_a(q, warp_row + r * 16, k * M::kDepth);
    }
  };
  float out[kRowTiles][kOut][4] = {};
  OnlineSoftmax<kRowTiles> softmax;
  if constexpr (Map::kZeros) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        softmax.begin(r, half, p.map.zeros(span, row + r * 16 + half * 8, p.causal));
  }
  RowScale<Term::kCosine> scale[kRowTiles];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) scale[r].all = scale_of(p, span);

  for (int step = 0; step < steps; ++step) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    load_step(step + kStages - 1);
    if (step == 0) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        if constexpr (kHold)
#pragma unroll
          for (int k = 0; k < kSteps; ++k)
            held[k][r] = M::load_a(q, warp_row + r * 16, k * M::kDepth);
        scale[r].load(q, warp_row + r * 16);
      }
    }
    const int first = step * kKeys, valid = min(end - first, kKeys), stage = step % kStages;
    if (valid <= 0) continue;
    const bool whole = valid == kKeys;
    const bool all = kKeys == 16 || whole;  // ends are cut in units of 16: 16 keys have no other
    float s[kRowTiles][kTiles][4] = {};
    if (all) {
      multiply_rows<true>(s, load_query, keys(stage), valid);
    } else {
      multiply_rows<false>(s, load_query, keys(stage), valid);
    }
    if (!fold) {
      ColumnScale<Term::kCosine, kTiles> of_column;
      of_column.load(keys(stage));
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[r][n][i] *= scale[r].of(i / 2) * of_column.of(n, i);
        if constexpr (Term::kActive)
          p.term.template add<false>(s[r], span, row + r * 16, first + pair);
      }
    }
    if (!whole || (p.causal && first + kKeys - 1 > first_row)) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = first + n * 8 + pair + i % 2, query = row + r * 16 + i / 2 * 8;
            if (key >= n_k || (p.causal && key > query)) s[r][n][i] = -INFINITY;
          }
    }
    softmax.update(s, out, factor);
    if (all) {
      multiply_columns<true>(out, s, values(stage), 0, valid);
    } else {
      multiply_columns<false>(out, s, values(stage), 0, valid);
    }
  }

  ptx::copy_wait<0>();
  __syncthreads();  // without keys, other threads' copies of q may still arrive
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float lse = softmax.finish(out, r, half, factor);
      const int query = row + r * 16 + half * 8;
      if (query >= span.n_q || pair != 0) continue;
      if (const int64_t at = p.map.statistic(span, query); at >= 0)
        p.lse[span.batch * p.lse_batch + span.head * p.lse_head + at] = lse;
    }
  store_rows(out, q, warp_row, p.out.template plane<T>(span), p.out.token, first_row, span.n_q, 0,
             p.head_dim, [&](int i) { return p.map.result(span, i); });
}

// Null, or the error of the launch. `rows`: queries of the longest sequence, as far as is known.
template <typename T, int kHeadDim, typename Map, typename Term>
const char* launch_forward(const ForwardParams<Map, Term>& p, int rows, Stream stream) {
  constexpr Tile kTile = kForwardTile<T, kHeadDim>;
  static_assert(kTile.stages >= 2 && kTile.warps * kWarp <= 128);
  const int of_warp = 16 * kTile.row_tiles;
  const int warps = warps_for(rows, of_warp, kTile.warps);
  const int64_t blocks = p.map.blocks(warps * of_warp, false);
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  const int shared =
      SharedTile<T, kHeadDim>::bytes(warps * of_warp + 2 * kTile.stages * kTile.others);
  return launch_kernel(&attention_fwd_kernel<T, kHeadDim, Map, Term>, unsigned(blocks),
                       warps * kWarp, shared, stream, p);
}

}  // namespace vitkit::attention
