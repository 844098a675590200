// Attention gradient in float32 arithmetic, for any element type, token map, score term and sink.
//
// A cell is a range of queries against a range of keys. Its keys and values are packed once; blocks
// of queries then pass by, and all five products happen while a block's scores are in cache:
//   S = Q K^T, dP = dO V^T, P = exp(S - lse), dS = P (dP - delta), dV += P^T dO, dK += dS^T Q, dQ
//   += dS K
// with delta = rowsum(dO O) - grad_lse. Sums over cells are kept in float32 per problem.
#pragma once

#include "attention/arena.h"
#include "attention/backward_bias.h"
#include "attention/pack.h"
#include "attention/score_term.h"
#include "attention/softmax.h"

namespace vitkit::cpu::VITKIT_ISA {

// Rows of P and dS in one block: they are the inner dimension of two products, and both blocks
// share the L2 cache with the packed keys and the sums.
constexpr int64_t kGradBlockRows = (72 + kTileRows - 1) / kTileRows * kTileRows;

// Keys of a cell: three packings of them fit a 512 KiB L2 cache. Each row of Q and dO is packed
// once per cell, which costs about as much as 30 keys.
constexpr int64_t kCellBytes = 384 << 10, kMinCellKeys = 96, kMaxCellKeys = 512,
                  kFineCellKeys = 128;
constexpr int64_t kQueriesPerCell = 2;  // times the keys: packing the keys is paid for more often

VITKIT_INLINE int64_t columns_padded(int64_t head_dim) { return round_up(head_dim, kLanes); }

// Float32 sums of one problem. Rows up to an even number may be written.
struct GradSums {
  int64_t stride;
  float *dq, *dk, *dv;
  int64_t floats;

  GradSums(float* base, int64_t head_dim, int64_t nq, int64_t nk)
      : stride(columns_padded(head_dim)) {
    dq = base;
    dk = dq + round_rows(nq) * stride;
    dv = dk + round_rows(nk) * stride;
    floats = (round_rows(nq) + 2 * round_rows(nk)) * stride;
  }
};

template <typename T>
struct GradWorkspace {
  int64_t head_dim, row_stride, score_stride;
  float *k_transposed, *v_transposed, *k, *q, *grad, *q_panels, *grad_panels, *p, *ds, *shift,
      *delta;
  T* row;
  int64_t bytes;

  GradWorkspace(char* base, int64_t head_dim, int64_t keys) : head_dim(head_dim) {
    row_stride = columns_padded(head_dim);
    score_stride = round_up(keys, kPanel) + kPanel;
    Arena arena{base};
    k_transposed = arena.take<float>(panels_size(keys, head_dim));
    v_transposed = arena.take<float>(panels_size(keys, head_dim));
    k = arena.take<float>(panels_size(head_dim, keys));
    q = arena.take<float>(round_rows(kGradBlockRows) * row_stride);
    grad = arena.take<float>(round_rows(kGradBlockRows) * row_stride);
    q_panels = arena.take<float>(panels_size(head_dim, kGradBlockRows));
    grad_panels = arena.take<float>(panels_size(head_dim, kGradBlockRows));
    p = arena.take<float>(round_rows(kGradBlockRows) * score_stride);
    ds = arena.take<float>(round_rows(kGradBlockRows) * score_stride);
    shift = arena.take<float>(kGradBlockRows);
    delta = arena.take<float>(kGradBlockRows);
    row = arena.take<T>(head_dim);
    bytes = arena.next - base;
  }
};

template <typename T, typename Map, typename Term, typename Sink>
class BackwardFloat32 {
 public:
  BackwardFloat32(const Map& map, const Term& term, const Sink& sink, float scale,
                  const GradWorkspace<T>& workspace, const GradSums& sums)
      : map_(map), term_(term), sink_(sink), scale_(scale), w_(workspace), sums_(sums) {}

  // Queries [q0, q0 + nq) against keys [k0, k0 + nk).
  void cell(int64_t q0, int64_t nq, int64_t k0, int64_t nk) const {
    if (nk <= 0 || (map_.causal && q0 + nq <= k0)) return;
    pack_transposed<T>([this](int64_t j) { return map_.k_row(j); }, k0, nk, w_.head_dim,
                       w_.k_transposed);
    pack_transposed<T>([this](int64_t j) { return map_.v_row(j); }, k0, nk, w_.head_dim,
                       w_.v_transposed);
    pack_panels<T>([this](int64_t j) { return map_.k_row(j); }, k0, nk, w_.head_dim, w_.k);
    const int64_t blocks = (nq + kGradBlockRows - 1) / kGradBlockRows;
    const int64_t block_rows = round_up((nq + blocks - 1) / blocks, kTileRows);
    for (int64_t r = 0; r < nq; r += block_rows) {
      const Block b{q0 + r, nq - r < block_rows ? nq - r : block_rows, k0, nk};
      if (map_.causal && b.q0 + b.rows <= k0) continue;
      pack_queries(b);
      const int64_t next = r + b.rows, after = next + block_rows;
      Ahead ahead{q0 + next, q0 + (after < nq ? after : nq)};
      products(b, w_.q, w_.k_transposed, w_.p, ahead);
      products(b, w_.grad, w_.v_transposed, w_.ds, ahead);
      differentiate(b);
      add_to_keys(b);
      add_to_queries(b);
    }
  }

