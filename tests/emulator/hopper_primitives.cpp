// Entry points for ctypes: single primitives of csrc/core/hopper.cuh on the emulator.
#include "emulator.h"
// The vocabulary, by the same files nvcc compiles.
#include "hopper.cuh"

using namespace vitkit;

namespace {

constexpr uint32_t kBarrier = 96 * 1024, kShared = kBarrier + 64;

// One block; null, or what was undefined.
const char* run(int threads, uint64_t seed, const std::function<void()>& f) {
  const bool ok = emulator::launch(dim3(1), dim3(unsigned(threads)), kShared, seed, f);
  return ok ? nullptr : emulator::error();
}

void init_barrier(int arrivals) {
  if (threadIdx.x == 0) {
    ptx::phase_init(kBarrier, arrivals);
    ptx::phase_init_done();
  }
  __syncthreads();
}

// A dense [rows, columns] of 16 bits.
TensorMap map_of(const uint16_t* data, int64_t rows, int64_t columns, int box_columns,
                 int box_rows) {
  TensorMap map;
  const BoxedTensor t{data, columns, rows, 1, 1, columns, 0, 0, box_columns, box_rows};
  if (const char* error = encode(map, t)) emulator::fail({__FILE__, __LINE__}, "%s", error);
  return map;
}

// All panels of a matrix to `to`, by thread 0; every thread waits.
void load_panels(uint32_t to, const uint16_t* data, int rows, int columns, int panel, int parity) {
  const int panels = (columns + panel - 1) / panel, bytes = rows * panel * 2;
  if (threadIdx.x == 0) {
    const TensorMap map = map_of(data, rows, columns, panel, rows);
    ptx::phase_arrive_expecting(kBarrier, panels * bytes);
    for (int i = 0; i < panels; ++i)
      ptx::copy_box(to + uint32_t((bytes + 1023) / 1024 * 1024 * i), map, kBarrier, i * panel, 0, 0,
                    0);
  }
  ptx::phase_wait(kBarrier, parity);
  __syncthreads();  // nobody may sleep through the next phase
}

template <int kRowBytes>
void rows_product(const uint16_t* a, const uint16_t* b, int depth, bool half, float (&d)[16][4]) {
  constexpr int kPanel = kRowBytes / 2;
  constexpr uint32_t kB = 32 * 1024;
  init_barrier(1);
  load_panels(0, a, 64, depth, kPanel, 0);
  load_panels(kB, b, 128, depth, kPanel, 1);
  ptx::product_fence();
  for (int k = 0; k < depth; k += 16) {
    const uint32_t panel = uint32_t(k / kPanel), at = uint32_t(k % kPanel * 2);
    const uint64_t of_a = matrix_at<kRowBytes>(panel * 64 * kRowBytes + at, 0);
    const uint64_t of_b = matrix_at<kRowBytes>(kB + panel * 128 * kRowBytes + at, 0);
    if (half) {
      ptx::product_of_rows<__half>(d, of_a, of_b, k > 0);
    } else {
      ptx::product_of_rows<__nv_bfloat16>(d, of_a, of_b, k > 0);
    }
  }
  ptx::product_commit();
  ptx::product_wait<0>();
}

template <int kRowBytes, int kTiles>
void columns_product(const uint32_t* registers, const uint16_t* b, bool half, float* out) {
  init_barrier(1);
  load_panels(0, b, 32, kTiles * 8, kRowBytes / 2, 0);
  float d[kTiles][4];
  uint32_t a[2][4];
  for (int k = 0; k < 2; ++k) std::memcpy(a[k], registers + (k * 128 + int(threadIdx.x)) * 4, 16);
  for (auto& tile : d)
    for (float& x : tile) x = 1.f;
  ptx::product_fence();
  for (int k = 0; k < 2; ++k) {
    const uint64_t rows =
        matrix_at<kRowBytes>(uint32_t(k * 16 * kRowBytes), (32 * kRowBytes + 1023) / 1024 * 1024);
    if (half) {
      ptx::product_of_columns<__half>(d, a[k], rows);
    } else {
      ptx::product_of_columns<__nv_bfloat16>(d, a[k], rows);
    }
    ptx::product_commit();
  }
  ptx::product_wait<1>();
  ptx::product_wait<0>();
  std::memcpy(out + threadIdx.x * kTiles * 4, d, sizeof d);
}

// What a kernel must not do, by number.
void misuse(int which, const uint16_t* data, unsigned char* shared) {
  const bool first = threadIdx.x == 0;
  const TensorMap map = map_of(data, 64, 64, 64, 8);
  float d[8][4] = {};
  uint32_t a[4] = {};
  const auto begin = [&] { ptx::product_of_columns<__half>(d, a, matrix_at<128>(0, 0)); };
  switch (which) {
    case 0:  // a copy whose bytes arrive nowhere
      if (first) ptx::copy_box(0, map, kBarrier, 0, 0, 0, 0);
      break;
    case 1:  // a barrier that the copy engine does not know of
      if (first) {
        ptx::phase_init(kBarrier, 1);
        ptx::copy_box(0, map, kBarrier, 0, 0, 0, 0);
      }
      break;
    case 2:  // a box where no pattern begins
      init_barrier(1);
      if (first) ptx::copy_box(128, map, kBarrier, 0, 0, 0, 0);
      break;
    case 3:  // a box behind the end
      init_barrier(1);
      if (first) ptx::copy_box(kBarrier, map, kBarrier, 0, 0, 0, 0);
      break;
    case 4:  // more bytes expected than come
      init_barrier(1);
      if (first) {
        ptx::phase_arrive_expecting(kBarrier, 2048);
        ptx::copy_box(0, map, kBarrier, 0, 0, 0, 0);
      }
      ptx::phase_wait(kBarrier, 0);
      break;
    case 5:  // registers that were written, without a fence
      begin();
      break;
    case 6:  // a product nobody waits for
      ptx::product_fence();
      begin();
      ptx::product_commit();
      break;
    case 7:  // operands that have not arrived
      init_barrier(1);
      if (first) {
        ptx::phase_arrive_expecting(kBarrier, 1024);
        ptx::copy_box(0, map, kBarrier, 0, 0, 0, 0);
        ptx::product_fence();
        begin();
      }
      __syncthreads();
      break;
    case 8:  // accumulators that are written before the wait
      ptx::product_fence();
      begin();
      ptx::product_commit();
      d[0][0] = 1.f;
      ptx::product_wait<0>();
      break;
    case 9:  // an operand that is
      ptx::product_fence();
      begin();
      ptx::product_commit();
      a[0] = 1;
      ptx::product_wait<0>();
      break;
    case 10:  // two copies to one place
      init_barrier(1);
      if (first) {
        ptx::copy_box(0, map, kBarrier, 0, 0, 0, 0);
        ptx::copy_box(0, map, kBarrier, 0, 8, 0, 0);
      }
      break;
    case 11:  // a warp that skips the barrier of its warpgroup
      if (threadIdx.x >= 32) ptx::warpgroup_barrier(1);
      break;
    case 12:  // a barrier that nobody initialised
      ptx::phase_wait(kBarrier, 0);
      break;
    case 13:  // memory that a copy is to fill
      init_barrier(1);
      if (first) {
        ptx::phase_arrive_expecting(kBarrier, 1024);
        ptx::copy_box(0, map, kBarrier, 0, 0, 0, 0);
        uint32_t word;
        std::memcpy(&word, shared, 4);
        if (word == ~0u) emulator::fail({__FILE__, __LINE__}, "poison until it arrives");
      }
      ptx::phase_wait(kBarrier, 0);
      break;
  }
}

}  // namespace

