// Tensor-core products of tiles in shared memory, for 16-bit elements and for float32.
//
// Mma<T> has fragments A (16 rows x kDepth) and B (kDepth x 16 columns) and the accumulators of 16
// x 8 that ptx.cuh describes; an accumulator can become an A of the next product where it is, in
// registers. Float32 is split into two tf32, of which three products are taken: x y is off by about
// 2^-22 of itself, as a float32 product in a sum is.
#pragma once

#include "shared_tile.cuh"

namespace vitkit {

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32); }

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  Pack<T, 2> pair;
  pair.set(0, low);
  pair.set(1, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

template <typename T>
struct Mma {
  static constexpr int kDepth = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2][2];
  };

  // Rows `row` to `row` + 15, columns `k` to `k` + 15.
  template <int kColumns>
  static __device__ __forceinline__ A load_a(const SharedTile<T, kColumns>& t, int row, int k) {
    const int lane = lane_id();
    A a;
    ptx::load_matrices(a.r, t.address(row + lane % 16, k / 8 + lane / 16));
    return a;
  }
  // A of the transposed tile: its columns are rows `k` to `k` + 15 of it.
  template <int kColumns>
  static __device__ __forceinline__ A load_a_columns(const SharedTile<T, kColumns>& t, int k,
                                                     int row) {
    const int lane = lane_id();
    A a;
    ptx::load_matrices_transposed(a.r,
                                  t.address(k + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
    return a;
  }
  // Of the transposed tile: B's columns are rows `n` to `n` + 15 of it.
  template <int kColumns>
  static __device__ __forceinline__ B load_rows(const SharedTile<T, kColumns>& t, int n, int k) {
    const int lane = lane_id();
    uint32_t r[4];
    ptx::load_matrices(r, t.address(n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
    return {{{r[0], r[1]}, {r[2], r[3]}}};
  }
  // B's rows are rows `k` to `k` + 15 of the tile.
  template <int kColumns>
  static __device__ __forceinline__ B load_columns(const SharedTile<T, kColumns>& t, int k, int n) {
    const int lane = lane_id();
    uint32_t r[4];
    ptx::load_matrices_transposed(r, t.address(k + lane % 16, n / 8 + lane / 16));
    return {{{r[0], r[1]}, {r[2], r[3]}}};
  }
  static __device__ __forceinline__ A from_accumulators(const float (*d)[4]) {
    return {{pack_pair<T>(d[0][0], d[0][1]), pack_pair<T>(d[0][2], d[0][3]),
             pack_pair<T>(d[1][0], d[1][1]), pack_pair<T>(d[1][2], d[1][3])}};
  }
  static __device__ __forceinline__ void multiply(float (*d)[4], const A& a, const B& b) {
    ptx::multiply_16816<T>(d[0], a.r, b.r[0]);
    ptx::multiply_16816<T>(d[1], a.r, b.r[1]);
  }
};

// The eight k of a product are summed in any order, so column (row of B) p of a fragment is taken
// to be k = 2 p, and p + 4 to be k = 2 p + 1: what a lane holds of A is then what it holds of an
// accumulator, and pairs of columns are one access.
template <>
struct Mma<float> {
  static constexpr int kDepth = 8;
  struct Split {
    uint32_t high, low;
    __device__ __forceinline__ void set(float x) {
      high = ptx::to_tf32(x);
      float rounded;
      memcpy(&rounded, &high, 4);
      low = ptx::to_tf32(x - rounded);
    }
  };
  struct A {
    uint32_t high[4], low[4];
    __device__ __forceinline__ void set(int i, float x) {
      Split s;
      s.set(x);
      high[i] = s.high;
      low[i] = s.low;
    }
  };
  struct B {
    float r[2][2];
  };

  template <int kColumns>
  static __device__ __forceinline__ A load_a(const SharedTile<float, kColumns>& t, int row, int k) {
    const int group = lane_id() / 4, column = k + lane_id() % 4 * 2;
    A a;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto pair = Pack<float, 2>::load(t.at(row + group + half * 8, column));
      a.set(half, pair.element[0]);
      a.set(half + 2, pair.element[1]);
    }
    return a;
  }
  template <int kColumns>
  static __device__ __forceinline__ A load_a_columns(const SharedTile<float, kColumns>& t, int k,
                                                     int row) {
    const int group = lane_id() / 4, column = k + lane_id() % 4 * 2;
    A a;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a.set(half, *t.at(column, row + group + half * 8));
      a.set(half + 2, *t.at(column + 1, row + group + half * 8));
    }
    return a;
  }
  template <int kColumns>
  static __device__ __forceinline__ B load_rows(const SharedTile<float, kColumns>& t, int n,
                                                int k) {
    const int group = lane_id() / 4, column = k + lane_id() % 4 * 2;
    B b;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const auto pair = Pack<float, 2>::load(t.at(n + tile * 8 + group, column));
      b.r[tile][0] = pair.element[0];
      b.r[tile][1] = pair.element[1];
    }
    return b;
  }
  template <int kColumns>
  static __device__ __forceinline__ B load_columns(const SharedTile<float, kColumns>& t, int k,
                                                   int n) {
    const int group = lane_id() / 4, row = k + lane_id() % 4 * 2;
    B b;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      b.r[tile][0] = *t.at(row, n + tile * 8 + group);
      b.r[tile][1] = *t.at(row + 1, n + tile * 8 + group);
    }
    return b;
  }
  static __device__ __forceinline__ A from_accumulators(const float (*d)[4]) {
    A a;
    a.set(0, d[0][0]);
    a.set(1, d[0][2]);
    a.set(2, d[0][1]);
    a.set(3, d[0][3]);
    return a;
  }
  static __device__ __forceinline__ void multiply(float (*d)[4], const A& a, const B& b) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      Split s[2];
      s[0].set(b.r[tile][0]);
      s[1].set(b.r[tile][1]);
      const uint32_t high[2] = {s[0].high, s[1].high}, low[2] = {s[0].low, s[1].low};
      ptx::multiply_tf32_1688(d[tile], a.low, high);
      ptx::multiply_tf32_1688(d[tile], a.high, low);
      ptx::multiply_tf32_1688(d[tile], a.high, high);
    }
  }
};

}  // namespace vitkit
