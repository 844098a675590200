// The arithmetic of attention forward in float32, for any element type (converted while packing).
// S = Q K^T, one softmax pass over each row of S, O += P V; matrix products on packed panels
// (gemm.h).
#pragma once

#include "attention/forward.h"
#include "attention/pack.h"
#include "lanes.h"

namespace vitkit::cpu::VITKIT_ISA {

template <typename T>
class Float32Compute {
 public:
  using Element = T;
  static constexpr int64_t kRowStep = kTileRows;
  static constexpr int64_t kKeyStep = kPanel;
  static constexpr int64_t kSweepKeys = kPanel;
  static constexpr int64_t kBlockRows =
      48 / kTileRows * kTileRows;               // S of a block and K stay in a 512 KiB cache
  static constexpr int64_t kSingleChunk = 640;  // ViT-L/14 at 336 pixels has 577 tokens
  static constexpr int64_t kChunk = 512;

  Float32Compute() = default;
  Float32Compute(Arena& arena, const WorkspaceSizes& sizes)
      : head_dim_(sizes.head_dim),
        chunk_(sizes.chunk),
        score_stride_(sizes.chunk + kPanel),  // not a power of two: rows would share cache sets
        out_stride_(num_panels(sizes.head_dim) * kPanel),
        q_(arena.take<float>(sizes.group_rows * head_dim_)),
        k_(arena.take<float>(sizes.slots * panels_size(chunk_, head_dim_))),
        v_(arena.take<float>(sizes.slots * panels_size(head_dim_, chunk_))),
        scores_(arena.take<float>((kBlockRows + 1) * score_stride_)),
        out_(arena.take<float>(sizes.group_rows * out_stride_)),
        rescale_(arena.take<float>(kBlockRows + kLanes)) {}

  static int64_t slot_bytes(int64_t head_dim, int64_t chunk) {
    return (panels_size(chunk, head_dim) + panels_size(head_dim, chunk)) * int64_t(sizeof(float));
  }

  template <typename Map>
  void load_queries(const Map& map, const Block& b, bool negate) const {
    pack_rows<T>([&](int64_t i) { return map.q_row(i); }, b.first_row, b.rows, head_dim_,
                 negate ? -1.f : 1.f, q_ + b.at * head_dim_, head_dim_);
  }

  // Keys [from, to) of the chunk; `from` is a multiple of kSweepKeys.
  template <typename Map>
  void pack_keys(const Map& map, const Chunk& c, int64_t from, int64_t to) const {
    pack_transposed<T>([&](int64_t j) { return map.k_row(j); }, c.first_key + from, to - from,
                       head_dim_, k_slot(c) + from * head_dim_);
    pack_panels<T>([&](int64_t j) { return map.v_row(j); }, c.first_key + from, to - from,
                   head_dim_, v_slot(c) + from * kPanel, c.keys);
  }

  template <typename Map, typename Term>
  void attend(const Map& map, const Term& term, const Block& b, const Chunk& c, float scale,
              float* shift, float* sum) const {
    score(map, b, c);
    softmax(map, term, b, c, scale, shift, sum);
    if (c.first)
      accumulate<Epilogue::overwrite>(map, b, c);
    else
      accumulate<Epilogue::scale_accumulate>(map, b, c);
  }

  void write_row(int64_t at, float factor, T* to) const {
    VITKIT_ISA::write_row(out_ + at * out_stride_, head_dim_, factor, to);
  }

 private:
  float* k_slot(const Chunk& c) const { return k_ + c.slot * panels_size(chunk_, head_dim_); }
  float* v_slot(const Chunk& c) const { return v_ + c.slot * panels_size(head_dim_, chunk_); }

  // Keys that some row of the tile from row r of the block on attends.
  template <typename Map>
  static int64_t tile_keys(const Map& map, const Block& b, int64_t r, const Chunk& c) {
    return visible(map, b.first_row + smaller(r + kTileRows, b.rows) - 1, c);
  }

  template <typename Map>
  void score(const Map& map, const Block& b, const Chunk& c) const {
    for (int64_t p = 0; p < num_panels(c.keys); ++p) {
      const int vecs = panel_vecs(c.keys, p);
      for (int64_t r = 0; r < b.rows; r += kTileRows) {
        if (tile_keys(map, b, r, c) <= p * kPanel) continue;
        fetch_ahead(map);
        gemm_rows<false, Epilogue::overwrite>(
            smaller(kTileRows, b.rows - r), vecs, head_dim_, q_ + (b.at + r) * head_dim_, head_dim_,
            k_slot(c) + p * kPanel * head_dim_, scores_ + r * score_stride_ + p * kPanel,
            score_stride_);
      }
    }
  }

