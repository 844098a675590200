// Parameters of the layer_norm_modulate kernels, shared by the host file and every instruction set.
//
// x is [segments, rows, width]: a segment is what shares one modulation (a sample), or everything.
#pragma once

#include <cstdint>

#include "norm/element.h"

namespace vitkit::cpu {

struct LayerNormShape {
  NormElement element;
  int64_t segments, rows, width;
  Rows weight, bias;  // one row
  Rows shift, scale;  // a row per segment, or per row of x
  bool per_token;     // the latter: float32 or the element of x
};

struct LayerNormForward {
  LayerNormShape shape;
  float eps;
  const void* x;
  void* y;
  float* mean;  // [segments, rows]
  float* rstd;  // [segments, rows]
};

struct LayerNormBackward {
  LayerNormShape shape;
  const void* x;
  const void* grad;
  void* dx;
  void* dscale;  // per token: [segments, rows, width] in the element of scale, or null
  const float* mean;
  const float* rstd;
  // Sums over the rows of a part of dz and dz * xhat, dz being the gradient before the modulation
  // of a segment: [segments, parts, 2, width], then those of a segment in `sums` [segments, 2,
  // width]. Both null where no small tensor wants them.
  float* partial;
  float* sums;
  int64_t parts;
};

// Each function handles items [begin, end) of its own kind of work.
struct LayerNormKernels {
  void (*forward)(const LayerNormForward&, int64_t begin, int64_t end);    // item: a row
  void (*backward)(const LayerNormBackward&, int64_t begin, int64_t end);  // item: a part
  void (*merge)(const LayerNormBackward&, int64_t begin, int64_t end);     // item: a segment
};

}  // namespace vitkit::cpu
