// The arithmetic of the attention gradient on AMX tiles, for bfloat16: products of bfloat16 with
// float32 sums, P and dS in float32, rounded to bfloat16 for the products they enter.
//
// P and dS are never transposed: dV and dK are summed as dV^T = dO^T P and dK^T = Q^T dS, where
// they are right operands (two rows of scores side by side), and turned around when they are
// written. A block of queries passes along strips of 32 keys, so that between the first products
// and the last a strip of scores stays in the first-level cache.
#pragma once

#include "attention/forward_amx.h"

#if defined(VITKIT_AMX)

#include "attention/backward.h"

namespace vitkit::cpu::VITKIT_ISA {

// 16 lanes of `even` and of `odd`, rounded and interleaved: row r of a right operand from rows 2r
// and 2r + 1.
VITKIT_INLINE void store_interleaved(bf16* p, f32v even, f32v odd) {
  bf16 row[kTileK];
  store_pair(row, even, odd);
  u16v low, high;
  std::memcpy(&low, row, sizeof(low));
  std::memcpy(&high, row + kTile, sizeof(high));
  const u32v pairs = __builtin_convertvector(low, u32v) | __builtin_convertvector(high, u32v) << 16;
  std::memcpy(p, &pairs, sizeof(pairs));
}

// Rows of a head as tiles; row(i) is null where there is none, elements beyond the head are zero.
class TilePacker {
 public:
  explicit TilePacker(int64_t head_dim)
      : head_dim_(head_dim),
        depth_(divide_up(head_dim, kTileK)),
        columns_(divide_up(head_dim, kTile)) {}

  // Left operand: tile (t, s) has rows 16 t ..., elements 32 s ... of the head.
  template <typename Row>
  void rows(const Row& row, int64_t n, bf16* to) const {
    for (int64_t r = 0; r < divide_up(n, kTile) * kTile; ++r) {
      const bf16* from = row(r);
      for (int64_t s = 0; s < depth_; ++s) {
        const f32v x = from ? dwords(from, s) : f32v{};
        std::memcpy(to + (r / kTile * depth_ + s) * kTileSize + r % kTile * kTileK, &x, sizeof(x));
      }
    }
  }

  // Right operand of a product over the head: tile (t, s) has pairs of elements 32 s ... as rows,
  // rows 16 t ... as columns.
  template <typename Row>
  void columns(const Row& row, int64_t n, bf16* to) const {
    for (int64_t t = 0; t < divide_up(n, kTile); ++t)
      for (int64_t s = 0; s < depth_; ++s) {
        f32v v[kTile];
        for (int r = 0; r < kTile; ++r) {
          const bf16* from = row(t * kTile + r);
          v[r] = from ? dwords(from, s) : f32v{};
        }
        transpose16(v);
        std::memcpy(to + (t * depth_ + s) * kTileSize, v, sizeof(v));
      }
  }

  // Operands of a product over rows. As a right operand, tile (t, s) has pairs of rows 32 t ... as
  // rows, elements 16 s ... as columns; transposed, as a left operand, tile (s, t) has elements 16
  // s ... as rows, rows 32 t ... as columns.
  template <typename Row>
  void pairs(const Row& row, int64_t n, bf16* right, bf16* left) const {
    const int64_t steps = divide_up(n, kTileK);
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t s = 0; s < columns_; ++s) {
        f32v v[kTile];
        for (int r = 0; r < kTile; ++r)
          v[r] =
              f32v(words(row(t * kTileK + 2 * r), s) | words(row(t * kTileK + 2 * r + 1), s) << 16);
        if (right) std::memcpy(right + (t * columns_ + s) * kTileSize, v, sizeof(v));
        if (!left) continue;
        transpose16(v);
        std::memcpy(left + (s * steps + t) * kTileSize, v, sizeof(v));
      }
  }

