// The arithmetic of the attention gradient in float32, for any element type.
#pragma once

#include "attention/backward.h"
#include "attention/pack.h"

namespace vitkit::cpu::VITKIT_ISA {

template <typename T>
class Float32Gradient {
 public:
  using Element = T;
  // Rows of P and dS in one block: the inner dimension of two products.
  static constexpr int64_t kBlockRows = (72 + kTileRows - 1) / kTileRows * kTileRows;
  static constexpr int64_t kRowStep = kTileRows;
  static constexpr int64_t kKeyStep = kPanel;
  static constexpr int64_t kFewestKeys = 96;

  // Three packings of the keys fit a 512 KiB L2 cache. Each row of Q and dO is packed once per
  // cell, which costs about as much as 30 keys.
  static int64_t most_keys(int64_t head_dim) {
    constexpr int64_t kBytes = 384 << 10, kMost = 512;
    const int64_t keys = kBytes / (3 * int64_t(sizeof(float)) * head_dim);
    return keys < kFewestKeys ? kFewestKeys : (keys > kMost ? kMost : keys);
  }

  // Rows up to an even number may be written. Beside the sums, rows of Q and dO that meet several
  // ranges of keys are kept as they were read first: in their tensors each lies in a page of its
  // own.
  static int64_t sums_floats(int64_t head_dim, int64_t nq, int64_t nk) {
    const int64_t width = round_up(head_dim, kLanes), rows = round_rows(nq);
    const int64_t kept = nk > kFewestKeys ? rows * (2 * width + kConstants + 1) : 0;
    return (rows + 2 * round_rows(nk)) * width + kept;
  }

  Float32Gradient(Arena& arena, int64_t head_dim, int64_t keys)
      : head_dim_(head_dim),
        most_keys_(keys),
        row_stride_(round_up(head_dim, kLanes)),
        score_stride_(round_up(keys, kPanel) +
                      kPanel),  // not a power of two: rows would share cache sets
        k_transposed_(arena.take<float>(panels_size(keys, head_dim))),
        v_transposed_(arena.take<float>(panels_size(keys, head_dim))),
        k_(arena.take<float>(panels_size(head_dim, keys))),
        q_(arena.take<float>(kBlockRows * row_stride_)),
        grad_(arena.take<float>(kBlockRows * row_stride_)),
        q_panels_(arena.take<float>(panels_size(head_dim, kBlockRows))),
        grad_panels_(arena.take<float>(panels_size(head_dim, kBlockRows))),
        p_(arena.take<float>(kBlockRows * score_stride_)),
        ds_(arena.take<float>(kBlockRows * score_stride_)),
        constants_(arena.take<RowConstants>(kBlockRows)),
        row_(arena.take<T>(head_dim)) {
    static_assert(kBlockRows % 2 == 0 && kRowStep % 2 == 0, "rows of a product come in twos");
  }

  void attach(float* sums, int64_t nq, int64_t nk) {
    dq_ = sums;
    dk_ = dq_ + round_rows(nq) * row_stride_;
    dv_ = dk_ + round_rows(nk) * row_stride_;
    if (nk <= most_keys_) return;
    kept_.q = dv_ + round_rows(nk) * row_stride_;
    kept_.grad = kept_.q + round_rows(nq) * row_stride_;
    kept_.constants = reinterpret_cast<RowConstants*>(kept_.grad + round_rows(nq) * row_stride_);
    is_kept_ = reinterpret_cast<float*>(kept_.constants + round_rows(nq));
  }

  void clear_queries(int64_t first, int64_t n) const {
    clear(dq_, first, n);
    if (is_kept_) std::memset(is_kept_ + first, 0, size_t(n) * sizeof(float));
  }
  void clear_keys(int64_t first, int64_t n) const {
    clear(dk_, first, n);
    clear(dv_, first, n);
  }

  template <typename Map>
  void write_queries(const Map& map, int64_t first, int64_t n, float scale) const {
    for (int64_t i = first; i < first + n; ++i)
      write_row(dq_ + i * row_stride_, head_dim_, scale, map.dq_row(i));
  }
  template <typename Map>
  void write_keys(const Map& map, int64_t first, int64_t n, float scale) const {
    for (int64_t j = first; j < first + n; ++j) {
      write_row(dk_ + j * row_stride_, head_dim_, scale, map.dk_row(j));
      write_row(dv_ + j * row_stride_, head_dim_, 1.f, map.dv_row(j));
    }
  }

  template <typename Map>
  void pack_keys(const Map& map, int64_t first, int64_t n) const {
    pack_transposed<T>([&](int64_t j) { return map.k_row(j); }, first, n, head_dim_, k_transposed_);
    pack_transposed<T>([&](int64_t j) { return map.v_row(j); }, first, n, head_dim_, v_transposed_);
    pack_panels<T>([&](int64_t j) { return map.k_row(j); }, first, n, head_dim_, k_);
  }