extern "C" {

// data [batch, heads, rows, columns]; out: the box as it lies in shared memory.
const char* box(const uint16_t* data, const int64_t* sizes, const int* first, int columns, int rows,
                unsigned char* out, uint64_t seed) {
  return run(64, seed, [&] {
    VITKIT_DYNAMIC_SHARED(shared);
    init_barrier(1);
    if (threadIdx.x == 0) {
      TensorMap map;
      const BoxedTensor t{data,
                          sizes[3],
                          sizes[2],
                          sizes[1],
                          sizes[0],
                          sizes[3],
                          sizes[2] * sizes[3],
                          sizes[1] * sizes[2] * sizes[3],
                          columns,
                          rows};
      if (const char* error = encode(map, t)) emulator::fail({__FILE__, __LINE__}, "%s", error);
      ptx::phase_arrive_expecting(kBarrier, columns * rows * 2);
      ptx::copy_box(0, map, kBarrier, first[3], first[2], first[1], first[0]);
    }
    ptx::phase_wait(kBarrier, 0);
    for (int i = int(threadIdx.x); i < columns * rows * 2; i += 64) out[i] = shared[i];
  });
}

// How often `rounds` phases of a barrier, each of two arrivals and one box, were seen to end before
// all had arrived; and whether every box was there when it was.
const char* phases(const uint16_t* data, int rounds, int* early, int* missing, uint64_t seed) {
  int arrived = 0;
  return run(96, seed, [&] {
    VITKIT_DYNAMIC_SHARED(shared);
    init_barrier(2);
    const int warp = int(threadIdx.x) / 32;
    if (threadIdx.x == 0 || threadIdx.x == 32) {
      const TensorMap map = map_of(data, 64, 64, 64, 8);
      for (int i = 0; i < rounds; ++i) {
        ++arrived;
        if (warp) {
          ptx::phase_arrive(kBarrier);
        } else {
          ptx::phase_arrive_expecting(kBarrier, 1024);
          ptx::copy_box(uint32_t(i % 2) * 1024, map, kBarrier, 0, i * 8 % 64, 0, 0);
        }
        ptx::phase_wait(kBarrier, i % 2);
      }
    }
    if (threadIdx.x == 64) {
      ptx::phase_wait(kBarrier, 1);  // the phase before the first has ended
      ptx::phase_wait(kBarrier, 0);
      *early += arrived < 2;
      *missing += std::memcmp(shared, data, 2) != 0;
    }
  });
}

// a [64, depth], b [128, depth]; d [128 threads, 16, 4].
const char* product_of_rows(int row_bytes, bool half, int depth, const uint16_t* a,
                            const uint16_t* b, float* out, uint64_t seed) {
  return run(128, seed, [&] {
    float d[16][4];
    if (row_bytes == 32) rows_product<32>(a, b, depth, half, d);
    if (row_bytes == 64) rows_product<64>(a, b, depth, half, d);
    if (row_bytes == 128) rows_product<128>(a, b, depth, half, d);
    std::memcpy(out + threadIdx.x * 64, d, sizeof d);
  });
}

// registers [2, 128 threads, 4], b [32, 8 tiles]; d [128 threads, tiles, 4], from ones.
const char* product_of_columns(int tiles, bool half, const uint32_t* registers, const uint16_t* b,
                               float* out, uint64_t seed) {
  return run(128, seed, [&] {
    if (tiles == 8) columns_product<128, 8>(registers, b, half, out);
    if (tiles == 10) columns_product<32, 10>(registers, b, half, out);
    if (tiles == 12) columns_product<64, 12>(registers, b, half, out);
    if (tiles == 16) columns_product<128, 16>(registers, b, half, out);
  });
}

const char* hopper_misuse(int which, const uint16_t* data, uint64_t seed) {
  return run(128, seed, [&] {
    VITKIT_DYNAMIC_SHARED(shared);
    misuse(which, data, shared);
  });
}
}
