// Parameters of the group_norm_silu kernels, shared by the host file and every instruction set.
//
// In memory a tensor is either [N, C, positions] ("rows": one row per channel) or [N, positions, C]
// ("columns": one row per position). Small tensors arrive as float32, absent ones as null pointers.
#pragma once

#include <cstdint>

#include "norm/element.h"

namespace vitkit::cpu {

struct GroupNormShape {
  NormElement element;
  int64_t samples, channels, positions, groups;
  bool channels_last;
  bool silu;
  float eps;

  int64_t channels_per_group() const { return channels / groups; }
  int64_t group_elements() const { return channels_per_group() * positions; }
};

// y = act((x + add - mean) * rstd * gain + offset), gain and offset [samples, channels] holding
// weight * (1 + scale) and bias * (1 + scale) + shift.
struct GroupNormForward {
  GroupNormShape shape;
  const void* x;
  void* y;
  const float* add;     // [samples, channels] or null
  const float* gain;    // [samples, channels]
  const float* offset;  // [samples, channels]
  float* mean;          // [samples, groups]
  float* rstd;          // [samples, groups]
  // Only where one group is worked on by several threads, or channels are last:
  float* partial;  // [samples, parts, channels, 2]: mean and M2 of each channel's part of positions
  int64_t parts;
};

struct GroupNormBackward {
  GroupNormShape shape;
  const void* x;
  const void* grad;
  void* dx;
  const float* add;
  const float* gain;
  const float* offset;
  const float* mean;
  const float* rstd;
  // Sums over positions of dz, dz * xhat and xhat, dz being the gradient before the activation.
  float* sums;     // [samples, channels, 3]
  float* partial;  // [samples, parts, channels, 3], as above
  int64_t parts;
};

// Each function handles items [begin, end) of its own kind of work.
struct GroupNormKernels {
  // One item: a whole group, [N, C, positions] layout.
  void (*forward_groups)(const GroupNormForward&, int64_t begin, int64_t end);
  void (*backward_groups)(const GroupNormBackward&, int64_t begin, int64_t end);
  // One item: a part of the positions of one sample. Statistics first, then merge (one item: a
  // sample), then apply.
  void (*forward_statistics)(const GroupNormForward&, int64_t begin, int64_t end);
  void (*forward_merge)(const GroupNormForward&, int64_t begin, int64_t end);
  void (*forward_apply)(const GroupNormForward&, int64_t begin, int64_t end);
  void (*backward_sums)(const GroupNormBackward&, int64_t begin, int64_t end);
  void (*backward_merge)(const GroupNormBackward&, int64_t begin, int64_t end);
  void (*backward_apply)(const GroupNormBackward&, int64_t begin, int64_t end);
};

}  // namespace vitkit::cpu
