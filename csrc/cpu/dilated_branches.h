// Host side of dilated_attention, forward and gradient: the layout of the branches, and how many
// heads are worked on at a time.
#pragma once

#include <vector>

#include "check.h"
#include "dilated_attention.h"

namespace vitkit::cpu {

struct DilatedLayout {
  std::vector<DilatedBranch> branches;
  int64_t row_count = 0;

  // As `branches` in vitkit/ops/dilated_attention.py; tokens > 0.
  DilatedLayout(const char* op, const AttentionInputs& in, const std::vector<int64_t>& lengths,
                const std::vector<int64_t>& ratios, bool torchscale);
};

// Heads [head, head + heads) of batch elements [batch, batch + batches); of several elements always
// all heads.
struct HeadGroup {
  int64_t batch, batches, head, heads;

  int64_t count() const { return batches * heads; }
};

// Groups of at most `most` heads, at least one.
std::vector<HeadGroup> head_groups(const AttentionInputs& in, int64_t most);

}  // namespace vitkit::cpu
