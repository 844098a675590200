// Entry points for ctypes: the launches of gated_residual on the emulator.
#include "emulator.h"
// The kernels and launches, by the same file nvcc compiles.
#include "gated_residual.cuh"

using namespace vitkit;
using namespace vitkit::gated_residual;

extern "C" {

size_t emulated_size(int which) {
  const size_t sizes[] = {sizeof(ForwardParams), sizeof(BackwardParams)};
  return sizes[which];
}

int64_t emulated_part_rows(int64_t rows) { return part_rows_of(rows); }

const char* emulated_forward(const ForwardParams* p, Element element, uint64_t seed) {
  return gated_residual_forward(*p, element, {seed});
}

const char* emulated_backward(const BackwardParams* p, Element element, uint64_t seed) {
  return gated_residual_backward(*p, element, {seed});
}
}
