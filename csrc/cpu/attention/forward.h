// Attention forward in float32 arithmetic, for any element type, token map and score term.
//
// A block of queries meets a chunk of keys: S = Q K^T, one softmax pass over each row of S, O += P V, with K and V packed
// into panels once per chunk. Up to kSingleChunk keys there is one chunk and the softmax is exact in one go; beyond that
// running maximum and sum are rescaled from chunk to chunk. Memory is bounded whatever the number of keys: packed keys
// are kept for all query blocks when they fit kResidentBytes, otherwise a group of query blocks shares each packing.
#pragma once

#include "attention/arena.h"
#include "attention/pack.h"
#include "attention/score_term.h"
#include "attention/token_map.h"

namespace vitkit::cpu::VITKIT_ISA {

constexpr int64_t kBlockRows = 48;       // S of a block (48 x 640 floats) and one chunk of K or V fit a 512 KiB L2
constexpr int64_t kSingleChunk = 640;    // ViT-L/14 at 336 pixels has 577 tokens
constexpr int64_t kChunk = 512;
constexpr int64_t kGroupBlocks = 8;      // query blocks per packing of a chunk that does not stay resident
constexpr int64_t kResidentBytes = 4 << 20;

// Where a problem of nq queries and nk keys is cut. Depends on nothing else, so results do not depend on the number of
// threads or on the other problems of the batch.
struct Tiling {
  int64_t block_rows, blocks, chunk, chunks;

  Tiling(int64_t nq, int64_t nk) {
    blocks = (nq + kBlockRows - 1) / kBlockRows;
    block_rows = blocks ? round_up((nq + blocks - 1) / blocks, kTileRows) : 0;
    blocks = blocks ? (nq + block_rows - 1) / block_rows : 0;
    chunks = nk <= kSingleChunk ? nk > 0 : (nk + kChunk - 1) / kChunk;
    chunk = chunks ? round_up((nk + chunks - 1) / chunks, kPanel) : 0;
  }
};

constexpr int64_t kMaxBlockRows = (kBlockRows + kTileRows - 1) / kTileRows * kTileRows;

struct ForwardWorkspace {
  int64_t head_dim, score_stride, out_stride, slots;
  float *q, *scores, *k, *v, *out, *shift, *sum, *rescale;

  // For problems of at most max_nk keys.
  ForwardWorkspace(char* base, int64_t head_dim, int64_t max_nk) : head_dim(head_dim) {
    const Tiling widest(1, max_nk);
    const int64_t chunk = max_nk <= kSingleChunk ? widest.chunk : kSingleChunk;
    const int64_t slot_bytes = (panels_size(chunk, head_dim) + panels_size(head_dim, chunk)) * int64_t(sizeof(float));
    slots = widest.chunks * slot_bytes <= kResidentBytes ? widest.chunks : 1;
    score_stride = chunk + kPanel;  // not a power of two: rows would share cache sets
    out_stride = num_panels(head_dim) * kPanel;
    Arena arena{base};
    q = arena.take<float>(kMaxBlockRows * head_dim);
    scores = arena.take<float>(kMaxBlockRows * score_stride);
    k = arena.take<float>(slots * panels_size(chunk, head_dim));
    v = arena.take<float>(slots * panels_size(head_dim, chunk));
    out = arena.take<float>(kGroupBlocks * kMaxBlockRows * out_stride);
    shift = arena.take<float>(kGroupBlocks * kMaxBlockRows);
    sum = arena.take<float>(kGroupBlocks * kMaxBlockRows);
    rescale = arena.take<float>(kMaxBlockRows + kLanes);
    bytes = arena.next - base;
  }
  int64_t bytes;
};

template <typename T, typename Map, typename Term>
class Forward {
 public:
  Forward(const Map& map, const Term& term, float scale, const ForwardWorkspace& workspace)
      : map_(map),
        term_(term),
        tiling_(map.nq, map.nk),
        // A negative scale changes the sign of Q, which is exact: the row maximum is then that of the scaled scores.
        sign_(scale < 0 ? -1.f : 1.f),
        scale_((scale < 0 ? -scale : scale) * kLog2e),
        w_(workspace) {}

