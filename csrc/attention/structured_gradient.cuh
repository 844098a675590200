// What the gradients of structured biases need beside the kernel of dq.
#pragma once

#include "backward.cuh"
#include "forward.cuh"
#include "partial_sums.cuh"
#include "structured_bias.cuh"

namespace vitkit::attention {

using StructuredForward = ForwardParams<SequenceMap, StructuredTerm>;
using StructuredBackward = BackwardParams<SequenceMap, StructuredTerm>;

struct StructuredPlan {
  int64_t sums;    // elements of StructuredTerm::sums, 0 if they fit shared memory
  int64_t copies;  // of dslopes
};

// For a term that says with drel_h whether its gradient is asked for.
template <typename T, int kHeadDim>
StructuredPlan plan_structured_gradient(const StructuredBackward& p, int rows) {
  StructuredTerm term = p.term;
  float apart = 0.f;
  term.sums = &apart;
  const int warps = dq_warps<T, kHeadDim>(term, rows);
  term.sums = nullptr;
  const bool fits = dq_shared_bytes<T, kHeadDim>(term, warps) <= kMaxShared;
  const int64_t blocks = p.map.blocks(16 * warps, false);
  return {fits ? 0 : blocks * warps * 16 * term.grid_lines(), blocks / p.map.heads * warps};
}

}  // namespace vitkit::attention
