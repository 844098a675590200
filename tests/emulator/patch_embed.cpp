// Entry points for ctypes: the launches of patch_embed on the emulator.
#include "emulator.h"
// The kernels and launches, by the same file nvcc compiles.
#include "patch_embed_launch.cuh"

#include <cstdlib>

using namespace vitkit;
using namespace vitkit::patch_embed;

namespace {

// NaN, aligned as torch's allocator does it.
struct Memory {
  void* data = nullptr;
  explicit Memory(int64_t bytes) {
    if (posix_memalign(&data, 256, size_t(bytes) + 256) != 0) std::abort();
    std::memset(data, 0xff, size_t(bytes));
  }
  ~Memory() { std::free(data); }
};

}  // namespace

extern "C" {

size_t emulated_size(int which) {
  const size_t sizes[] = {sizeof(Call), sizeof(Gradients)};
  return sizes[which];
}

int emulated_unit(const Call* c) {
  return images_of(*c, ForwardBuffers(*c, nullptr), c->pixels).unit;
}

void emulated_packed_geometry(Geometry* g, int tokens, int channels, int rows, int columns) {
  *g = packed_geometry(tokens, channels, rows, columns);
}

// Of each tile of a packed call.
const char* emulated_units(const Call* c, int* units, uint64_t seed) {
  const Memory workspace(ForwardBuffers(*c, nullptr).bytes());
  const ForwardBuffers b(*c, workspace.data);
  const char* error = launch_places(*c, b, {seed});
  const int tiles = (c->g.tokens + kTokensOfUnit - 1) / kTokensOfUnit;
  for (int i = 0; i < tiles; ++i) units[i] = std::min(images_of(*c, b, c->pixels).unit, b.units[i]);
  return error;
}

const char* emulated_forward(const Call* c, void* out, uint64_t seed) {
  const Memory workspace(ForwardBuffers(*c, nullptr).bytes());
  return patch_forward(*c, out, workspace.data, {seed});
}

const char* emulated_backward(const Call* c, const Gradients* to, const void* grad, uint64_t seed) {
  const Memory workspace(BackwardBuffers(*c, *to, grad, nullptr).bytes());
  return patch_backward(*c, *to, grad, workspace.data, {seed});
}
}
