// 16-byte accesses and conversion to float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Shared memory whose size the launch decides. The emulator has its own definition.
#ifndef VITKIT_DYNAMIC_SHARED
#define VITKIT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace vitkit {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void from_float(float x, float* y) { *y = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* y) {
  *y = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void from_float(float x, __half* y) { *y = __float2half_rn(x); }

// kSize elements moved by one instruction: 16 bytes, or a single element where alignment forbids
// it.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T element[kSize];

  static __device__ __forceinline__ Pack load(const T* p) {
    return *reinterpret_cast<const Pack*>(p);
  }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Pack*>(p) = *this; }
  __device__ __forceinline__ float get(int i) const { return to_float(element[i]); }
  __device__ __forceinline__ void set(int i, float value) { from_float(value, &element[i]); }
};

template <typename T>
inline constexpr int kFullPack = 16 / sizeof(T);

}  // namespace vitkit
