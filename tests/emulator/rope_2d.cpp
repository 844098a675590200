// Entry points for ctypes: the launch of rope_2d on the emulator.
#include "emulator.h"
// The kernel and its launch, by the same file nvcc compiles.
#include "rope_2d.cuh"

using namespace vitkit;

extern "C" {

size_t emulated_size() { return sizeof(rope::Params); }

const char* emulated_rope(const rope::Params* p, Element element, bool interleaved, uint64_t seed) {
  return rope::rope_2d(*p, element, interleaved, {seed});
}
}