  // Query blocks [begin, end) of `block_at`'s order, every chunk of keys.
  void run(int64_t begin, int64_t end) const {
    const bool resident = tiling_.chunks <= w_.slots;
    for (int64_t group = begin; group < end; group += kGroupBlocks) {
      const int64_t group_end = group + kGroupBlocks < end ? group + kGroupBlocks : end;
      for (int64_t c = 0; c < tiling_.chunks; ++c) {
        const int64_t slot = resident ? c : 0;
        if (group == begin || !resident) pack_chunk(c, slot);
        for (int64_t b = group; b < group_end; ++b) attend(b - group, block_at(b), c, slot);
      }
      for (int64_t b = group; b < group_end; ++b) finish(b - group, block_at(b));
    }
  }

 private:
  // Causal blocks cost more the later they are: first, last, second, last but one, ... spreads them over threads.
  int64_t block_at(int64_t position) const {
    if (!map_.causal) return position;
    return position % 2 ? tiling_.blocks - 1 - position / 2 : position / 2;
  }

  int64_t rows_of(int64_t block) const {
    const int64_t left = map_.nq - block * tiling_.block_rows;
    return left < tiling_.block_rows ? left : tiling_.block_rows;
  }

  int64_t chunk_keys(int64_t c) const {
    const int64_t left = map_.nk - c * tiling_.chunk;
    return left < tiling_.chunk ? left : tiling_.chunk;
  }

  // Of the n keys from first_key on, those that query i attends.
  int64_t visible(int64_t i, int64_t first_key, int64_t n) const {
    if (!map_.causal) return n;
    const int64_t keys = i + 1 - first_key;
    return keys < 0 ? 0 : (keys < n ? keys : n);
  }

  float* k_slot(int64_t slot) const { return w_.k + slot * panels_size(tiling_.chunk, w_.head_dim); }
  float* v_slot(int64_t slot) const { return w_.v + slot * panels_size(w_.head_dim, tiling_.chunk); }

  void pack_chunk(int64_t c, int64_t slot) const {
    const int64_t first = c * tiling_.chunk, n = chunk_keys(c);
    pack_transposed<T>([this](int64_t j) { return map_.k_row(j); }, first, n, w_.head_dim, k_slot(slot));
    pack_panels<T>([this](int64_t j) { return map_.v_row(j); }, first, n, w_.head_dim, v_slot(slot));
  }

  void attend(int64_t in_group, int64_t block, int64_t c, int64_t slot) const {
    const int64_t first_row = block * tiling_.block_rows, rows = rows_of(block);
    const int64_t first_key = c * tiling_.chunk, n = chunk_keys(c);
    if (visible(first_row + rows - 1, first_key, n) == 0) return;
    pack_rows<T>([this](int64_t i) { return map_.q_row(i); }, first_row, rows, w_.head_dim, sign_, w_.q, w_.head_dim);
    score(first_row, rows, first_key, n, k_slot(slot));
    softmax(in_group, first_row, rows, first_key, n, c == 0);
    if (c == 0)
      accumulate<Epilogue::overwrite>(in_group, first_row, rows, first_key, n, v_slot(slot));
    else
      accumulate<Epilogue::scale_accumulate>(in_group, first_row, rows, first_key, n, v_slot(slot));
  }

  void score(int64_t first_row, int64_t rows, int64_t first_key, int64_t n, const float* k) const {
    const int64_t d = w_.head_dim;
    for (int64_t p = 0; p < num_panels(n); ++p) {
      const int vecs = panel_vecs(n, p);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t tile = rows - r < kTileRows ? rows - r : kTileRows;
        if (visible(first_row + r + tile - 1, first_key, n) <= p * kPanel) continue;
        gemm_rows<false, Epilogue::overwrite>(tile, vecs, d, w_.q + r * d, d, k + p * kPanel * d,
                                              w_.scores + r * w_.score_stride + p * kPanel, w_.score_stride);
      }
    }
  }

