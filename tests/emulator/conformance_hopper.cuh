// The part of the conformance program for sm_90a: copies of boxes, and products of a warpgroup of
// what they brought. Of small integers, whose sums are exact in any order.
#pragma once

#include "conformance_params.cuh"
#include "hopper.cuh"

namespace vitkit::conformance {

#ifdef VITKIT_HOPPER

// Shared memory from a multiple of 1 KiB on; a barrier behind 32 KiB, with a phase for every load.
struct Loader {
  unsigned char* memory;
  uint32_t base;
  int loads = 0;

  __device__ __forceinline__ explicit Loader(unsigned char* shared) {
    const uint32_t at = ptx::shared_address(shared);
    base = (at + 1023) / 1024 * 1024;
    memory = shared + (base - at);
    if (threadIdx.x == 0) {
      ptx::phase_init(base + 32 * 1024, 1);
      ptx::phase_init_done();
    }
    __syncthreads();
  }
  // A box of kBoxRows rows.
  __device__ __forceinline__ void box(const TensorMap& map, int at, int columns, int column,
                                      int row) {
    const uint32_t barrier = base + 32 * 1024;
    if (threadIdx.x == 0) {
      ptx::phase_arrive_expecting(barrier, kBoxRows * columns * 2);
      ptx::copy_box(base + at, map, barrier, column, row, 0, 0);
    }
    ptx::phase_wait(barrier, loads++ % 2);
    __syncthreads();  // nobody may sleep through the next phase
  }
};

#endif

// A box that lies in part outside the tensor, as it lies in shared memory.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) hopper_box_kernel(const __grid_constant__ Params p) {
#ifdef VITKIT_HOPPER
  constexpr int kColumns = 16 << kWidth;
  VITKIT_DYNAMIC_SHARED(shared);
  Loader loader(shared);
  loader.box(p.maps[0][kWidth], 0, kColumns, kNumberColumns - kColumns / 2, kNumberRows - 40);
  Output out(p);
  for (int i = 0; i < kColumns / 4; ++i) {
    uint32_t word;
    memcpy(&word, loader.memory + (int(threadIdx.x) * (kColumns / 4) + i) * 4, 4);
    out.word(word);
  }
#endif
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) hopper_rows_kernel(const __grid_constant__ Params p) {
#ifdef VITKIT_HOPPER
  constexpr int kColumns = 16 << kWidth, kRowBytes = kColumns * 2, kBytes = kBoxRows * kRowBytes;
  VITKIT_DYNAMIC_SHARED(shared);
  Loader loader(shared);
  const TensorMap& map = p.maps[std::is_same_v<T, __half>][kWidth];
  for (int i = 0; i < 3; ++i) loader.box(map, i * kBytes, kColumns, 8, i * kBoxRows);
  float d[16][4];
  ptx::product_fence();
#pragma unroll
  for (int at = 0; at < kRowBytes; at += 32)
    ptx::product_of_rows<T>(d, matrix_at<kRowBytes>(loader.base + at, 0),
                            matrix_at<kRowBytes>(loader.base + kBytes + at, 0), at > 0);
  ptx::product_commit();
  ptx::product_wait<0>();
  ptx::product_done(d);
  Output(p).bits(d);
#endif
}

// Panels of 16 << kWidth columns side by side; the other operand in registers.
template <typename T, int kWidth, int kTiles>
__global__ void __launch_bounds__(kThreads)
    hopper_columns_kernel(const __grid_constant__ Params p) {
#ifdef VITKIT_HOPPER
  constexpr int kColumns = 16 << kWidth, kRowBytes = kColumns * 2, kBytes = kBoxRows * kRowBytes;
  VITKIT_DYNAMIC_SHARED(shared);
  Loader loader(shared);
  const TensorMap& map = p.maps[std::is_same_v<T, __half>][kWidth];
  for (int i = 0; i < kTiles * 8 / kColumns; ++i)
    loader.box(map, i * kBytes, kColumns, i * kColumns, 3);
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = random_word(p, i);
    a[i] = pack_pair<T>(small_number(w, true), small_number(w >> 11, true));
  }
  float d[kTiles][4] = {};
  ptx::product_fence();
  // The second 16 rows.
  ptx::product_of_columns<T>(d, a, matrix_at<kRowBytes>(loader.base + 16 * kRowBytes, kBytes));
  ptx::product_commit();
  ptx::product_wait<0>();
  ptx::product_done(d);
  Output(p).bits(d);
#endif
}

}  // namespace vitkit::conformance
