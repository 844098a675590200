// The arithmetic of attention forward on AMX tiles, for bfloat16: products of bfloat16 with float32
// sums, softmax in float32, probabilities rounded to bfloat16 for P V.
//
// Everything a tile instruction touches is stored tile by tile, 1 KiB each. The softmax costs more
// than the products here, so it works on 16 rows at once: one transposing reduction instead of 16
// horizontal ones.
#pragma once

#include "amx.h"

#if defined(VITKIT_AMX)

#include "amx_gemm.h"
#include "attention/forward.h"

namespace vitkit::cpu::VITKIT_ISA {

static_assert(kLanes == 16, "a vector is a row of a tile");

// 32 consecutive probabilities.
VITKIT_INLINE void store_pair(bf16* p, f32v low, f32v high) {
#if defined(__AVX512BF16__)
  const __m512bh h = _mm512_cvtne2ps_pbh(__m512(high), __m512(low));
  std::memcpy(p, &h, sizeof(h));
#else
  store(p, low);
  store(p + kLanes, high);
#endif
}

// ---- one block of queries and one chunk of keys ----

class AmxCompute {
 public:
  using Element = bf16;
  static constexpr int64_t kBlockRows = 2 * kTile;
  static constexpr int64_t kRowStep = kTile;
  static constexpr int64_t kKeyStep = kTileK;
  static constexpr int64_t kSweepKeys = kTileK;
  static constexpr int64_t kSingleChunk = 1024;
  static constexpr int64_t kChunk = 512;

  AmxCompute() = default;
  AmxCompute(Arena& arena, const WorkspaceSizes& sizes)
      : head_dim_(sizes.head_dim),
        depth_(divide_up(sizes.head_dim, kTileK)),
        columns_(divide_up(sizes.head_dim, kTile)),
        chunk_(sizes.chunk),
        q_(arena.take<bf16>(sizes.group_rows / kTile * depth_ * kTileSize)),
        k_(arena.take<bf16>(sizes.slots * k_size(head_dim_, chunk_))),
        v_(arena.take<bf16>(sizes.slots * v_size(head_dim_, chunk_))),
        scores_(arena.take<float>(2 * chunk_ / kTile * kTileSums)),
        p_(arena.take<bf16>(2 * chunk_ / kTileK * kTileSize)),
        out_(arena.take<float>(sizes.group_rows / kTile * columns_ * kTileSums)) {}

  static int64_t slot_bytes(int64_t head_dim, int64_t chunk) {
    return (k_size(head_dim, chunk) + v_size(head_dim, chunk)) * int64_t(sizeof(bf16));
  }

  // Tile (t, s): rows 16 t ... of the block, elements 32 s ... of the head.
  template <typename Map>
  void load_queries(const Map& map, const Block& b, bool negate) const {
    const u32v sign = u32v{} + (negate ? 0x80008000u : 0u);
    for (int64_t r = 0; r < divide_up(b.rows, kTile) * kTile; ++r) {
      const bf16* from = r < b.rows ? map.q_row(b.first_row + r) : nullptr;
      for (int64_t s = 0; s < depth_; ++s) {
        const u32v x =
            from ? u32v(load_dwords(from + s * kTileK, head_dim_ - s * kTileK)) ^ sign : u32v{};
        std::memcpy(q_tile(b.at + r) + s * kTileSize + r % kTile * kTileK, &x, sizeof(x));
      }
    }
  }

  // Keys [from, to) of the chunk; `from` is a multiple of kSweepKeys. Up to the next multiple they
  // are zero.
  template <typename Map>
  void pack_keys(const Map& map, const Chunk& c, int64_t from, int64_t to) const {
    for (int64_t j = from; j < to; j += kTile) pack_k(map, c, j);
    for (int64_t j = from; j < to; j += kTileK) pack_v(map, c, j);
  }

  template <typename Map, typename Term>
  void attend(const Map& map, const Term& term, const Block& b, const Chunk& c, float scale,
              float* shift, float* sum) const {
    const int64_t keys = visible(map, b.first_row + b.rows - 1, c);
    const int64_t row_tiles = divide_up(b.rows, kTile);
    for (int64_t t = 0; t < divide_up(keys, kTile); t += 2)
      tile_product(row_tiles, divide_up(keys, kTile) - t,
                   {q_tile(b.at), depth_ * kTileSize, k_slot(c) + t * depth_ * kTileSize,
                    depth_ * kTileSize, kTileSize, depth_, scores_ + t * kTileSums, score_row()},
                   false);
    for (int64_t t = 0; t < row_tiles; ++t)
      softmax(map, term,
              {b.first_row + t * kTile, smaller(kTile, b.rows - t * kTile), b.at + t * kTile}, c,
              keys, scale, scores_ + t * score_row(), p_ + t * p_row(), shift + t * kTile,
              sum + t * kTile);
    for (int64_t t = 0; t < columns_; t += 2)
      tile_product(row_tiles, columns_ - t,
                   {p_, p_row(), v_slot(c) + t * kTileSize, kTileSize, columns_ * kTileSize,
                    divide_up(keys, kTileK), out_tile(b.at) + t * kTileSums, columns_ * kTileSums},
                   !c.first);
  }

