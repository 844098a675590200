// Sums and moments over a block. Orders are fixed, so results are the same on every run.
#pragma once

#include <stdint.h>

namespace vitkit {

constexpr int kWarp = 32;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The sum over all threads of a block of kThreads, in every thread.
template <int kThreads>
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float of_warp[kThreads / kWarp];
  v = warp_sum(v);
  __syncthreads();  // readers of the previous call are done
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) total += of_warp[i];
  return total;
}

// Sums over groups of kGroup consecutive threads, in each of them; all threads of the block call
// it. A group is a part of a warp, a warp, or the block.
template <int kGroup, int kCount>
__device__ __forceinline__ void group_sum(float (&v)[kCount]) {
  constexpr int kLanes = kGroup < kWarp ? kGroup : kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      v[i] += __shfl_xor_sync(0xffffffffu, v[i], offset);
  if constexpr (kGroup > kWarp) {
    __shared__ float of_warp[kGroup / kWarp][kCount];
    __syncthreads();  // readers of the previous call are done
    if (threadIdx.x % kWarp == 0)
      for (int i = 0; i < kCount; ++i) of_warp[threadIdx.x / kWarp][i] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = 0.f;
#pragma unroll
      for (int w = 0; w < kGroup / kWarp; ++w) v[i] += of_warp[w][i];
    }
  }
}

// Sums of up to `count` pairs for 32 columns at a time by a block of 8 warps: thread t takes every
// eighth of column t % 32, the eight sums are added in order. For threads below 32 only.
struct Pair {
  float first, second;

  __device__ __forceinline__ void add(const Pair& other) {
    first += other.first;
    second += other.second;
  }
};

constexpr int kColumnThreads = 8 * kWarp;

template <typename F>
__device__ __forceinline__ Pair column_sum(int64_t count, F&& f) {
  __shared__ Pair of_warp[kColumnThreads / kWarp][kWarp];
  Pair total{0.f, 0.f};
#pragma unroll 4
  for (int64_t i = threadIdx.x / kWarp; i < count; i += kColumnThreads / kWarp) total.add(f(i));
  of_warp[threadIdx.x / kWarp][threadIdx.x % kWarp] = total;
  __syncthreads();
  if (threadIdx.x < kWarp)
    for (int w = 1; w < kColumnThreads / kWarp; ++w) total.add(of_warp[w][threadIdx.x]);
  return total;
}

// Count, mean and sum of squared deviations of some values.
struct Moments {
  float count = 0.f, mean = 0.f, m2 = 0.f;

  // Chan, Golub and LeVeque's formula; either side may be empty.
  __device__ __forceinline__ void merge(const Moments& other) {
    const float total = count + other.count;
    if (total == 0.f) return;
    const float delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

template <int kThreads>
__device__ __forceinline__ Moments block_moments(Moments m) {
  __shared__ Moments of_warp[kThreads / kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Moments other;
    other.count = __shfl_down_sync(0xffffffffu, m.count, offset);
    other.mean = __shfl_down_sync(0xffffffffu, m.mean, offset);
    other.m2 = __shfl_down_sync(0xffffffffu, m.m2, offset);
    m.merge(other);
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = m;
  __syncthreads();
  Moments total = of_warp[0];
#pragma unroll
  for (int i = 1; i < kThreads / kWarp; ++i) total.merge(of_warp[i]);
  return total;
}

}  // namespace vitkit