  void clear_queries(int64_t q0, int64_t nq) const { clear(sums_.dq, q0, nq); }
  void clear_keys(int64_t k0, int64_t nk) const {
    clear(sums_.dk, k0, nk);
    clear(sums_.dv, k0, nk);
  }
  void write_queries(int64_t q0, int64_t nq) const {
    for (int64_t i = q0; i < q0 + nq; ++i)
      write_row(sums_.dq + i * sums_.stride, w_.head_dim, scale_, map_.dq_row(i));
  }
  void write_keys(int64_t k0, int64_t nk) const {
    for (int64_t j = k0; j < k0 + nk; ++j) {
      write_row(sums_.dk + j * sums_.stride, w_.head_dim, scale_, map_.dk_row(j));
      write_row(sums_.dv + j * sums_.stride, w_.head_dim, 1.f, map_.dv_row(j));
    }
  }

 private:
  struct Block {
    int64_t q0, rows, k0, nk;
  };
  // Queries whose rows are fetched while a block is multiplied: each lies in pages of its own,
  // which is too far apart for the hardware to foresee.
  struct Ahead {
    int64_t next, end;
  };

  void clear(float* sums, int64_t first, int64_t n) const {
    std::memset(sums + first * sums_.stride, 0,
                size_t(round_rows(n) * sums_.stride) * sizeof(float));
  }

  // How many of the block's keys row r of the block attends.
  int64_t visible(const Block& b, int64_t r) const {
    if (!map_.causal) return b.nk;
    const int64_t keys = b.q0 + r + 1 - b.k0;
    return keys < 0 ? 0 : (keys < b.nk ? keys : b.nk);
  }
  static int64_t tile_rows(int64_t left) { return left < kTileRows ? left : int64_t(kTileRows); }

  // A row of 0 scores and delta 0 with an infinite shift gives P = dS = 0: a query that attends
  // nothing.
  void pack_queries(const Block& b) const {
    for (int64_t r = 0; r < b.rows; ++r) {
      const int64_t i = b.q0 + r;
      pack_both(map_.q_row(i), r, b.rows, w_.q, w_.q_panels);
      const T* grad = map_.grad_row(i, w_.row);
      pack_both(grad, r, b.rows, w_.grad, w_.grad_panels);
      const float lse = *map_.lse(i);
      w_.shift[r] = lse == -INFINITY ? INFINITY : lse * kLog2e;
      w_.delta[r] = lse == -INFINITY ? 0.f : dot_out(r, map_.out_row(i)) - map_.grad_lse(i);
    }
    if (b.rows % 2) {
      std::memset(w_.q + b.rows * w_.row_stride, 0, size_t(w_.row_stride) * sizeof(float));
      std::memset(w_.grad + b.rows * w_.row_stride, 0, size_t(w_.row_stride) * sizeof(float));
    }
  }

  // One row as a left operand (row-major) and as row r of a right operand (panels of `rows` rows).
  void pack_both(const T* from, int64_t r, int64_t rows, float* row_major, float* panels) const {
    for (int64_t d = 0; d < w_.row_stride; d += kLanes) {
      const int64_t left = w_.head_dim - d;
      const f32v x = load_partial(from + d, int(left < kLanes ? left : kLanes));
      store(row_major + r * w_.row_stride + d, x);
      store(panels + d / kPanel * kPanel * rows + r * kPanel + d % kPanel, x);
    }
  }

  float dot_out(int64_t r, const T* out) const {
    const float* grad = w_.grad + r * w_.row_stride;
    f32v sum = {};
    for (int64_t d = 0; d < w_.head_dim; d += kLanes) {
      const int64_t left = w_.head_dim - d;
      sum = fma(load(grad + d), load_partial(out + d, int(left < kLanes ? left : kLanes)), sum);
    }
    return reduce_add(sum);
  }

