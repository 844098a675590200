// Parameters of the kernels behind linear, shared by the host file and every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/params.h"

namespace vitkit::cpu {

enum class LinearActivation : int { none, gelu, gelu_tanh };

// y = activation(x weight^T + bias). An item is a group of panels of columns of y and a range of
// its rows: it packs its part of the weight, and keeps it in cache while the rows go by.
struct LinearForward {
  ElementType type;
  LinearActivation activation;
  int64_t rows, depth, columns;
  const char* x;  // [rows, depth]
  int64_t x_stride;
  const char* weight;  // [columns, depth]
  int64_t weight_stride;
  const float* bias;  // [columns], zeros up to kLinearPadding more; or null
  char* y;            // [rows, columns]
  int64_t group_panels, range_rows;

  int64_t ranges() const { return (rows + range_rows - 1) / range_rows; }
};

constexpr int64_t kLinearPadding = 64;

struct LinearKernels {
  int64_t panel, row_step;  // columns of a panel; range_rows is a multiple of row_step
  size_t (*scratch_bytes)(const LinearForward&);
  void (*forward)(const LinearForward&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace vitkit::cpu
