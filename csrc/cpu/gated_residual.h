// Parameters of the gated_residual kernels, shared by the host file and every instruction set.
//
// Tensors are [segments, rows, width]: a segment is what shares one row of gates (a sample), or
// everything.
#pragma once

#include <cstdint>

#include "norm/element.h"

namespace vitkit::cpu {

struct GatedShape {
  NormElement element;
  int64_t segments, rows, width;
  Rows gate;       // a row per segment, or per row of x
  bool per_token;  // the latter: float32 or the element of x
};

struct GatedForward {
  GatedShape shape;
  const void* x;
  const void* y;
  void* out;
};

struct GatedBackward {
  GatedShape shape;
  const void* grad;
  const void* y;
  void* dy;
  void* dgate;     // per token: [segments, rows, width] in the element of gate, otherwise null
  float* partial;  // otherwise: sums over a part of the rows, [segments, parts, width]
  int64_t parts;
};

// Each function handles items [begin, end) of its own kind of work.
struct GatedKernels {
  void (*forward)(const GatedForward&, int64_t begin, int64_t end);    // item: a row
  void (*backward)(const GatedBackward&, int64_t begin, int64_t end);  // item: a part
};

}  // namespace vitkit::cpu
