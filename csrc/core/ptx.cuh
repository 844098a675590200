// Every PTX instruction that a kernel may use, for sm_80 and later. But for hopper.cuh nothing else
// contains asm: that lets the emulator (tests/emulator/emulated_ptx.h) stand in for this file.
//
// Fragments, by lane = 4 * group + pair (PTX manual, "Matrix fragments for mma"):
//   d of 16 x 8     d[0], d[1]: row group, columns 2 pair and 2 pair + 1; d[2], d[3]: row group + 8
//   a of 16 x 16    a[0] row group, a[1] row group + 8, columns 2 pair and 2 pair + 1; a[2], a[3]
//                   8 columns on
//   b of 16 x 8     b[0] column group, rows 2 pair and 2 pair + 1; b[1] 8 rows on
//   a of 16 x 8     (tf32) a[0], a[1] column pair, rows as above; a[2], a[3] 4 columns on
//   b of 8 x 8      (tf32) b[0] row pair, column group; b[1] 4 rows on
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#ifdef VITKIT_EMULATED
#include "emulated_ptx.h"
#else

namespace vitkit::ptx {

// A byte address in the block's shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes behind the thread's back, or writes 16 zero bytes and reads nothing.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kGroups of the thread's groups are in flight.
template <int kGroups>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + j gives the address of row j of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d += a b, 16 x 16 by 16 x 8, accumulated in float32.
template <typename T>
__device__ __forceinline__ void multiply_16816(float (&d)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_16816<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                              const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply_16816<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest tf32 (11 bits of significand), as a float.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// d += a b, 16 x 8 by 8 x 8, of tf32, accumulated in float32.
__device__ __forceinline__ void multiply_tf32_1688(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x to 2 ulp; -inf gives 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace vitkit::ptx

#endif
