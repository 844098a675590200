// rope_2d for one instruction set. The rotation of a pair (a, b) is
//
//   y_a = a cos_a - b sin_a,  y_b = b cos_b + a sin_b       and transposed
//   y_a = a cos_a + b sin_b,  y_b = b cos_b - a sin_a
//
// where the tables need not hold the same value for both elements of a pair.
#include "rope_2d.h"

#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

using u64v = uint64_t __attribute__((vector_size(kLanes * 4)));

// Each lane exchanged with its neighbour: 0 with 1, 2 with 3, ...
VITKIT_INLINE f32v swap_pairs(f32v v) {
  const u64v u = u64v(v);
  return f32v((u << 32) | (u >> 32));
}

// Negated in even lanes.
VITKIT_INLINE f32v negate_first(f32v v) { return f32v(u32v(v) ^ (u32v(~lane_index() & 1) << 31)); }

// Pairs (j, j + half).
template <typename T, bool kInverse>
VITKIT_INLINE void turn_halves(const T* x, T* y, const float* cos, const float* sin, int64_t d) {
  const int64_t half = d / 2;
  each_vector(half, [&](int64_t j, auto count) {
    const auto both = [&](const auto* p, f32v& a, f32v& b) {
      a = load_partial(p + j, count);
      b = load_partial(p + half + j, count);
    };
    f32v a, b, cos_a, cos_b, sin_a, sin_b;
    both(x, a, b);
    both(cos, cos_a, cos_b);
    both(sin, sin_a, sin_b);
    const f32v of_b = kInverse ? b * sin_b : -(b * sin_a);
    const f32v of_a = kInverse ? -(a * sin_a) : a * sin_b;
    store_partial(y + j, fma(a, cos_a, of_b), count);
    store_partial(y + half + j, fma(b, cos_b, of_a), count);
  });
}

// Pairs (2 j, 2 j + 1).
template <typename T, bool kInverse>
VITKIT_INLINE void turn_neighbours(const T* x, T* y, const float* cos, const float* sin,
                                   int64_t d) {
  each_vector(d, [&](int64_t j, auto count) {
    const f32v v = load_partial(x + j, count), c = load_partial(cos + j, count);
    const f32v s = negate_first(load_partial(sin + j, count));
    const f32v other = kInverse ? swap_pairs(v * s) : swap_pairs(v) * s;
    store_partial(y + j, fma(v, c, other), count);
  });
}

template <typename T, bool kInterleaved, bool kInverse>
void rotate(const Rope& p, int64_t begin, int64_t end) {
  const auto row = [](RowsView rows, int64_t b, int64_t n, int64_t h) {
    return reinterpret_cast<T*>(rows.data) + b * rows.batch_stride + n * rows.token_stride +
           h * rows.head_stride;
  };
  const auto angles = [&](AngleTable table, int64_t b, int64_t n, int64_t h) {
    return table.data + b * table.batch_stride + (n - p.prefix) * table.token_stride +
           h * table.head_stride;
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.tokens, n = item % p.tokens;
    for (int64_t h = 0; h < p.heads; ++h) {
      const T* x = row(p.x, b, n, h);
      T* y = row(p.y, b, n, h);
      if (n < p.prefix) {
        std::memcpy(y, x, size_t(p.head_dim) * sizeof(T));
        continue;
      }
      const float *cos = angles(p.cos, b, n, h), *sin = angles(p.sin, b, n, h);
      if constexpr (kInterleaved) {
        turn_neighbours<T, kInverse>(x, y, cos, sin, p.head_dim);
      } else {
        turn_halves<T, kInverse>(x, y, cos, sin, p.head_dim);
      }
    }
  }
}

template <typename T>
void dispatch(const Rope& p, int64_t begin, int64_t end) {
  if (p.interleaved && p.inverse) return rotate<T, true, true>(p, begin, end);
  if (p.interleaved) return rotate<T, true, false>(p, begin, end);
  if (p.inverse) return rotate<T, false, true>(p, begin, end);
  rotate<T, false, false>(p, begin, end);
}

}  // namespace

const RopeKernels& rope_kernels() {
  static constexpr RopeKernels kernels{[](const Rope& p, int64_t begin, int64_t end) {
    switch (p.type) {
      case ElementType::f32:
        return dispatch<float>(p, begin, end);
      case ElementType::bf16:
        return dispatch<bf16>(p, begin, end);
      case ElementType::f16:
        return dispatch<f16>(p, begin, end);
      case ElementType::boolean:
        return;  // not an element type of this op: the host refuses it
    }
  }};
  return kernels;
}

}  // namespace vitkit::cpu::VITKIT_ISA
