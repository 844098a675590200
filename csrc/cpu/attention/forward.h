// Attention forward: which queries meet which keys, when keys are packed, and what becomes of a
// finished row. The arithmetic is a `Compute` (forward_float32.h, forward_amx.h), the layout a
// token map, the bias a score term.
//
// A block of queries meets a chunk of keys at a time. Up to kSingleChunk keys there is one chunk
// and the softmax is exact in one go; beyond that maximum, sum and output are rescaled from chunk
// to chunk. Memory is bounded whatever the number of keys: packed chunks are kept for all query
// blocks when they fit kResidentBytes, otherwise a group of query blocks shares each packing.
#pragma once

#include "attention/arena.h"
#include "attention/score_term.h"
#include "attention/softmax.h"
#include "attention/token_map.h"

namespace vitkit::cpu::VITKIT_ISA {

constexpr int64_t kGroupRows = 1024;  // packing again per group costs about 2 % of its products
constexpr int64_t kResidentBytes = 4 << 20;
// Packed keys of the heads of one sweep: half a small second-level cache.
constexpr int64_t kSweepBytes = 256 << 10;
constexpr int64_t kMaxSweepHeads = 8;

VITKIT_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a problem is cut. Depends on nothing but its own size, so that results do not depend on the
// number of threads or on the other problems of the batch.
struct Tiling {
  int64_t block_rows, blocks, chunk, chunks;
};

template <typename Compute>
VITKIT_INLINE Tiling tiling(int64_t nq, int64_t nk) {
  Tiling t{};
  if (nq > 0) {
    t.block_rows = divide_up(divide_up(nq, divide_up(nq, Compute::kBlockRows)), Compute::kRowStep) *
                   Compute::kRowStep;
    t.blocks = divide_up(nq, t.block_rows);
  }
  if (nk > 0) {
    t.chunks = nk <= Compute::kSingleChunk ? 1 : divide_up(nk, Compute::kChunk);
    t.chunk = divide_up(divide_up(nk, t.chunks), Compute::kKeyStep) * Compute::kKeyStep;
  }
  return t;
}

// `rows` queries from first_row on; `at` is where the group's buffers hold them.
struct Block {
  int64_t first_row, rows, at;
};

// `keys` keys from first_key on, packed in `slot`.
struct Chunk {
  int64_t first_key, keys, slot;
  bool first;
};

// Of the keys of a chunk, those that query i attends: the first so many.
template <typename Map>
VITKIT_INLINE int64_t visible(const Map& map, int64_t i, const Chunk& c) {
  if (!map.causal) return c.keys;
  const int64_t keys = i + 1 - c.first_key;
  return keys < 0 ? 0 : smaller(keys, c.keys);
}

// The shift of a row that attends nothing so far.
VITKIT_INLINE float finite_shift(float shift) { return shift == -INFINITY ? 0.f : shift; }
VITKIT_INLINE f32v finite_shift(f32v shift) { return shift == -INFINITY ? f32v{} : shift; }

struct WorkspaceSizes {
  int64_t head_dim, chunk, slots, group_rows;
};

template <typename Compute>
struct Workspace {
  WorkspaceSizes sizes;
  int64_t sweep_heads;
  Compute compute;
  // Of each row of the group: maximum so far in base-2 units, sum of 2^(score - shift).
  float *shift, *sum;
  int64_t bytes;

  // For problems of at most max_nk keys, of which `heads` lie side by side.
  Workspace(char* base, int64_t head_dim, int64_t max_nk, int64_t heads) {
    const Tiling t = tiling<Compute>(1, max_nk);
    const int64_t limit = divide_up(Compute::kSingleChunk, Compute::kKeyStep) * Compute::kKeyStep;
    sizes.head_dim = head_dim;
    sizes.chunk = max_nk <= Compute::kSingleChunk ? t.chunk : limit;
    sizes.group_rows = kGroupRows / Compute::kBlockRows * Compute::kBlockRows;
    const int64_t slot_bytes = Compute::slot_bytes(head_dim, sizes.chunk);
    sweep_heads = t.chunks == 1 && slot_bytes > 0 ? kSweepBytes / slot_bytes : 1;
    sweep_heads = smaller(smaller(sweep_heads < 1 ? 1 : sweep_heads, kMaxSweepHeads), heads);
    sizes.slots = t.chunks * slot_bytes <= kResidentBytes ? t.chunks : 1;
    if (sizes.slots < sweep_heads) sizes.slots = sweep_heads;
    Arena arena{base};
    compute = Compute(arena, sizes);
    shift = arena.take<float>(sizes.group_rows + kLanes);
    sum = arena.take<float>(sizes.group_rows + kLanes);
    bytes = arena.next - base;
  }
};

template <typename Map, typename Term>
struct Head {
  Map map;
  Term term;
};

// `count` heads (at most sweep_heads) of one tiling.
template <typename Compute, typename Map, typename Term>
class Forward {
 public:
  Forward(const Head<Map, Term>* heads, int64_t count, float scale,
          const Workspace<Compute>& workspace)
      : heads_(heads),
        count_(count),
        // A negative scale changes the sign of Q, which is exact: the maximum of a row is then that
        // of its scaled scores.
        negate_(scale < 0),
        scale_((scale < 0 ? -scale : scale) * kLog2e),
        tiling_(tiling<Compute>(heads->map.nq, heads->map.nk)),
        w_(workspace) {}