  // Scores become probabilities relative to the row's shift, a vector of rows at a time: maxima and
  // sums over lanes are then taken together. Two loops: with all maxima known beforehand the
  // exponentials of consecutive rows overlap.
  template <typename Map, typename Term>
  void softmax(const Map& map, const Term& term, const Block& b, const Chunk& c, float scale,
               float* shift, float* sum) const {
    for (int64_t r = 0; r < b.rows; r += kLanes) {
      const int rows = int(smaller(kLanes, b.rows - r));
      f32v v[kLanes];
      for (int l = 0; l < kLanes; ++l)
        v[l] = l < rows ? scaled_max(map, term, b, r + l, c, scale) : f32v{};
      f32v top = reduce_rows(v, [](f32v x, f32v y) { return max(x, y); });
      if constexpr (Term::kNone) top = top == -INFINITY ? top : top * splat(scale);
      const f32v before = c.first ? splat(-INFINITY) : load_partial(shift + r, rows);
      const f32v now = before > top ? before : top;
      store_partial(shift + r, now, rows);
      if (!c.first) store(rescale_ + r, exp2_softmax<5>(before - finite_shift(now)));
    }
    for (int64_t r = 0; r < b.rows; r += kLanes) {
      const int rows = int(smaller(kLanes, b.rows - r));
      f32v v[kLanes];
      for (int l = 0; l < kLanes; ++l)
        v[l] = l < rows ? exponentials<Term::kNone>(map, b, r + l, c, scale, shift[r + l]) : f32v{};
      f32v total = reduce_rows(v, [](f32v x, f32v y) { return x + y; });
      if (!c.first) total = fma(load_partial(sum + r, rows), load(rescale_ + r), total);
      store_partial(sum + r, total, rows);
    }
    rescale_[b.rows] = 0.f;  // read when a tile has one row more than the block
  }

  // Adds the term to row r of the block; returns the maximum, still to be taken over lanes.
  template <typename Map, typename Term>
  f32v scaled_max(const Map& map, const Term& term, const Block& b, int64_t r, const Chunk& c,
                  float scale) const {
    float* s = scores_ + r * score_stride_;
    const int64_t i = b.first_row + r, keys = visible(map, i, c);
    if constexpr (Term::kNone) {
      return row_max(s, keys);
    } else {
      f32v top = splat(-INFINITY);
      term.row(i, c.first_key, keys, [&](const auto& add) {
        top = row_map_max(
            s, keys, [&](f32v x, int64_t j, int lanes) { return add(x * splat(scale), j, lanes); });
      });
      return top;
    }
  }

  template <bool kScale, typename Map>
  f32v exponentials(const Map& map, const Block& b, int64_t r, const Chunk& c, float scale,
                    float shift) const {
    constexpr int kDegree = std::is_same_v<T, float> ? 5 : 4;
    return row_exp<kDegree>(scores_ + r * score_stride_, visible(map, b.first_row + r, c),
                            tile_keys(map, b, r - r % kTileRows, c), kScale ? scale : 1.f,
                            finite_shift(shift));
  }

  template <Epilogue kEpilogue, typename Map>
  void accumulate(const Map& map, const Block& b, const Chunk& c) const {
    for (int64_t p = 0; p < num_panels(head_dim_); ++p) {
      const int vecs = panel_vecs(head_dim_, p);
      for (int64_t r = 0; r < b.rows; r += kTileRows) {
        const int64_t keys = tile_keys(map, b, r, c);
        if (kEpilogue != Epilogue::overwrite && keys == 0) continue;
        fetch_ahead(map);
        gemm_rows<false, kEpilogue>(
            smaller(kTileRows, b.rows - r), vecs, keys, scores_ + r * score_stride_, score_stride_,
            v_slot(c) + p * kPanel * c.keys, out_ + (b.at + r) * out_stride_ + p * kPanel,
            out_stride_, rescale_ + r);
      }
    }
  }

  int64_t head_dim_, chunk_, score_stride_, out_stride_;
  float *q_, *k_, *v_, *scores_, *out_, *rescale_;
};

}  // namespace vitkit::cpu::VITKIT_ISA
