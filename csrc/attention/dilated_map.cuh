// Token maps of dilated attention: slot i of a segment is the token start + phase + i * ratio.
// Slots behind the last token of a segment hold zeros; they come last, are counted and never
// loaded.
#pragma once

#include "divisor.h"
#include "token_map.cuh"

namespace vitkit::attention {

constexpr int kMaxBranches = 32;  // of a call

struct DilatedBranch {
  int length, segments, slots;
  Divisor ratio, pitch;     // pitch: between segments in the order of the output
  Divisor heads_per_phase;  // head h keeps the tokens of phase h / heads_per_phase
  int64_t first_row;        // of its results; row i of segment s is first_row + s * slots + i

  // The result of a token, -1 where the head does not keep it.
  __device__ __forceinline__ int64_t row_of(int token, int head) const {
    const int segment = pitch.divide(token), place = token - segment * pitch.value;
    const int slot = ratio.divide(place);
    if (place - slot * ratio.value != heads_per_phase.divide(head)) return -1;
    return first_row + int64_t(segment) * slots + slot;
  }
};

struct DilatedSpan : Span {
  int64_t token, out_token;  // of slot 0
  int64_t row;
  int ratio, slots;
};

// All branches if not kGradients, where results are rows beside each other; else one at a time, for
// every branch adds to the gradients of the same tokens.
template <bool kGradients>
struct DilatedMap {
  static constexpr bool kPads = false, kZeros = !kGradients, kAdds = kGradients;
  using Span = DilatedSpan;

  int batch, heads, tokens;
  bool adds;
  int count;
  DilatedBranch branches[kGradients ? 1 : kMaxBranches];

  __host__ __device__ int64_t blocks_of(int b, int rows) const {
    return int64_t((branches[b].slots - 1) / rows + 1) * branches[b].segments * batch * heads;
  }
  __host__ __device__ int64_t blocks(int rows, bool) const {
    int64_t all = 0;
    for (int b = 0; b < count; ++b) all += blocks_of(b, rows);
    return all;
  }

  __device__ __forceinline__ DilatedSpan span(int64_t block, int rows, bool) const {
    int b = 0;
    for (int64_t here = blocks_of(0, rows); b + 1 < count && block >= here;
         here = blocks_of(++b, rows))
      block -= here;
    const DilatedBranch& branch = branches[b];
    const int tiles = (branch.slots - 1) / rows + 1;
    const int tile = int(block % tiles);
    const int64_t plane = block / tiles, head = plane % heads;
    const int64_t segment = plane / heads / batch;
    const int phase = branch.heads_per_phase.divide(int(head));
    const int64_t start = segment * branch.length, out_start = segment * branch.pitch.value;
    const int n_k = count_tokens(min(int64_t(branch.length), tokens - start), phase, branch.ratio);
    const int n_q =
        count_tokens(min(int64_t(branch.pitch.value), tokens - out_start), phase, branch.ratio);
    return {{plane / heads % batch, head, tile * rows, n_q, n_k, 0, 0},
            start + phase,
            out_start + phase,
            branch.first_row + segment * branch.slots,
            branch.ratio.value,
            branch.slots};
  }

  __device__ __forceinline__ int64_t query(const DilatedSpan& s, int i) const {
    return s.token + int64_t(i) * s.ratio;
  }
  __device__ __forceinline__ int64_t key(const DilatedSpan& s, int i) const { return query(s, i); }
  __device__ __forceinline__ int64_t result(const DilatedSpan& s, int i) const {
    return kGradients ? s.out_token + int64_t(i) * s.ratio : s.row + i;
  }
  __device__ __forceinline__ int64_t statistic(const DilatedSpan& s, int i) const {
    return s.row + i;
  }
  __device__ __forceinline__ int held(const DilatedSpan& s) const { return min(s.n_q, s.n_k); }
  // A causal query attends the slots up to its own.
  __device__ __forceinline__ int zeros(const DilatedSpan& s, int i, bool causal) const {
    return (causal ? i + 1 : s.slots) - s.n_k;
  }

 private:
  // How many of `left` tokens a phase keeps.
  static __device__ __forceinline__ int count_tokens(int64_t left, int phase,
                                                     const Divisor& ratio) {
    return left > phase ? ratio.divide(int(left) - phase - 1) + 1 : 0;
  }
};

}  // namespace vitkit::attention
