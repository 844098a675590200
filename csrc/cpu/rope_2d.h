// Parameters of the rope_2d kernel, shared by the host file and every instruction set.
#pragma once

#include <cstdint>

#include "attention/params.h"

namespace vitkit::cpu {

// [B, N', H, D] float32, elements consecutive; a stride is 0 where the table is shared.
struct AngleTable {
  const float* data;
  int64_t batch_stride, token_stride, head_stride;
};

// y = x turned by the angles, or turned back. The first `prefix` tokens are copied. An item is one
// token of one sample.
struct Rope {
  ElementType type;
  bool interleaved, inverse;
  int64_t tokens, prefix, heads, head_dim;
  RowsView x, y;
  AngleTable cos, sin;
};

struct RopeKernels {
  void (*rotate)(const Rope&, int64_t begin, int64_t end);
};

}  // namespace vitkit::cpu
