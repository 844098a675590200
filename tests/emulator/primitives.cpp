// Entry points for ctypes: single primitives of csrc/core on the emulator, register by register.
#include "emulator.h"
// The vocabulary, by the same files nvcc compiles.
#include "mma.cuh"

using namespace vitkit;

namespace {

// One warp; null, or what was undefined.
const char* run(int threads, size_t shared_bytes, uint64_t seed, const std::function<void()>& f) {
  return emulator::launch(dim3(1), dim3(unsigned(threads)), shared_bytes, seed, f)
             ? nullptr
             : emulator::error();
}

// What a kernel must not do, by number.
void misuse(int which, unsigned char* shared) {
  const int thread = int(threadIdx.x);
  alignas(16) static uint64_t global[4] = {1, 2, 3, 4};
  uint32_t r[4];
  switch (which) {
    case 0:  // a shuffle that half the warp skips
      if (thread % 2) __shfl_xor_sync(0xffffffffu, thread, 1);
      break;
    case 1:  // lanes of a warp at different shuffles
      if (thread % 2) {
        __shfl_xor_sync(0xffffffffu, thread, 1);
      } else {
        __shfl_xor_sync(0xffffffffu, thread, 2);
      }
      break;
    case 2:  // a shuffle of 16 lanes
      __shfl_xor_sync(0x0000ffffu, thread, 1);
      break;
    case 3:  // a barrier that one warp skips
      if (thread < 32) __syncthreads();
      break;
    case 4:  // warps at different barriers
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 5:  // a row that begins at an odd address
      ptx::load_matrices(r, ptx::shared_address(shared) + 8);
      break;
    case 6:  // a row behind the shared memory of the launch
      ptx::load_matrices(r, ptx::shared_address(shared) + 256);
      break;
    case 7:  // a copy to behind the shared memory
      ptx::copy_async(256, global, true);
      break;
    case 8:  // a copy from an odd address
      ptx::copy_async(0, reinterpret_cast<unsigned char*>(global) + 4, true);
      break;
    case 9:  // a copy that nobody waits for
      ptx::copy_async(0, global, true);
      ptx::copy_commit();
      ptx::copy_wait<1>();
      break;
  }
}

template <int kChunks>
void fill_swizzle(int rows, int* plain, int* pairs) {
  for (int row = 0; row < rows; ++row)
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      *plain++ = swizzled<kChunks>(row, chunk);
      *pairs++ = swizzled_pairs<kChunks>(row, chunk);
    }
}

}  // namespace

extern "C" {

// in [32, 8] 16-bit: the rows of four matrices. out [32, 4]: the registers of every lane.
const char* load_matrices(const uint16_t* in, uint32_t* out, bool transposed, uint64_t seed) {
  return run(32, 512, seed, [&] {
    VITKIT_DYNAMIC_SHARED(shared);
    std::memcpy(shared + threadIdx.x * 16, in + threadIdx.x * 8, 16);
    __syncwarp();
    uint32_t r[4];
    const uint32_t row = ptx::shared_address(shared) + threadIdx.x * 16;
    if (transposed) {
      ptx::load_matrices_transposed(r, row);
    } else {
      ptx::load_matrices(r, row);
    }
    std::memcpy(out + threadIdx.x * 4, r, 16);
  });
}

// Registers a [32, 4], b [32, 2], d [32, 4]. element: 0 tf32, 1 bfloat16, 2 float16.
const char* multiply(int element, const uint32_t* a, const uint32_t* b, float* d, uint64_t seed) {
  return run(32, 0, seed, [&] {
    const uint32_t lane = threadIdx.x;
    uint32_t x[4], y[2];
    float z[4];
    std::memcpy(x, a + lane * 4, 16);
    std::memcpy(y, b + lane * 2, 8);
    std::memcpy(z, d + lane * 4, 16);
    if (element == 0) {
      ptx::multiply_tf32_1688(z, x, y);
    } else if (element == 1) {
      ptx::multiply_16816<__nv_bfloat16>(z, x, y);
    } else {
      ptx::multiply_16816<__half>(z, x, y);
    }
    std::memcpy(d + lane * 4, z, 16);
  });
}

void to_tf32(const float* x, uint32_t* y, int count) {
  for (int i = 0; i < count; ++i) y[i] = ptx::to_tf32(x[i]);
}

// value[lane] of lane ^ other, and of lane + other where there is one.
const char* shuffle(const float* value, int other, float* exchanged, float* shifted,
                    uint64_t seed) {
  return run(32, 0, seed, [&] {
    exchanged[threadIdx.x] = __shfl_xor_sync(0xffffffffu, value[threadIdx.x], other);
    shifted[threadIdx.x] = __shfl_down_sync(0xffffffffu, value[threadIdx.x], other);
  });
}

// Two groups of a 16-byte copy a lane; what lies in shared memory with one and with none in flight.
// Odd lanes copy zeros.
const char* copies(const float* from, float* after_one, float* after_both, uint64_t seed) {
  return run(32, 1024, seed, [&] {
    VITKIT_DYNAMIC_SHARED(shared);
    const uint32_t lane = threadIdx.x, to = ptx::shared_address(shared) + lane * 16;
    ptx::copy_async(to, from + lane * 4, lane % 2 == 0);
    ptx::copy_commit();
    ptx::copy_async(to + 512, from + 128 + lane * 4, lane % 2 == 0);
    ptx::copy_commit();
    ptx::copy_wait<1>();
    __syncthreads();
    for (int half = 0; half < 2; ++half)
      std::memcpy(after_one + half * 128 + lane * 4, shared + half * 512 + lane * 16, 16);
    ptx::copy_wait<0>();
    __syncthreads();
    for (int half = 0; half < 2; ++half)
      std::memcpy(after_both + half * 128 + lane * 4, shared + half * 512 + lane * 16, 16);
  });
}

// Chunk addresses of a tile of `rows`, for 16-bit elements and for float32.
bool swizzle(int chunks, int rows, int* plain, int* pairs) {
  const auto try_all = [&]<int... kChunks>(std::integer_sequence<int, kChunks...>) {
    return ((chunks == kChunks && (fill_swizzle<kChunks>(rows, plain, pairs), true)) || ...);
  };
  return try_all(std::integer_sequence<int, 4, 6, 8, 10, 12, 16, 24, 32, 64>{});
}

const char* misuse(int which, uint64_t seed) {
  return run(64, 256, seed, [&] {
    VITKIT_DYNAMIC_SHARED(shared);
    misuse(which, shared);
  });
}
}