  // Scores become probabilities relative to the row's shift (its maximum so far, in base-2 units). Two loops: with all
  // maxima known beforehand the exponentials of consecutive rows overlap.
  void softmax(int64_t in_group, int64_t first_row, int64_t rows, int64_t first_key, int64_t n, bool first) const {
    constexpr int kDegree = std::is_same_v<T, float> ? 5 : 4;
    float* shifts = w_.shift + in_group * kMaxBlockRows;
    float* sums = w_.sum + in_group * kMaxBlockRows;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t keys = visible(first_row + r, first_key, n);
      float* s = w_.scores + r * w_.score_stride;
      const float top = Term::kNone ? row_max(s, keys) * scale_ : term_.apply(first_row + r, first_key, keys, scale_, s);
      const float before = first ? -INFINITY : shifts[r];
      shifts[r] = keys > 0 && !(before > top) ? top : before;
      w_.rescale[r] = before - finite(shifts[r]);
    }
    w_.rescale[rows] = 0.f;  // read when a tile has one row more than the block
    if (!first) row_exp<5>(w_.rescale, rows, rows, 1.f, 0.f);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t last = r - r % kTileRows + kTileRows < rows ? r - r % kTileRows + kTileRows : rows;
      const float total = row_exp<kDegree>(w_.scores + r * w_.score_stride, visible(first_row + r, first_key, n),
                                           visible(first_row + last - 1, first_key, n), Term::kNone ? scale_ : 1.f,
                                           finite(shifts[r]));
      sums[r] = first ? total : sums[r] * w_.rescale[r] + total;
    }
  }

  // The shift of a row that attends nothing so far.
  static float finite(float shift) { return shift == -INFINITY ? 0.f : shift; }

  template <Epilogue kEpilogue>
  void accumulate(int64_t in_group, int64_t first_row, int64_t rows, int64_t first_key, int64_t n,
                  const float* v) const {
    float* out = w_.out + in_group * kMaxBlockRows * w_.out_stride;
    for (int64_t p = 0; p < num_panels(w_.head_dim); ++p) {
      const int vecs = panel_vecs(w_.head_dim, p);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t tile = rows - r < kTileRows ? rows - r : kTileRows;
        const int64_t keys = visible(first_row + r + tile - 1, first_key, n);
        if (kEpilogue != Epilogue::overwrite && keys == 0) continue;
        gemm_rows<false, kEpilogue>(tile, vecs, keys, w_.scores + r * w_.score_stride, w_.score_stride,
                                    v + p * kPanel * n, out + r * w_.out_stride + p * kPanel, w_.out_stride,
                                    w_.rescale + r);
      }
    }
  }

  void finish(int64_t in_group, int64_t block) const {
    const int64_t first_row = block * tiling_.block_rows, rows = rows_of(block);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = in_group * kMaxBlockRows + r;
      float* out = w_.out + at * w_.out_stride;
      const bool empty = tiling_.chunks == 0 || w_.sum[at] == 0.f;
      if (empty) std::memset(out, 0, w_.head_dim * sizeof(float));
      write_row(out, w_.head_dim, empty ? 0.f : 1.f / w_.sum[at], map_.out_row(first_row + r));
      *map_.lse(first_row + r) = empty ? -INFINITY : w_.shift[at] * kLn2 + __builtin_logf(w_.sum[at]);
    }
  }

  const Map& map_;
  const Term& term_;
  const Tiling tiling_;
  const float sign_, scale_;
  const ForwardWorkspace& w_;
};

}  // namespace vitkit::cpu::VITKIT_ISA