 private:
  // 32 elements as 16 lanes.
  f32v dwords(const bf16* row, int64_t s) const {
    f32v v = {};
    const int64_t left = head_dim_ - s * kTileK;
    if (left >= kTileK)
      std::memcpy(&v, row + s * kTileK, sizeof(v));
    else
      std::memcpy(&v, row + s * kTileK, left * sizeof(bf16));
    return v;
  }

  // 16 elements, one to a lane.
  u32v words(const bf16* row, int64_t s) const {
    u16v v = {};
    const int64_t left = head_dim_ - s * kTile;
    if (row && left >= kTile)
      std::memcpy(&v, row + s * kTile, sizeof(v));
    else if (row)
      std::memcpy(&v, row + s * kTile, left * sizeof(bf16));
    return __builtin_convertvector(v, u32v);
  }

  int64_t head_dim_, depth_, columns_;
};

class AmxGradient {
 public:
  using Element = bf16;
  static constexpr int64_t kBlockRows = 64;
  static constexpr int64_t kRowStep = kTileK;
  static constexpr int64_t kKeyStep = kTileK;

  // Packed keys (6 bytes an element) and their sums (8) fit half of a 2 MiB L2 cache.
  static int64_t most_keys(int64_t head_dim) {
    constexpr int64_t kBytes = 1 << 20, kMost = 1024;
    const int64_t keys = kBytes / (14 * head_dim) / kTileK * kTileK;
    return keys > kMost ? kMost : keys;
  }

  static int64_t sums_floats(int64_t head_dim, int64_t nq, int64_t nk) {
    return (divide_up(nq, kTile) + 4 * divide_up(nk, kTileK)) * divide_up(head_dim, kTile) *
           kTileSums;
  }

  AmxGradient(Arena& arena, int64_t head_dim, int64_t keys)
      : head_dim_(head_dim),
        depth_(divide_up(head_dim, kTileK)),
        columns_(divide_up(head_dim, kTile)),
        strips_(divide_up(keys, kTileK)),
        k_(arena.take<bf16>(2 * strips_ * depth_ * kTileSize)),
        v_(arena.take<bf16>(2 * strips_ * depth_ * kTileSize)),
        k_pairs_(arena.take<bf16>(strips_ * columns_ * kTileSize)),
        q_(arena.take<bf16>(kRowTiles * depth_ * kTileSize)),
        grad_(arena.take<bf16>(kRowTiles * depth_ * kTileSize)),
        q_transposed_(arena.take<bf16>(kRowTiles / 2 * columns_ * kTileSize)),
        grad_transposed_(arena.take<bf16>(kRowTiles / 2 * columns_ * kTileSize)),
        scores_(arena.take<float>(kRowTiles * kStripSums)),
        dp_(arena.take<float>(kRowTiles * kStripSums)),
        p_pairs_(arena.take<bf16>(kRowTiles * kTileSize)),
        ds_pairs_(arena.take<bf16>(kRowTiles * kTileSize)),
        ds_(arena.take<bf16>(kRowTiles * strips_ * kTileSize)),
        constants_(arena.take<RowConstants>(kBlockRows)),
        rows_(arena.take<bf16>(kBlockRows * head_dim)) {}

  void attach(float* sums, int64_t nq, int64_t nk) {
    dq_ = sums;
    dk_ = dq_ + divide_up(nq, kTile) * columns_ * kTileSums;
    dv_ = dk_ + divide_up(nk, kTileK) * columns_ * kStripSums;
  }

  void clear_queries(int64_t first, int64_t n) const {
    const int64_t tile = columns_ * kTileSums;
    std::memset(dq_ + first / kTile * tile, 0, size_t(divide_up(n, kTile) * tile) * sizeof(float));
  }
  void clear_keys(int64_t first, int64_t n) const {
    const int64_t strip = columns_ * kStripSums;
    const size_t bytes = size_t(divide_up(n, kTileK) * strip) * sizeof(float);
    std::memset(dk_ + first / kTileK * strip, 0, bytes);
    std::memset(dv_ + first / kTileK * strip, 0, bytes);
  }