  void write_row(int64_t at, float factor, bf16* to) const {
    const float* from = out_tile(at) + at % kTile * kTile;
    for (int64_t t = 0; t < columns_; ++t)
      store_partial(to + t * kTile, load(from + t * kTileSums) * factor,
                    int(smaller(kTile, head_dim_ - t * kTile)));
  }

 private:
  static int64_t k_size(int64_t head_dim, int64_t chunk) {
    return chunk / kTile * divide_up(head_dim, kTileK) * kTileSize;
  }
  static int64_t v_size(int64_t head_dim, int64_t chunk) {
    return chunk / kTileK * divide_up(head_dim, kTile) * kTileSize;
  }
  bf16* k_slot(const Chunk& c) const { return k_ + c.slot * k_size(head_dim_, chunk_); }
  bf16* v_slot(const Chunk& c) const { return v_ + c.slot * v_size(head_dim_, chunk_); }
  bf16* q_tile(int64_t at) const { return q_ + at / kTile * depth_ * kTileSize; }
  float* out_tile(int64_t at) const { return out_ + at / kTile * columns_ * kTileSums; }
  int64_t score_row() const { return chunk_ / kTile * kTileSums; }
  int64_t p_row() const { return chunk_ / kTileK * kTileSize; }

  // 32 elements as 16 lanes, zero beyond `left`.
  static f32v load_dwords(const bf16* p, int64_t left) {
    f32v v = {};
    if (left >= kTileK)
      std::memcpy(&v, p, sizeof(v));
    else
      std::memcpy(&v, p, left * sizeof(bf16));
    return v;
  }

  // Tile (t, s) of K^T: pairs of elements of the head as rows, keys 16 t ... as columns.
  template <typename Map>
  void pack_k(const Map& map, const Chunk& c, int64_t j) const {
    const bf16* from[kTile];
    for (int r = 0; r < kTile; ++r)
      from[r] = j + r < c.keys ? map.k_row(c.first_key + j + r) : nullptr;
    bf16* to = k_slot(c) + j / kTile * depth_ * kTileSize;
    for (int64_t s = 0; s < depth_; ++s) {
      f32v v[kTile];
      for (int r = 0; r < kTile; ++r)
        v[r] = from[r] ? load_dwords(from[r] + s * kTileK, head_dim_ - s * kTileK) : f32v{};
      transpose16(v);
      for (int r = 0; r < kTile; ++r)
        std::memcpy(to + s * kTileSize + r * kTileK, &v[r], sizeof(v[r]));
    }
  }

  // Tile (t, s) of V: pairs of keys 32 t ... as rows, elements 16 s ... of the head as columns.
  template <typename Map>
  void pack_v(const Map& map, const Chunk& c, int64_t j) const {
    bf16* to = v_slot(c) + j / kTileK * columns_ * kTileSize;
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t key = j + 2 * r;
      const bf16* even = key < c.keys ? map.v_row(c.first_key + key) : nullptr;
      const bf16* odd = key + 1 < c.keys ? map.v_row(c.first_key + key + 1) : nullptr;
      for (int64_t s = 0; s < columns_; ++s) {
        const u32v pair = load_words(even, s) | load_words(odd, s) << 16;
        std::memcpy(to + s * kTileSize + r * kTileK, &pair, sizeof(pair));
      }
    }
  }

  // Elements 16 s ... of a row of the head (zero beyond its end, or without a row), one to a lane.
  u32v load_words(const bf16* row, int64_t s) const {
    u16v v = {};
    const int64_t left = head_dim_ - s * kTile;
    if (row && left >= kTile)
      std::memcpy(&v, row + s * kTile, sizeof(v));
    else if (row)
      std::memcpy(&v, row + s * kTile, left * sizeof(bf16));
    return __builtin_convertvector(v, u32v);
  }

