// Entry points for ctypes: the launches of layer_norm_modulate on the emulator.
#include "emulator.h"
// The kernels and launches, by the same file nvcc compiles.
#include "layer_norm_modulate.cuh"

using namespace vitkit;
using namespace vitkit::layer_norm;

extern "C" {

size_t emulated_size(int which) {
  const size_t sizes[] = {sizeof(ForwardParams), sizeof(BackwardParams), sizeof(SmallParams)};
  return sizes[which];
}

int64_t emulated_part_rows(int64_t rows) { return part_rows_of(rows); }

const char* emulated_forward(const ForwardParams* p, Element element, uint64_t seed) {
  return layer_norm_forward(*p, element, {seed});
}

const char* emulated_backward(const BackwardParams* p, const SmallParams* small, Element element,
                              uint64_t seed) {
  const char* error = layer_norm_backward(*p, element, {seed});
  return error || !p->partial ? error : layer_norm_small_gradients(*small, {seed});
}
}