  template <typename Map>
  void write_queries(const Map& map, int64_t first, int64_t n, float scale) const {
    for (int64_t i = first; i < first + n; ++i)
      for (int64_t s = 0; s < columns_; ++s)
        write(load(dq_ + (i / kTile * columns_ + s) * kTileSums + i % kTile * kTile) * scale, s,
              map.dq_row(i));
  }
  template <typename Map>
  void write_keys(const Map& map, int64_t first, int64_t n, float scale) const {
    for (int64_t j = first; j < first + n; j += kTile)
      for (int64_t s = 0; s < columns_; ++s) {
        write_turned(dk_, j, s, first + n - j, scale, [&](int64_t key) { return map.dk_row(key); });
        write_turned(dv_, j, s, first + n - j, 1.f, [&](int64_t key) { return map.dv_row(key); });
      }
  }

  template <typename Map>
  void pack_keys(const Map& map, int64_t first, int64_t n) const {
    const TilePacker packer(head_dim_);
    const auto k = [&](int64_t j) { return j < n ? map.k_row(first + j) : nullptr; };
    packer.columns(k, n, k_);
    packer.columns([&](int64_t j) { return j < n ? map.v_row(first + j) : nullptr; }, n, v_);
    packer.pairs(k, n, k_pairs_, nullptr);
  }

  template <typename Map, typename Term, typename Sink>
  void block(const Map& map, const Term& term, const Sink& sink, GradBlock b, float scale) const {
    pack_queries(map, b);
    const int64_t keys = visible(map, b, b.rows - 1);
    if constexpr (Sink::kExactDelta) sum_delta(map, term, b, keys, scale);
    for (int64_t t = 0; t < divide_up(keys, kTileK); ++t) {
      const int64_t columns = smaller(2, divide_up(keys, kTile) - 2 * t);
      products(map, b, t, columns);
      differentiate(map, term, sink, b, t, columns, scale);
      add_to_keys(b, t, columns, grad_transposed_, p_pairs_, dv_);
      add_to_keys(b, t, columns, q_transposed_, ds_pairs_, dk_);
    }
    add_to_queries(b, keys);
  }

 private:
  static constexpr int64_t kRowTiles = kBlockRows / kTile;
  static constexpr int64_t kStripSums = 2 * kTileSums;

  template <typename To>
  void write(f32v x, int64_t s, To row) const {
    store_partial(row + s * kTile, x, int(smaller(kTile, head_dim_ - s * kTile)));
  }

  // The first n columns of tile (s, j) of transposed sums.
  template <typename Row>
  void write_turned(const float* sums, int64_t j, int64_t s, int64_t n, float factor,
                    const Row& row) const {
    const float* tile =
        sums + (j / kTileK * columns_ + s) * kStripSums + j % kTileK / kTile * kTileSums;
    f32v v[kTile];
    for (int r = 0; r < kTile; ++r) v[r] = load(tile + r * kTile) * factor;
    transpose16(v);
    for (int r = 0; r < kTile && r < n; ++r) write(v[r], s, row(j + r));
  }

  template <typename Map>
  void pack_queries(const Map& map, const GradBlock& b) const {
    const TilePacker packer(head_dim_);
    const bf16* grad_rows[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) {
      grad_rows[r] = r < b.rows ? map.grad_row(b.q0 + r, rows_ + r * head_dim_) : nullptr;
      constants_[r] = r < b.rows ? row_constants(map, b.q0 + r, grad_rows[r], head_dim_)
                                 : RowConstants{INFINITY, 0.f, 0.f};
    }
    const auto q = [&](int64_t r) { return r < b.rows ? map.q_row(b.q0 + r) : nullptr; };
    const auto grad = [&](int64_t r) { return grad_rows[r]; };
    packer.rows(q, b.rows, q_);
    packer.rows(grad, b.rows, grad_);
    packer.pairs(q, b.rows, nullptr, q_transposed_);
    packer.pairs(grad, b.rows, nullptr, grad_transposed_);
  }

