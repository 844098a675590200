// What every kernel of the conformance program is given and gives.
#pragma once

#include <cstdint>
#include <cstring>

#include "mma.cuh"
#include "tensor_map.h"

namespace vitkit::conformance {

constexpr int kThreads = 128, kInputs = 4096;
// For Hopper's copies: small integers, and the rows of a box.
constexpr int kNumberRows = 200, kNumberColumns = 96, kBoxRows = 64;

struct Params {
  const uint32_t* in;  // [kInputs], random bits
  uint32_t* out;       // [kThreads, words]
  int words;           // a thread writes
  // Small integers in bfloat16 and in float16, by boxes of 16, 32 and 64 columns.
  TensorMap maps[2][3];
};

struct Output {
  uint32_t* to;
  __device__ __forceinline__ explicit Output(const Params& p)
      : to(p.out + int(threadIdx.x) * p.words) {}
  __device__ __forceinline__ void word(uint32_t w) { *to++ = w; }
  __device__ __forceinline__ void number(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    word(bits);
  }
  template <typename T>
  __device__ __forceinline__ void bits(const T& x) {
    static_assert(sizeof(T) % 4 == 0);
    uint32_t w[sizeof(T) / 4];
    memcpy(w, &x, sizeof(T));
    for (const uint32_t i : w) word(i);
  }
};

__device__ __forceinline__ uint32_t random_word(const Params& p, int i) {
  return p.in[(int(threadIdx.x) * 31 + i) % kInputs];
}
__device__ __forceinline__ float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// -8 to 7, or of [-1, 1) in steps of 2^-10.
__host__ __device__ __forceinline__ float small_number(uint32_t bits, bool whole) {
  return whole ? float(int(bits % 16) - 8) : float(int(bits % 2048) - 1024) / 1024.f;
}

}  // namespace vitkit::conformance