  // Query blocks [begin, end) of each head, in the order of block_at.
  void run(int64_t begin, int64_t end) const {
    if (tiling_.chunks == 1) pack_sweep();
    for (int64_t h = 0; h < count_; ++h) {
      const int64_t group_blocks = w_.sizes.group_rows / tiling_.block_rows;
      for (int64_t group = begin; group < end; group += group_blocks)
        attend_group(heads_[h], h, group, smaller(group + group_blocks, end), group == begin);
    }
  }

 private:
  using T = typename Compute::Element;

  Chunk chunk_at(int64_t c, int64_t slot) const {
    const int64_t first_key = c * tiling_.chunk;
    return {first_key, smaller(tiling_.chunk, heads_->map.nk - first_key), slot, c == 0};
  }

  // Causal blocks cost more the later they are: first, last, second, last but one, ... spreads them
  // over threads.
  Block block_at(const Map& map, int64_t position, int64_t group) const {
    int64_t block = position;
    if (map.causal) block = position % 2 ? tiling_.blocks - 1 - position / 2 : position / 2;
    const int64_t first_row = block * tiling_.block_rows;
    return {first_row, smaller(tiling_.block_rows, map.nq - first_row),
            (position - group) * tiling_.block_rows};
  }

  // The keys of all heads, a few rows at a time: in memory the heads of a row are neighbours.
  void pack_sweep() const {
    const Chunk c = chunk_at(0, 0);
    for (int64_t j = 0; j < c.keys; j += Compute::kSweepKeys)
      for (int64_t h = 0; h < count_; ++h)
        w_.compute.pack_keys(heads_[h].map, chunk_at(0, h), j,
                             smaller(j + Compute::kSweepKeys, c.keys));
  }

  void attend_group(const Head<Map, Term>& head, int64_t h, int64_t group, int64_t end,
                    bool first_group) const {
    const bool resident = tiling_.chunks <= w_.sizes.slots;
    for (int64_t c = 0; c < tiling_.chunks; ++c) {
      const Chunk chunk = chunk_at(c, tiling_.chunks == 1 ? h : (resident ? c : 0));
      if (tiling_.chunks > 1 && (first_group || !resident))
        w_.compute.pack_keys(head.map, chunk, 0, chunk.keys);
      for (int64_t p = group; p < end; ++p) {
        const Block b = block_at(head.map, p, group);
        if (c == 0) w_.compute.load_queries(head.map, b, negate_);
        if (visible(head.map, b.first_row + b.rows - 1, chunk) > 0)
          w_.compute.attend(head.map, head.term, b, chunk, scale_, w_.shift + b.at, w_.sum + b.at);
      }
    }
    for (int64_t p = group; p < end; ++p) finish(head.map, block_at(head.map, p, group));
  }

  void finish(const Map& map, const Block& b) const {
    for (int64_t r = 0; r < b.rows; r += kLanes) {
      const f32v sums = tiling_.chunks ? load(w_.sum + b.at + r) : f32v{};
      alignas(64) float factor[kLanes], lse[kLanes];
      store(factor, sums == 0.f ? f32v{} : 1.f / sums);
      store(lse, log_of_sum(load(w_.shift + b.at + r), sums));
      for (int64_t l = 0; l < kLanes && r + l < b.rows; ++l) {
        const int64_t i = b.first_row + r + l;
        const bool attends = factor[l] != 0.f;
        if (const int64_t zeros = map.zero_keys(i); zeros > 0)
          add_zero_keys(zeros, attends, b.at + r + l, factor + l, lse + l);
        else if (!attends)
          lse[l] = -INFINITY;
        if (attends)
          w_.compute.write_row(b.at + r + l, factor[l], map.out_row(i));
        else
          std::memset(map.out_row(i), 0, w_.sizes.head_dim * sizeof(T));
        *map.lse(i) = lse[l];
      }
    }
  }

  // The factor of a finished row and its log-sum-exp with `zeros` more keys of score 0 and value 0.
  void add_zero_keys(int64_t zeros, bool attends, int64_t row, float* factor, float* lse) const {
    const float sum = attends ? w_.sum[row] : 0.f, shift = attends ? w_.shift[row] : -INFINITY;
    const float top = shift < 0.f ? 0.f : shift;  // neither part of the sum overflows
    const float share = __builtin_exp2f(shift - top);
    const float total = sum * share + float(zeros) * __builtin_exp2f(-top);
    *factor = share / total;
    *lse = top * kLn2 + __builtin_logf(total);
  }

  const Head<Map, Term>* heads_;
  const int64_t count_;
  const bool negate_;
  const float scale_;
  const Tiling tiling_;
  const Workspace<Compute>& w_;
};

}  // namespace vitkit::cpu::VITKIT_ISA