  // S and dP of the block with the strip of keys t.
  template <typename Map>
  void products(const Map& map, GradBlock& b, int64_t t, int64_t columns) const {
    const int64_t row_tiles = divide_up(b.rows, kTile);
    for (int64_t r = 0; r < row_tiles; r += 2) {
      b.fetch_ahead(map);
      products(r, row_tiles - r, t, columns, q_, k_, scores_);
      products(r, row_tiles - r, t, columns, grad_, v_, dp_);
    }
  }

  // delta as the sum of P dP over a row, all of whose keys are in this block. Scores are kept for
  // one strip only, so they are computed twice.
  template <typename Map, typename Term>
  void sum_delta(const Map& map, const Term& term, GradBlock& b, int64_t keys, float scale) const {
    float totals[kBlockRows] = {}, sums[kBlockRows] = {};
    for (int64_t t = 0; t < divide_up(keys, kTileK); ++t) {
      const int64_t columns = smaller(2, divide_up(keys, kTile) - 2 * t);
      products(map, b, t, columns);
      for (int64_t i = 0; i < b.rows; ++i) {
        const int64_t n = visible(map, b, i) - t * kTileK;
        if (n <= 0) continue;
        f32v total = {}, sum = {};
        term.row(b.q0 + i, b.k0 + t * kTileK, smaller(n, kTileK), [&](const auto& add) {
          for (int64_t h = 0; h < columns && h * kTile < n; ++h) {
            const f32v p = probability(i, h, n - h * kTile, scale * kLog2e, add);
            total += p;
            sum += keep_lanes(p * load(dp_ + score_at(i, h)), n - h * kTile, 0.f);
          }
        });
        totals[i] += reduce_add(total);
        sums[i] += reduce_add(sum);
      }
    }
    for (int64_t i = 0; i < b.rows; ++i)
      if (totals[i] != 0.f) constants_[i].delta = sums[i] / totals[i] - map.grad_lse(b.q0 + i);
  }

  // Scores of up to two tiles of rows with the strip of keys t.
  void products(int64_t r, int64_t rows, int64_t t, int64_t columns, const bf16* left,
                const bf16* right, float* to) const {
    tile_product(
        rows, columns,
        {left + r * depth_ * kTileSize, depth_ * kTileSize, right + 2 * t * depth_ * kTileSize,
         depth_ * kTileSize, kTileSize, depth_, to + r * kStripSums, kStripSums},
        false);
  }

  // P and dS of a strip, into both operand layouts. Rows come in pairs; those beyond the block, up
  // to what the products over rows read, and keys that a row does not attend are zero.
  template <typename Map, typename Term, typename Sink>
  void differentiate(const Map& map, const Term& term, const Sink& sink, const GradBlock& b,
                     int64_t t, int64_t columns, float scale) const {
    for (int64_t r = 0; r < divide_up(b.rows, kTileK) * kTileK; r += 2) {
      f32v p[2][2] = {}, ds[2][2] = {};
      for (int64_t i = r; i < r + 2 && i < b.rows; ++i) {
        const int64_t n = visible(map, b, i) - t * kTileK;
        if (n <= 0) continue;
        const auto row = [&](const auto& add) {
          for (int64_t h = 0; h < columns; ++h)
            differentiate(i, h, n - h * kTile, scale * kLog2e, add, &p[i - r][h], &ds[i - r][h]);
        };
        if constexpr (Term::kNone)
          row([](f32v x, int64_t, int) { return x; });
        else
          term.row(b.q0 + i, b.k0 + t * kTileK, smaller(n, kTileK), row);
        if constexpr (!Sink::kNone)
          give(sink, b.q0 + i, b.k0 + t * kTileK, smaller(n, kTileK), ds[i - r]);
      }
      for (int h = 0; h < 2; ++h) {
        const int64_t at = (r / kTileK * 2 + h) * kTileSize + r % kTileK / 2 * kTileK;
        store_interleaved(p_pairs_ + at, p[0][h], p[1][h]);
        store_interleaved(ds_pairs_ + at, ds[0][h], ds[1][h]);
      }
      if (r >= divide_up(b.rows, kTile) * kTile) continue;
      bf16* left = ds_ + (r / kTile * strips_ + t) * kTileSize + r % kTile * kTileK;
      store_pair(left, ds[0][0], ds[0][1]);
      store_pair(left + kTileK, ds[1][0], ds[1][1]);
    }
  }

