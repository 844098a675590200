// What the host file of the flash_attention gradient and its kernels share.
#pragma once

#include "attention/params.h"

namespace vitkit::cpu {

// Where the gradient of a float bias goes: elements that belong to one score each are written in
// the bias's own type, others are added up in float32. A stride is 0 where gradients are summed;
// the key stride is 0 or 1. data is null when no gradient is asked for.
struct BiasGradView {
  char* data;
  ElementType type;
  bool accumulate;
  int64_t copy_stride, batch_stride, head_stride, query_stride, key_stride;
};

// Sums of the gradients of structured biases in float32, null where none is asked for:
// rel_h [batch, heads, nq, height], rel_w [batch, heads, nq, width], slopes [batch, heads, nq].
struct StructuredGradView {
  float *rel_h, *rel_w, *slopes;
};

// The score matrix of a problem is cut into query_ranges x key_ranges cells, from its shape alone.
// In one step, cells of different lanes share neither rows of dQ nor rows of dK and dV; a row of
// either meets its cells in the order of the steps. Any schedule that keeps the steps of a problem
// in order, in parallel over lanes or not, therefore gives the same result.
struct BackwardGrid {
  int64_t query_range, key_range;  // tokens; the last range may be shorter
  int64_t query_ranges, key_ranges;

  int64_t lanes() const { return query_ranges < key_ranges ? query_ranges : key_ranges; }
  int64_t steps() const { return query_ranges < key_ranges ? key_ranges : query_ranges; }
};

struct FlashBackward {
  AttentionInputs in;
  RowsView out, grad;
  int64_t grad_dim_stride;  // of the elements of a row of `grad`
  RowsView dq, dk, dv;
  const float* lse;  // consecutive over queries
  int64_t lse_batch_stride, lse_head_stride;
  const float* grad_lse;  // null: zero
  int64_t grad_lse_batch_stride, grad_lse_head_stride, grad_lse_query_stride;
  BiasGradView dbias;
  StructuredGradView dstructured;
  int64_t max_nq, max_nk;  // over all problems
  bool fine;               // few problems: smaller cells, for more lanes
};

// One head of one batch element or sequence, with float32 sums (sums_floats of them, aligned to a
// cache line) that stay with it for all its cells. `copy` selects one of several copies of dbias.
struct BackwardProblem {
  int64_t batch, head;
  float* sums;
  int64_t copy;
};

struct FlashBackwardKernels {
  BackwardGrid (*grid)(const FlashBackward& p, int64_t nq, int64_t nk);
  int64_t (*sums_floats)(const FlashBackward& p);
  int64_t (*scratch_bytes)(const FlashBackward& p);
  void (*cell)(const FlashBackward& p, const BackwardProblem& problem, int64_t step, int64_t lane,
               void* scratch);
  // Sums the copies of dbias (and its keys, where only they were kept apart) into `to`.
  void (*reduce_bias)(const float* from, int64_t copies, int64_t copy_stride, int64_t keys,
                      int64_t count, ElementType type, void* to);
};

}  // namespace vitkit::cpu