  // 16 rows of scores become probabilities; `keys` of their columns are used by the product with V.
  template <typename Map, typename Term>
  void softmax(const Map& map, const Term& term, const Block& rows, const Chunk& c, int64_t keys,
               float scale, float* s, bf16* p, float* shift, float* sum) const {
    f32v v[kTile];
    for (int r = 0; r < kTile; ++r) {
      v[r] = splat(-INFINITY);
      if (r >= rows.rows) continue;
      const int64_t i = rows.first_row + r, n = visible(map, i, c);
      if constexpr (Term::kNone) {
        v[r] = column_max(s + r * kTile, n);
      } else {
        term.row(i, c.first_key, n,
                 [&](const auto& add) { v[r] = add_term(s + r * kTile, n, scale, add); });
      }
    }
    f32v top = reduce_rows(v, [](f32v a, f32v b) { return max(a, b); });
    if constexpr (Term::kNone) top = top == -INFINITY ? top : top * scale;
    const f32v before = c.first ? splat(-INFINITY) : load(shift);
    const f32v now = before > top ? before : top;
    store(shift, now);
    alignas(64) float offsets[kTile];
    store(offsets, finite_shift(now));
    for (int r = 0; r < kTile; ++r)
      v[r] = r < rows.rows
                 ? probabilities(s + r * kTile, p + r * kTileK, visible(map, rows.first_row + r, c),
                                 keys, Term::kNone ? scale : 1.f, offsets[r])
                 : f32v{};
    const f32v total = reduce_rows(v, [](f32v a, f32v b) { return a + b; });
    if (c.first) {
      store(sum, total);
      return;
    }
    const f32v rescale = exp2_softmax<5>(before - finite_shift(now));
    store(sum, load(sum) * rescale + total);
    store(offsets, rescale);
    for (int64_t r = 0; r < rows.rows; ++r)
      if (offsets[r] != 1.f) rescale_row(rows.at + r, offsets[r]);
  }

  static f32v column_max(const float* s, int64_t n) {
    f32v m = splat(-INFINITY);
    int64_t j = 0;
    for (; j + kTile <= n; j += kTile) m = max(m, load(s + j / kTile * kTileSums));
    if (j < n) m = max(m, keep_lanes(load(s + j / kTile * kTileSums), n - j, -INFINITY));
    return m;
  }

  template <typename Add>
  static f32v add_term(float* s, int64_t n, float scale, const Add& add) {
    f32v m = splat(-INFINITY);
    for (int64_t j = 0; j < n; j += kTile) {
      float* at = s + j / kTile * kTileSums;
      const int lanes = int(smaller(kTile, n - j));
      const f32v x = keep_lanes(add(load(at) * scale, j, lanes), lanes, -INFINITY);
      store(at, x);
      m = max(m, x);
    }
    return m;
  }

  // p[j] = 2^(s[j] * scale - offset) for j < n, 0 up to `keys` rounded up to whole tiles; returns
  // sums to add up.
  static f32v probabilities(const float* s, bf16* p, int64_t n, int64_t keys, float scale,
                            float offset) {
    const f32v c = splat(scale), shift = splat(-offset);
    f32v total = {};
    int64_t j = 0;
    for (; j + kTileK <= n; j += kTileK) {
      const float* at = s + j / kTile * kTileSums;
      const f32v low = exp2_softmax<3>(fma(load(at), c, shift));
      const f32v high = exp2_softmax<3>(fma(load(at + kTileSums), c, shift));
      store_pair(p + j / kTileK * kTileSize, low, high);
      total += low + high;
    }
    for (; j < keys; j += kTileK) {
      const float* at = s + j / kTile * kTileSums;
      f32v low = {}, high = {};
      if (j < n) low = keep_lanes(exp2_softmax<3>(fma(load(at), c, shift)), n - j, 0.f);
      if (j + kTile < n)
        high = keep_lanes(exp2_softmax<3>(fma(load(at + kTileSums), c, shift)), n - j - kTile, 0.f);
      store_pair(p + j / kTileK * kTileSize, low, high);
      total += low + high;
    }
    return total;
  }

  void rescale_row(int64_t at, float factor) const {
    float* row = out_tile(at) + at % kTile * kTile;
    for (int64_t t = 0; t < columns_; ++t)
      store(row + t * kTileSums, load(row + t * kTileSums) * factor);
  }

  // depth_, columns_: of a head, in tiles of 32 and 16.
  int64_t head_dim_, depth_, columns_, chunk_;
  bf16 *q_, *k_, *v_;
  float* scores_;
  bf16* p_;
  float* out_;
};

}  // namespace vitkit::cpu::VITKIT_ISA

#endif  // VITKIT_AMX