  template <typename Map, typename Term, typename Sink>
  void block(const Map& map, const Term& term, const Sink& sink, GradBlock b, float scale) const {
    const Queries queries =
        is_kept_ ? kept_.from(b.q0, row_stride_) : Queries{q_, grad_, constants_};
    pack_queries(map, b, queries);
    if (is_kept_ && b.ahead < b.ahead_end && is_kept_[b.ahead] != 0.f) b.ahead = b.ahead_end;
    products(map, b, queries.q, k_transposed_, p_);
    products(map, b, queries.grad, v_transposed_, ds_);
    differentiate(map, term, sink, b, queries.constants, scale);
    add_to_keys(map, b);
    add_to_queries(map, b);
  }

 private:
  void clear(float* sums, int64_t first, int64_t n) const {
    std::memset(sums + first * row_stride_, 0, size_t(round_rows(n) * row_stride_) * sizeof(float));
  }
  static int64_t tile_rows(int64_t left) { return left < kTileRows ? left : int64_t(kTileRows); }

  // Rows of Q and dO, row-major, and what belongs to them.
  struct Queries {
    float *q, *grad;
    RowConstants* constants;

    Queries from(int64_t row, int64_t stride) const {
      return {q + row * stride, grad + row * stride, constants + row};
    }
  };

  template <typename Map>
  void pack_queries(const Map& map, const GradBlock& b, const Queries& to) const {
    if (is_kept_ && is_kept_[b.q0] != 0.f) {
      const auto pack = [&](const float* rows, float* panels) {
        pack_panels<float>([&](int64_t r) { return rows + r * row_stride_; }, 0, b.rows, head_dim_,
                           panels);
      };
      pack(to.q, q_panels_);
      pack(to.grad, grad_panels_);
      return;
    }
    for (int64_t r = 0; r < b.rows; ++r) {
      const T* grad = map.grad_row(b.q0 + r, row_);
      pack_both(map.q_row(b.q0 + r), r, b.rows, to.q, q_panels_);
      pack_both(grad, r, b.rows, to.grad, grad_panels_);
      to.constants[r] = row_constants(map, b.q0 + r, grad, head_dim_);
    }
    if (is_kept_) is_kept_[b.q0] = 1.f;
    if (b.rows % 2 == 0) return;
    std::memset(to.q + b.rows * row_stride_, 0, size_t(row_stride_) * sizeof(float));
    std::memset(to.grad + b.rows * row_stride_, 0, size_t(row_stride_) * sizeof(float));
  }

  // One row as a left operand (row-major) and as row r of a right operand (panels of `rows` rows).
  void pack_both(const T* from, int64_t r, int64_t rows, float* row_major, float* panels) const {
    for (int64_t d = 0; d < row_stride_; d += kLanes) {
      const int64_t left = head_dim_ - d;
      const f32v x = load_partial(from + d, int(left < kLanes ? left : kLanes));
      store(row_major + r * row_stride_ + d, x);
      store(panels + d / kPanel * kPanel * rows + r * kPanel + d % kPanel, x);
    }
  }

  // to[r][j] = rows[r] . keys[j]
  template <typename Map>
  void products(const Map& map, GradBlock& b, const float* rows, const float* keys_transposed,
                float* to) const {
    for (int64_t p = 0; p < num_panels(b.nk); ++p) {
      const int vecs = panel_vecs(b.nk, p);
      for (int64_t r = 0; r < b.rows; r += kTileRows) {
        const int64_t tile = tile_rows(b.rows - r);
        if (visible(map, b, r + tile - 1) <= p * kPanel) continue;
        b.fetch_ahead(map);
        fetch_ahead(map);
        gemm_rows<false, Epilogue::overwrite>(tile, vecs, head_dim_, rows + r * row_stride_,
                                              row_stride_, keys_transposed + p * kPanel * head_dim_,
                                              to + r * score_stride_ + p * kPanel, score_stride_);
      }
    }
  }

  // P over S and dS over dP. Behind the last visible key of a row, zeros up to the end of the tile
  // that the products below read with its neighbours.
  template <typename Map, typename Term, typename Sink>
  void differentiate(const Map& map, const Term& term, const Sink& sink, const GradBlock& b,
                     const RowConstants* constants, float scale) const {
    for (int64_t r = 0; r < b.rows; ++r) {
      const int64_t n = visible(map, b, r), end = n + kTileRows;
      const Row row{p_ + r * score_stride_, ds_ + r * score_stride_, n, end < b.nk ? end : b.nk,
                    constants[r]};
      if constexpr (Term::kNone)
        differentiate(row, scale * kLog2e, [](f32v x, int64_t, int) { return x; });
      else
        term.row(b.q0 + r, b.k0, n, [&](const auto& add) {
          if constexpr (Sink::kExactDelta)
            differentiate_exactly(row, scale * kLog2e, map.grad_lse(b.q0 + r), add);
          else
            differentiate(row, scale * kLog2e, add);
        });
      if constexpr (!Sink::kNone) sink.add(b.q0 + r, b.k0, n, row.ds);
    }
  }

  struct Row {
    float *s, *ds;
    int64_t n, padded;
    RowConstants constants;
  };

  // exp(score - lse) of keys j ... of a row, from its products.
  template <typename Add>
  class Probability {
   public:
    Probability(const Row& row, float scale, const Add& add)
        : s_(row.s),
          add_(add),
          scale_(splat(scale)),
          shift_(splat(row.constants.shift)),
          rest_(splat(row.constants.shift_rest)) {}

