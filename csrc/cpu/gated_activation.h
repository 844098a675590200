// Parameters of the kernels behind swiglu, geglu and gelu, shared by the host file and every
// instruction set.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "gate_fits.h"

namespace vitkit::cpu {

// Rows of consecutive elements, `stride` elements apart. data is null where the op has no such
// operand.
struct ActivationRows {
  char* data;
  int64_t stride;
};

// y = value * activation(gate), or activation(gate). An item is `chunk` columns of a row.
struct GatedForward {
  ElementType type;
  Activation activation;
  int64_t rows, columns, chunk;
  ActivationRows value, gate, y;

  int64_t chunks() const { return (columns + chunk - 1) / chunk; }
  int64_t items() const { return rows * chunks(); }
};

struct GatedBackward {
  ElementType type;
  Activation activation;
  int64_t rows, columns, chunk;
  ActivationRows grad, value, gate, dvalue, dgate;

  int64_t chunks() const { return (columns + chunk - 1) / chunk; }
  int64_t items() const { return rows * chunks(); }
};

// Each function handles items [begin, end).
struct GatedKernels {
  void (*forward)(const GatedForward&, int64_t begin, int64_t end);
  void (*backward)(const GatedBackward&, int64_t begin, int64_t end);
};

}  // namespace vitkit::cpu
