// What the host files of dilated_attention and its kernels share.
//
// A problem is one segment of one branch, for one head of one batch element: slot i of segment s
// holds token s * length + phase + i * ratio. Slots behind the segment or behind the last token
// hold zeros; they come last and take part as a count only.
#pragma once

#include "attention/params.h"
#include "flash_attention_bwd.h"

namespace vitkit::cpu {

struct DilatedBranch {
  int64_t length, ratio, segments, slots;
  int64_t pitch;            // between segments in the order of the output
  int64_t heads_per_phase;  // head h keeps the tokens of phase h / heads_per_phase
  int64_t first_row, rows;  // of its results; row i of segment s is first_row + s * slots + i
};

// Tokens of slot 0, as key (and query) and in the output; how many slots hold tokens, and how many
// results belong to a token. (Not `inline`: see simd.h.)
struct DilatedSegment {
  int64_t token, out_token, nk, nq, row;
};

static inline int64_t dilated_count(int64_t phase, int64_t end, int64_t ratio) {
  return phase < end ? (end - phase + ratio - 1) / ratio : 0;
}

static inline DilatedSegment dilated_segment(const DilatedBranch& b, int64_t tokens,
                                             int64_t segment, int64_t head) {
  const int64_t phase = head / b.heads_per_phase;
  const int64_t start = segment * b.length, out_start = segment * b.pitch;
  const int64_t left = tokens - start, out_left = tokens - out_start;
  return {start + phase, out_start + phase,
          dilated_count(phase, left < b.length ? left : b.length, b.ratio),
          dilated_count(phase, out_left < b.pitch ? out_left : b.pitch, b.ratio),
          b.first_row + segment * b.slots};
}

// Results of the branches. The heads in flight are those from `first_head` on, counted through the
// batch; a batch element of `rows` has in.heads of them.
struct DilatedForward {
  AttentionInputs in;  // dense; nq = nk = tokens
  const DilatedBranch* branches;
  int64_t branch_count, row_count;
  RowsView out, rows;
  float* lse;      // [batch, heads, tokens]
  float* row_lse;  // [heads in flight, row_count]
  int64_t first_head;
  bool keep_rows;  // `rows` outlives the call: what is no result becomes zero
};

// Part `part` of `parts` of the queries of consecutive segments.
struct DilatedUnit {
  int64_t branch, batch, head, segment, segments, part, parts;
};

struct DilatedForwardKernels {
  int64_t (*blocks)(const DilatedForward& p, int64_t nq, int64_t nk);
  int64_t (*scratch_bytes)(const DilatedForward& p);
  void (*attend)(const DilatedForward& p, const DilatedUnit& unit, void* scratch);
  // Tokens [begin, end) of heads [head, head + heads): their results weighted by branch.
  void (*mix)(const DilatedForward& p, int64_t batch, int64_t head, int64_t heads, int64_t begin,
              int64_t end, void* scratch);
};

// dq, dk and dv are float32 and begin with the heads in flight; every problem adds to them.
struct DilatedBackward {
  AttentionInputs in;
  const DilatedBranch* branches;
  int64_t branch_count;
  RowsView rows, grad;
  int64_t grad_dim_stride;
  LseView lse, grad_lse;  // grad_lse.data may be null: zero
  RowsView dq, dk, dv;
  int64_t first_head;
};

// `sums` as in BackwardProblem.
struct DilatedProblem {
  int64_t branch, batch, head, segment;
  bool fine;  // smaller cells, for more lanes
  float* sums;
};

struct DilatedBackwardKernels {
  BackwardGrid (*grid)(const DilatedBackward& p, const DilatedProblem& problem);
  int64_t (*sums_floats)(const DilatedBackward& p, int64_t branch);
  int64_t (*scratch_bytes)(const DilatedBackward& p);
  void (*cell)(const DilatedBackward& p, const DilatedProblem& problem, int64_t step, int64_t lane,
               void* scratch);
  // to[i] = from[i], rounded to the element type.
  void (*round)(const float* from, ElementType type, void* to, int64_t count);
};

}  // namespace vitkit::cpu
