// Runs CUDA kernels on the CPU: every thread of a block is a fiber, blocks run one after another.
//
// A kernel header from csrc/ is compiled by g++ with this file included first. Between two barriers
// the fibers run in an order drawn from a seed, so that a missing __syncthreads shows as wrong
// numbers; dynamic shared memory starts as NaN; a barrier or a shuffle that not every thread
// reaches is an error, and so is a deadlock. What this cannot show: weak memory ordering, the
// compiler, speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define VITKIT_DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()

namespace emulator {

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int lane;
};

// The fiber that is running.
extern Thread* current;

unsigned char* dynamic_shared();
void barrier();

// Hands `value` to the warp and returns the value of lane `source`; every lane must take part.
uint64_t exchange(uint64_t value, int source);

// Runs `kernel` for every thread of every block. False if a block did something undefined: see
// error().
bool launch(dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed,
            const std::function<void()>& kernel);
const char* error();

template <typename T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define blockDim (emulator::current->block_size)
#define gridDim (emulator::current->grid_size)

inline void __syncthreads() { emulator::barrier(); }

template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return emulator::shuffle(value, emulator::current->lane ^ mask);
}

template <typename T>
T __shfl_down_sync(uint32_t, T value, int delta) {
  const int source = emulator::current->lane + delta;
  return emulator::shuffle(value, source < 32 ? source : emulator::current->lane);
}

inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