  // 16 scores of row i, of which the first n count.
  template <typename Add>
  void differentiate(int64_t i, int64_t h, int64_t n, float scale, const Add& add, f32v* p,
                     f32v* ds) const {
    if (n <= 0) return;
    *p = probability(i, h, n, scale, add);
    *ds = *p * (load(dp_ + score_at(i, h)) - splat(constants_[i].delta));
    if (n < kTile) *ds = keep_lanes(*ds, n, 0.f);
  }

  template <typename Add>
  f32v probability(int64_t i, int64_t h, int64_t n, float scale, const Add& add) const {
    const f32v scaled = load(scores_ + score_at(i, h)) * splat(scale);
    f32v x = add(scaled, h * kTile, int(smaller(n, kTile))) - splat(constants_[i].shift);
    if (n < kTile) x = keep_lanes(x, n, -INFINITY);
    return exp2_softmax<3>(x);
  }

  static int64_t score_at(int64_t i, int64_t h) {
    return i / kTile * kStripSums + h * kTileSums + i % kTile * kTile;
  }

  template <typename Sink>
  static void give(const Sink& sink, int64_t i, int64_t j, int64_t n, f32v* ds) {
    float row[kTileK];
    store(row, ds[0]);
    store(row + kTile, ds[1]);
    sink.add(i, j, n, row);
    if constexpr (Sink::kChanges) {
      ds[0] = load(row);
      ds[1] = load(row + kTile);
    }
  }

  // (transposed sums of strip t) += left * right, over the rows of the block
  void add_to_keys(const GradBlock& b, int64_t t, int64_t columns, const bf16* left,
                   const bf16* right, float* sums) const {
    const int64_t steps = divide_up(b.rows, kTileK);
    float* to = sums + (b.k0 / kTileK + t) * columns_ * kStripSums;
    for (int64_t s = 0; s < columns_; s += 2)
      tile_product(columns_ - s, columns,
                   {left + s * steps * kTileSize, steps * kTileSize, right, kTileSize,
                    2 * kTileSize, steps, to + s * kStripSums, kStripSums},
                   true);
  }

  // dQ += dS K
  void add_to_queries(const GradBlock& b, int64_t keys) const {
    const int64_t row_tiles = divide_up(b.rows, kTile);
    for (int64_t r = 0; r < row_tiles; r += 2)
      for (int64_t s = 0; s < columns_; s += 2)
        tile_product(row_tiles - r, columns_ - s,
                     {ds_ + r * strips_ * kTileSize, strips_ * kTileSize, k_pairs_ + s * kTileSize,
                      kTileSize, columns_ * kTileSize, divide_up(keys, kTileK),
                      dq_ + ((b.q0 / kTile + r) * columns_ + s) * kTileSums, columns_ * kTileSums},
                     true);
  }

  // depth_, columns_: of a head, in tiles of 32 and 16.
  int64_t head_dim_, depth_, columns_, strips_;
  bf16 *k_, *v_, *k_pairs_, *q_, *grad_, *q_transposed_, *grad_transposed_;
  float *scores_, *dp_;  // of one strip
  bf16 *p_pairs_, *ds_pairs_, *ds_;
  RowConstants* constants_;
  bf16* rows_;
  // Sums; those of dK and dV transposed, strip by strip.
  float *dq_ = nullptr, *dk_ = nullptr, *dv_ = nullptr;
};

}  // namespace vitkit::cpu::VITKIT_ISA

#endif  // VITKIT_AMX
