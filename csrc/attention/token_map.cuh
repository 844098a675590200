// Token maps: which rows a block of threads attends with, and where they lie in memory.
//
// A map has
//   blocks(rows, keys)            how many tiles of `rows` queries (or keys, if `keys`) there are
//   span(block, rows, keys)       the tile of a block
//   query(span, i), key(span, i)  the token that holds query or key i of a span
//   result(span, i)               the token of out and of its gradient
//   statistic(span, i)            where lse and delta of query i lie
//   held(span)                    how many queries hold a token; those behind them are zeros
// and says with
//   kPads   that a token below 0 is a pad: as a key its row is pad(span, part), with part 1 for k
//   and 2
//           for v; as a query it does not exist
//   kZeros  that query i attends zeros(span, i, causal) keys that are zeros beside those of the
//   span kAdds   that gradients are float32, and added to what is there if `adds`
#pragma once

#include <stdint.h>

#include "reduce.cuh"

namespace vitkit::attention {

// Queries [first, ...) of a sequence of n_q, with its n_k keys; or keys [first, ...), with its
// queries. Nothing to do where `first` is not below their number.
struct Span {
  int64_t batch, head;
  int first, n_q, n_k;
  int origin_q, origin_k;  // the tokens that query 0 and key 0 are
};

// Whole sequences: a dense batch, or packed ones one behind the other.
struct SequenceMap {
  static constexpr bool kPads = false, kZeros = false, kAdds = false;
  using Span = attention::Span;

  int batch, heads, n_q, n_k;  // packed: n_q and n_k of all sequences, batch 1
  int sequences;
  const int32_t* cu_seqlens_q;  // [sequences + 1], null for a dense batch
  const int32_t* cu_seqlens_k;

  // Packed sequence s owns the slots from cu_seqlens[s] / rows + s on: at least as many as it has
  // tiles, so that the grid needs no value of cu_seqlens.
  __host__ __device__ int slots(int rows, bool keys) const {
    const int n = keys ? n_k : n_q;
    return cu_seqlens_q ? n / rows + sequences + 1 : (n + rows - 1) / rows;
  }
  __host__ __device__ int64_t blocks(int rows, bool keys) const {
    return int64_t(slots(rows, keys)) * batch * heads;
  }

  __device__ __forceinline__ Span span(int64_t block, int rows, bool keys) const {
    const int slot = int(block % slots(rows, keys));
    const int64_t plane = block / slots(rows, keys);
    Span s{plane / heads, plane % heads, slot * rows, n_q, n_k, 0, 0};
    if (cu_seqlens_q) find_sequence(s, slot, rows, keys);
    return s;
  }

  // The tile from `first` on of a dense sequence.
  __device__ __forceinline__ Span tile(int64_t plane, int64_t head, int first) const {
    return {plane, head, first, n_q, n_k, 0, 0};
  }

  __device__ __forceinline__ int64_t query(const Span& s, int i) const { return s.origin_q + i; }
  __device__ __forceinline__ int64_t key(const Span& s, int i) const { return s.origin_k + i; }
  __device__ __forceinline__ int64_t result(const Span& s, int i) const { return query(s, i); }
  __device__ __forceinline__ int64_t statistic(const Span& s, int i) const { return query(s, i); }
  __device__ __forceinline__ int held(const Span& s) const { return s.n_q; }

 private:
  static __device__ __forceinline__ int clamp(int x, int low, int high) {
    return x < low ? low : x > high ? high : x;
  }

  // Tokens [begin, end) of sequence s, inside [0, total) whatever cu_seqlens holds. The tokens
  // behind the last sequence are one more, if `rest`.
  __device__ __forceinline__ void bounds(const int32_t* cu, int s, int total, bool rest, int& begin,
                                         int& end) const {
    begin = s == 0 ? 0 : clamp(cu[s], 0, total);
    end = s < sequences ? clamp(cu[s + 1], begin, total) : rest ? total : begin;
  }

  __device__ __forceinline__ void find_sequence(Span& s, int slot, int rows, bool keys) const {
    const int32_t* const cu = keys ? cu_seqlens_k : cu_seqlens_q;
    const int total = keys ? n_k : n_q;
    int sequence = 0;  // how many sequences end before this slot; every warp counts all
    for (int i = 1 + int(threadIdx.x % kWarp); i <= sequences; i += kWarp)
      sequence += clamp(cu[i], 0, total) / rows + i <= slot;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      sequence += __shfl_xor_sync(0xffffffffu, sequence, offset);
    int end_q, end_k;
    bounds(cu_seqlens_q, sequence, n_q, !keys, s.origin_q, end_q);
    bounds(cu_seqlens_k, sequence, n_k, keys, s.origin_k, end_k);
    s.n_q = end_q - s.origin_q;
    s.n_k = end_k - s.origin_k;
    const int tile = slot - (keys ? s.origin_k : s.origin_q) / rows - sequence;
    s.first = tile < 0 ? total : tile * rows;
  }
};

}  // namespace vitkit::attention