    f32v operator()(int64_t j, int lanes) const {
      constexpr int kDegree = std::is_same_v<T, float> ? 5 : 4;
      f32v x = add_(load(s_ + j) * scale_, j, lanes) - shift_;
      if constexpr (std::is_same_v<T, float>) x = x - rest_;
      return exp2_softmax<kDegree>(lanes < kLanes ? keep_lanes(x, lanes, -INFINITY) : x);
    }

   private:
    const float* s_;
    const Add& add_;
    const f32v scale_, shift_, rest_;
  };

  template <typename Add>
  static void differentiate(const Row& row, float scale, const Add& add) {
    const Probability<Add> probability(row, scale, add);
    const f32v delta = splat(row.constants.delta);
    each_vector(row.n, [&](int64_t j, auto lanes) {
      const f32v p = probability(j, lanes);
      store(row.s + j, p);
      store(row.ds + j, first_lanes(p * (load(row.ds + j) - delta), lanes));
    });
    clear_behind(row);
  }

  // The same with delta as the sum of P dP over the row, all of whose keys are in this block, and P
  // divided by its sum: that makes up for the rounding of lse, which grows with the scores.
  template <typename Add>
  static void differentiate_exactly(const Row& row, float scale, float grad_lse, const Add& add) {
    const Probability<Add> probability(row, scale, add);
    f32v total = {}, sum = {};
    each_vector(row.n, [&](int64_t j, auto lanes) {
      const f32v p = probability(j, lanes);
      store(row.s + j, p);
      total += p;
      sum += first_lanes(p * load(row.ds + j), lanes);
    });
    const float all = reduce_add(total), share = all == 0.f ? 0.f : 1.f / all;
    const f32v factor = splat(share), delta = splat(reduce_add(sum) * share - grad_lse);
    each_vector(row.n, [&](int64_t j, auto lanes) {
      const f32v p = load(row.s + j) * factor;
      store(row.s + j, p);
      store(row.ds + j, first_lanes(p * (load(row.ds + j) - delta), lanes));
    });
    clear_behind(row);
  }

  static f32v first_lanes(f32v x, int lanes) {
    return lanes < kLanes ? keep_lanes(x, lanes, 0.f) : x;
  }

  static void clear_behind(const Row& row) {
    for (int64_t j = round_up(row.n, kLanes); j < row.padded; j += kLanes) {
      store(row.s + j, f32v{});
      store(row.ds + j, f32v{});
    }
  }

  // dV += P^T dO and dK += dS^T Q
  template <typename Map>
  void add_to_keys(const Map& map, const GradBlock& b) const {
    for (int64_t j = 0; j < b.nk; j += kTileRows) {
      const int64_t hidden = map.causal && b.k0 + j > b.q0 ? b.k0 + j - b.q0 : 0;
      if (hidden >= b.rows) return;
      add_to_key_tile(b, j, hidden, p_, grad_panels_, dv_);
      add_to_key_tile(b, j, hidden, ds_, q_panels_, dk_);
    }
  }

  // The tile at key j, which no row before `hidden` attends.
  void add_to_key_tile(const GradBlock& b, int64_t j, int64_t hidden, const float* scores,
                       const float* panels, float* sums) const {
    for (int64_t p = 0; p < num_panels(head_dim_); ++p)
      gemm_rows<true, Epilogue::accumulate>(tile_rows(b.nk - j), panel_vecs(head_dim_, p),
                                            b.rows - hidden, scores + hidden * score_stride_ + j,
                                            score_stride_, panels + (p * b.rows + hidden) * kPanel,
                                            sums + (b.k0 + j) * row_stride_ + p * kPanel,
                                            row_stride_);
  }

  // dQ += dS K
  template <typename Map>
  void add_to_queries(const Map& map, const GradBlock& b) const {
    for (int64_t p = 0; p < num_panels(head_dim_); ++p)
      for (int64_t r = 0; r < b.rows; r += kTileRows) {
        const int64_t tile = tile_rows(b.rows - r);
        gemm_rows<false, Epilogue::accumulate>(
            tile, panel_vecs(head_dim_, p), visible(map, b, r + tile - 1), ds_ + r * score_stride_,
            score_stride_, k_ + p * kPanel * b.nk, dq_ + (b.q0 + r) * row_stride_ + p * kPanel,
            row_stride_);
      }
  }

  static constexpr int64_t kConstants = sizeof(RowConstants) / sizeof(float);

  int64_t head_dim_, most_keys_, row_stride_, score_stride_;
  float *k_transposed_, *v_transposed_, *k_, *q_, *grad_, *q_panels_, *grad_panels_, *p_, *ds_;
  RowConstants* constants_;
  T* row_;
  float *dq_ = nullptr, *dk_ = nullptr, *dv_ = nullptr;  // sums
  Queries kept_{};                                       // of the whole problem
  float* is_kept_ = nullptr;  // at the first row of every block; null where nothing is kept
};

}  // namespace vitkit::cpu::VITKIT_ISA
