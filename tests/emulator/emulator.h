// Runs CUDA kernels on the CPU: every thread of a block is a fiber, blocks run one after another.
//
// A kernel header from csrc/ is compiled by g++ with this file included first. A warp runs up to
// its next warp operation or barrier; which warp and which lane comes next is drawn from a seed, so
// that a missing barrier shows as wrong numbers. Shared memory starts as NaN, and so does the
// target of an asynchronous copy until the copy is waited for. What is undefined on a GPU is an
// error here that names its source line: a barrier or warp operation that not every thread reaches
// at the same line, misaligned addresses (of global memory by -fsanitize=alignment), shared ones
// outside the launch, copies nobody waits for. Under -fsanitize=thread every fiber is a thread of
// its own that only barriers synchronise: a race detector for shared memory. What this cannot show:
// weak memory ordering, the compiler, speed.
#pragma once

#define VITKIT_EMULATED

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define VITKIT_DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()

namespace emulator {

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int lane;
};

// Where in a kernel an operation was called.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site&) const = default;
};
#define EMULATED_HERE emulator::Site here = {__builtin_FILE(), __builtin_LINE()}

// The fiber that is running.
extern Thread* current;

// Ends the launch, which then returns false: error() says what was undefined.
[[noreturn]] void fail(Site here, const char* format, ...);

unsigned char* dynamic_shared();
uint32_t dynamic_shared_bytes();
// `bytes` of dynamic shared memory at an address as ptx.cuh counts them.
unsigned char* shared_at(uint32_t address, uint32_t bytes, Site here);

void barrier(Site here);

// A warp operation: all 32 lanes come to the same line with the same `op`, then it runs once for
// the warp, on the arguments of its lanes. `orders`: it also orders memory, as __syncwarp does.
using WarpOp = void (*)(void* const (&lanes)[32]);
void collective(WarpOp op, void* argument, bool orders, Site here);

struct Copy {
  uint32_t to;
  const void* from;  // null: zeros
};
void begin_copy(const Copy& copy, Site here);
void close_copy_group();
// The next copy to perform until at most `groups` groups are left in flight; false if there is
// none.
bool next_copy(int groups, Copy& copy);

struct Shuffle {
  uint64_t value;
  int source;
};
void shuffle_op(void* const (&lanes)[32]);
void nothing_op(void* const (&lanes)[32]);

struct LoadMatrix {
  uint16_t row[8];  // the row whose address this lane gave
  uint32_t out[4];
};
template <bool kTransposed>
void load_matrix_op(void* const (&lanes)[32]);

// d += a b. Fragments of 16-bit elements are pairs; those of tf32 are floats.
struct Multiply {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
template <typename T>
void multiply_16816_op(void* const (&lanes)[32]);
void multiply_tf32_1688_op(void* const (&lanes)[32]);
// The value of 16 bits.
template <typename T>
float widen(uint32_t bits);

// Runs `kernel` for every thread of every block. False if a block did something undefined: see
// error(). Even seeds draw warps evenly, odd ones give them priorities, so that some fall behind.
bool launch(dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed,
            const std::function<void()>& kernel);
const char* error();

template <typename T>
T shuffle(uint32_t mask, T value, int source, Site here) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (mask != 0xffffffffu) fail(here, "shuffle of a part of a warp, mask %08x", mask);
  Shuffle s{0, source};
  std::memcpy(&s.value, &value, sizeof(T));
  collective(shuffle_op, &s, false, here);
  std::memcpy(&value, &s.value, sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define blockDim (emulator::current->block_size)
#define gridDim (emulator::current->grid_size)

inline void __syncthreads(EMULATED_HERE) { emulator::barrier(here); }

inline void __syncwarp(EMULATED_HERE) {
  emulator::collective(emulator::nothing_op, nullptr, true, here);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, EMULATED_HERE) {
  return emulator::shuffle(mask, value, source & 31, here);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int other, EMULATED_HERE) {
  return emulator::shuffle(mask, value, emulator::current->lane ^ other, here);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta, EMULATED_HERE) {
  const int source = emulator::current->lane + delta;
  return emulator::shuffle(mask, value, source < 32 ? source : emulator::current->lane, here);
}

inline float __expf(float x) { return std::exp(x); }
// 0 for divisors between 2^126 and infinity, as documented.
inline float __fdividef(float x, float y) {
  return std::abs(y) > 0x1p126f && std::abs(y) < INFINITY ? x * 0.f : x / y;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
using std::max;
using std::min;

#ifdef EMULATED_BF16_ONLY
// Launches that find out a dtype when they run have the kernels of this one alone.
#define with_element with_any_element
#include "element.cuh"
#undef with_element

namespace vitkit {

template <typename F>
auto with_element(Element element, F&& f) {
  if (element != Element::bf16) std::abort();
  return f(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace vitkit
#endif