  // to[r][j] = rows[r] . keys[j]
  void products(const Block& b, const float* rows, const float* keys_transposed, float* to,
                Ahead& ahead) const {
    const int64_t d = w_.head_dim;
    for (int64_t p = 0; p < num_panels(b.nk); ++p) {
      const int vecs = panel_vecs(b.nk, p);
      for (int64_t r = 0; r < b.rows; r += kTileRows) {
        const int64_t tile = tile_rows(b.rows - r);
        if (visible(b, r + tile - 1) <= p * kPanel) continue;
        if (ahead.next < ahead.end) map_.prefetch_query(ahead.next++);
        gemm_rows<false, Epilogue::overwrite>(tile, vecs, d, rows + r * w_.row_stride,
                                              w_.row_stride, keys_transposed + p * kPanel * d,
                                              to + r * w_.score_stride + p * kPanel,
                                              w_.score_stride);
      }
    }
  }

  // P over S and dS over dP. Behind the last visible key of a row, zeros up to the end of the tile
  // that the products below read with its neighbours.
  void differentiate(const Block& b) const {
    for (int64_t r = 0; r < b.rows; ++r) {
      const int64_t n = visible(b, r), end = n + kTileRows;
      float* s = w_.p + r * w_.score_stride;
      float* ds = w_.ds + r * w_.score_stride;
      const int64_t padded = end < b.nk ? end : b.nk;
      if constexpr (Term::kNone)
        differentiate_row(r, n, padded, s, ds, [](f32v x, int64_t, int) { return x; });
      else
        term_.row(b.q0 + r, b.k0,
                  [&](const auto& add) { differentiate_row(r, n, padded, s, ds, add); });
      if constexpr (!Sink::kNone) sink_.add(b.q0 + r, b.k0, n, ds);
    }
  }

  template <typename Add>
  void differentiate_row(int64_t r, int64_t n, int64_t padded, float* s, float* ds,
                         const Add& add) const {
    constexpr int kDegree = std::is_same_v<T, float> ? 5 : 4;
    const f32v scale = splat(scale_ * kLog2e), shift = splat(w_.shift[r]),
               delta = splat(w_.delta[r]);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      const f32v p = exp2_softmax<kDegree>(add(load(s + j) * scale, j, kLanes) - shift);
      store(s + j, p);
      store(ds + j, p * (load(ds + j) - delta));
    }
    if (j < n) {
      const f32v x = keep_lanes(add(load(s + j) * scale, j, int(n - j)) - shift, n - j, -INFINITY);
      const f32v p = exp2_softmax<kDegree>(x);
      store(s + j, p);
      store(ds + j, keep_lanes(p * (load(ds + j) - delta), n - j, 0.f));
      j += kLanes;
    }
    for (; j < padded; j += kLanes) {
      store(s + j, f32v{});
      store(ds + j, f32v{});
    }
  }

  // dV += P^T dO and dK += dS^T Q
  void add_to_keys(const Block& b) const {
    for (int64_t j = 0; j < b.nk; j += kTileRows) {
      const int64_t hidden = map_.causal && b.k0 + j > b.q0 ? b.k0 + j - b.q0 : 0;
      if (hidden >= b.rows) return;
      add_to_key_tile(b, j, hidden, w_.p, w_.grad_panels, sums_.dv);
      add_to_key_tile(b, j, hidden, w_.ds, w_.q_panels, sums_.dk);
    }
  }

  // The tile at key j, which no row before `hidden` attends.
  void add_to_key_tile(const Block& b, int64_t j, int64_t hidden, const float* scores,
                       const float* panels, float* sums) const {
    for (int64_t p = 0; p < num_panels(w_.head_dim); ++p)
      gemm_rows<true, Epilogue::accumulate>(
          tile_rows(b.nk - j), panel_vecs(w_.head_dim, p), b.rows - hidden,
          scores + hidden * w_.score_stride + j, w_.score_stride,
          panels + (p * b.rows + hidden) * kPanel, sums + (b.k0 + j) * sums_.stride + p * kPanel,
          sums_.stride);
  }

  // dQ += dS K
  void add_to_queries(const Block& b) const {
    for (int64_t p = 0; p < num_panels(w_.head_dim); ++p)
      for (int64_t r = 0; r < b.rows; r += kTileRows) {
        const int64_t tile = tile_rows(b.rows - r);
        gemm_rows<false, Epilogue::accumulate>(
            tile, panel_vecs(w_.head_dim, p), visible(b, r + tile - 1), w_.ds + r * w_.score_stride,
            w_.score_stride, w_.k + p * kPanel * b.nk,
            sums_.dq + (b.q0 + r) * sums_.stride + p * kPanel, sums_.stride);
      }
  }

  const Map& map_;
  const Term& term_;
  const Sink& sink_;
  const float scale_;
  const GradWorkspace<T>& w_;
  const GradSums& sums_;
};

}  // namespace vitkit::cpu::VITKIT_ISA
