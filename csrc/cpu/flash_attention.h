// What the host file of flash_attention and its kernels share.
#pragma once

#include "attention/params.h"

namespace vitkit::cpu {

struct FlashForward {
  AttentionInputs in;
  RowsView out;
  float* lse;  // consecutive over queries
  int64_t lse_batch_stride, lse_head_stride;
  int64_t max_nk;             // over all problems
  const int64_t* first_item;  // packed: [batch + 1], the item at which each sequence begins
};

// An item is one block of queries of one head; items are ordered by batch element, head, block. Any
// split of them over threads gives the same result.
struct FlashForwardKernels {
  int64_t (*blocks)(const AttentionInputs& in, int64_t nq, int64_t nk);  // items per head
  int64_t (*scratch_bytes)(const FlashForward& p);
  void (*run)(const FlashForward& p, int64_t begin, int64_t end, void* scratch);
};

}  // namespace vitkit::cpu
