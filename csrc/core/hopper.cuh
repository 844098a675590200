// PTX of sm_90a: barriers in shared memory, copies of boxes of a tensor, products by a warpgroup.
// Beside ptx.cuh the only file with asm; the emulator's twin is tests/emulator/emulated_hopper.h.
//
// A matrix in shared memory lies in panels of 16, 32 or 64 columns, which are rows of 32, 64 or 128
// bytes, one row behind the other; a box of a tensor becomes rows of one panel. Of a row r, 16-byte
// chunk c is where chunk c ^ (r / (8 / chunks) % chunks) would be: bits 4 to 6 of the address, as
// many as a row has chunks for, are mixed with bits 7 to 9. Panels begin at multiples of 1 KiB.
//
// A warpgroup is four warps, the first of them a multiple of four. Of a product's 64 rows warp w
// has 16 w to 16 w + 15, in the fragments of ptx.cuh: accumulator d[n] is that of columns 8 n on.
#pragma once

#include <type_traits>

#include "ptx.cuh"
#include "tensor_map.h"

// Kernels for sm_90a alone are compiled for every architecture, where they trap.
#if defined(VITKIT_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VITKIT_HOPPER
#endif

namespace vitkit {

constexpr int kWarpgroup = 128;

// A panel's row in bytes -> how a product reads the matrix: where it lies, the bytes from one panel
// to the next (looked at only where columns are the product's) and from eight rows to the next.
template <int kRowBytes>
__device__ __forceinline__ uint64_t matrix_at(uint32_t address, uint32_t panel_bytes) {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128);
  constexpr uint64_t kMode = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(panel_bytes >> 4 & 0x3fff) << 16 |
         uint64_t(8 * kRowBytes >> 4) << 32 | kMode << 62;
}

}  // namespace vitkit

#ifndef VITKIT_EMULATED

namespace vitkit::ptx {

// A barrier of 8 bytes whose phase ends when `arrivals` threads arrived and all expected bytes did.
__device__ __forceinline__ void phase_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Shows barriers that this thread initialised to copies. Other threads need __syncthreads.
__device__ __forceinline__ void phase_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void phase_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void phase_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits for the end of the current phase if its number is `parity` modulo 2, of the one before
// otherwise: phases count from 0, and that before the first has ended.
__device__ __forceinline__ void phase_wait(uint32_t barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Copies the box that begins at (column, row) of a head to `to`, and its bytes, zeros outside the
// tensor too, arrive at the barrier. By one thread.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier,
                                         int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(column), "r"(row), "r"(head),
      "r"(batch)
      : "memory");
}

// Before the first product of a warpgroup, and before one whose registers were written since.
__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of products.
__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kGroups of the warpgroup's groups are in flight.
template <int kGroups>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Keeps the compiler from reading accumulators before the wait above it.
template <int kTiles>
__device__ __forceinline__ void product_done(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

#define VITKIT_TILE(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define VITKIT_TILES_8                                                                            \
  VITKIT_TILE(0), VITKIT_TILE(1), VITKIT_TILE(2), VITKIT_TILE(3), VITKIT_TILE(4), VITKIT_TILE(5), \
      VITKIT_TILE(6), VITKIT_TILE(7)
#define VITKIT_TILES_10 VITKIT_TILES_8, VITKIT_TILE(8), VITKIT_TILE(9)
#define VITKIT_TILES_12 VITKIT_TILES_10, VITKIT_TILE(10), VITKIT_TILE(11)
#define VITKIT_TILES_16 \
  VITKIT_TILES_12, VITKIT_TILE(12), VITKIT_TILE(13), VITKIT_TILE(14), VITKIT_TILE(15)
#define VITKIT_LIST_8                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, "                                                                                      \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VITKIT_LIST_10 VITKIT_LIST_8 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define VITKIT_LIST_12 VITKIT_LIST_10 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VITKIT_LIST_16 \
  VITKIT_LIST_12       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = a b^T, + d if `add`: 64 x 16 by 16 x 128, rows of both matrices 16 columns deep.
#define VITKIT_PRODUCT_OF_ROWS(type)                                                   \
  asm volatile(                                                                        \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                     \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" VITKIT_LIST_16 \
      "}, "                                                                            \
      "%64, %65, p, 1, 1, 0, 0;\n}"                                                    \
      : VITKIT_TILES_16                                                                \
      : "l"(a), "l"(b), "r"(int(add)))

template <typename T>
__device__ __forceinline__ void product_of_rows(float (&d)[16][4], uint64_t a, uint64_t b,
                                                bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    VITKIT_PRODUCT_OF_ROWS("bf16");
  } else {
    VITKIT_PRODUCT_OF_ROWS("f16");
  }
}

// d += a b, 64 x 16 by 16 x columns of the accumulators: a in registers, 16 rows of b.
#define VITKIT_PRODUCT(type, tiles, columns, a0, a1, a2, a3, at_b)                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type       \
               " {" VITKIT_LIST_##tiles "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" at_b \
                                        ", 1, 1, 1, 1;"                                   \
               : VITKIT_TILES_##tiles                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define VITKIT_PRODUCT_OF_COLUMNS(type)                            \
  if constexpr (kTiles == 8) {                                     \
    VITKIT_PRODUCT(type, 8, "64", "32", "33", "34", "35", "36");   \
  } else if constexpr (kTiles == 10) {                             \
    VITKIT_PRODUCT(type, 10, "80", "40", "41", "42", "43", "44");  \
  } else if constexpr (kTiles == 12) {                             \
    VITKIT_PRODUCT(type, 12, "96", "48", "49", "50", "51", "52");  \
  } else {                                                         \
    static_assert(kTiles == 16);                                   \
    VITKIT_PRODUCT(type, 16, "128", "64", "65", "66", "67", "68"); \
  }

template <typename T, int kTiles>
__device__ __forceinline__ void product_of_columns(float (&d)[kTiles][4], const uint32_t (&a)[4],
                                                   uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    VITKIT_PRODUCT_OF_COLUMNS("bf16")
  } else {
    VITKIT_PRODUCT_OF_COLUMNS("f16")
  }
}

#undef VITKIT_PRODUCT_OF_COLUMNS
#undef VITKIT_PRODUCT
#undef VITKIT_PRODUCT_OF_ROWS

// Registers of a thread, by a whole warpgroup: gives those beyond kRegisters back, or takes them,
// and waits until there are so many.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A barrier of one warpgroup; `barrier`: 1 to 15, of which every warpgroup has its own.
__device__ __forceinline__ void warpgroup_barrier(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kWarpgroup) : "memory");
}

}  // namespace vitkit::ptx

#endif  // VITKIT_EMULATED
