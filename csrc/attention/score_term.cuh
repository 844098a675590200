// Score terms: what is added to a score before the softmax, in units of log2.
//
// A term has
//   kActive  there is one
//   kCosine  products of rows become cosines, times gain(span) (cosine.cuh)
//   add()    takes the accumulators of a warp's tile. Element i of accumulator n of a lane is, by
//            kTransposed, that of query `row` + i / 2 * 8 and key `column` + n * 8 + i % 2, or of
//            key `row` + ... and query `column` + ...
//   Sink     where the kernel of dq, a warp for 16 queries, leaves the gradient of the term
#pragma once

#include <stdint.h>

#include "element.cuh"
#include "token_map.cuh"

namespace vitkit::attention {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// For terms that have no gradient, or a kernel of their own for it.
struct NoSink {
  template <typename Term>
  __device__ __forceinline__ NoSink(const Term&, const Span&, unsigned char*, int64_t, bool) {}
  template <int kTiles>
  __device__ __forceinline__ void add(const float (&)[kTiles][4], const Span&, int, int) {}
  __device__ __forceinline__ void finish(const Span&) {}

  template <typename Term>
  static int shared_bytes(const Term&, int, int) {
    return 0;
  }
};

struct NoTerm {
  static constexpr bool kActive = false, kCosine = false;
  using Sink = NoSink;

  template <bool kTransposed, int kTiles>
  __device__ __forceinline__ void add(float (&)[kTiles][4], const Span&, int, int) const {}
};

__device__ __forceinline__ float log2_of_weight(bool allowed) { return allowed ? 0.f : -INFINITY; }
template <typename E>
__device__ __forceinline__ float log2_of_weight(E bias) {
  const float x = to_float(bias), scaled = x * kLog2e;
  // The lowest float32 as a bias: a row that has nothing else still attends, evenly.
  return scaled == -INFINITY && x > -INFINITY ? -3e38f : scaled;
}

// A tensor that broadcasts to [B, H, Nq, Nk]: a bias, or a mask of what may be attended. Strides
// are in elements, 0 where it broadcasts. Null data adds nothing.
struct DenseTerm {
  static constexpr bool kActive = true, kCosine = false;
  using Sink = NoSink;

  const void* data;
  Element element;
  int64_t batch, head, query, key;

  template <bool kTransposed, int kTiles>
  __device__ __forceinline__ void add(float (&s)[kTiles][4], const Span& span, int row,
                                      int column) const {
    if (data == nullptr) return;
    switch (element) {
      case Element::f32:
        return add_as<float, kTransposed>(s, span, row, column);
      case Element::bf16:
        return add_as<__nv_bfloat16, kTransposed>(s, span, row, column);
      case Element::f16:
        return add_as<__half, kTransposed>(s, span, row, column);
      case Element::boolean:
        return add_as<bool, kTransposed>(s, span, row, column);
    }
  }

 private:
  template <typename E, bool kTransposed, int kTiles>
  __device__ __forceinline__ void add_as(float (&s)[kTiles][4], const Span& span, int row,
                                         int column) const {
    const E* const plane = static_cast<const E*>(data) + span.batch * batch + span.head * head;
    const int64_t row_stride = kTransposed ? key : query, column_stride = kTransposed ? query : key;
    const int rows = kTransposed ? span.n_k : span.n_q, columns = kTransposed ? span.n_q : span.n_k;
    // Beyond the end, what is added does not matter.
    const E* const lines[2] = {plane + min(row, rows - 1) * row_stride,
                               plane + min(row + 8, rows - 1) * row_stride};
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = min(column + n * 8 + i, columns - 1) * column_stride;
        s[n][i] += log2_of_weight(lines[0][at]);
        s[n][2 + i] += log2_of_weight(lines[1][at]);
      }
  }
};

}  // namespace vitkit::attention
