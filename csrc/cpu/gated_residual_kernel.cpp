// gated_residual for one instruction set: out = x + gate * y, and its gradients, in one pass each.
#include "gated_residual.h"

#include "norm/rows.h"
#include "scratch.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

// The gates of a segment as float32, in the order of the kernel's pairs.
template <bool kSplit>
VITKIT_INLINE void fill_gates(const GatedShape& s, int64_t segment, float* to) {
  copy_row(s.gate, segment, s.width, 1.f, to);
  if constexpr (kSplit) split_pairs(to, s.width);
}

// G is float for the gates of a segment, in scratch, or the element of gates per token.
template <bool kSplit, typename T, typename G>
VITKIT_INLINE void write_row(const T* x, const T* y, const G* gate, T* out, int64_t n) {
  // Gates in scratch lie in the order of pairs already.
  constexpr bool kSplitGate = kSplit && std::is_same_v<T, G>;
  each_pair(
      n,
      [&](int64_t i) {
        f32v a, b, c, d, g, h;
        load_pair<kSplit>(x + i, a, b);
        load_pair<kSplit>(y + i, c, d);
        load_pair<kSplitGate>(gate + i, g, h);
        store_pair<kSplit>(out + i, fma(g, c, a), fma(h, d, b));
      },
      [&](int64_t i, auto count) {
        const f32v product = load_partial(gate + i, count) * load_partial(y + i, count);
        store_partial(out + i, load_partial(x + i, count) + product, count);
      });
}

template <typename T, typename M, bool kToken>
void forward_rows(const GatedForward& p, int64_t begin, int64_t end) {
  constexpr bool kSplit = kIsSplit<T, M>;
  const GatedShape& s = p.shape;
  const int64_t n = s.width;
  float* gates = static_cast<float*>(thread_scratch(size_t(n) * sizeof(float)));
  for (int64_t row = begin, prepared = -1; row < end; ++row) {
    const T *x = at<T>(p.x, row * n), *y = at<T>(p.y, row * n);
    T* out = at<T>(p.out, row * n);
    if constexpr (kToken) {
      write_row<kSplit>(x, y, at<M>(s.gate.data, row * s.gate.stride), out, n);
    } else {
      const int64_t segment = row / s.rows;
      if (segment != prepared) fill_gates<kSplit>(s, segment, gates);
      prepared = segment;
      write_row<kSplit>(x, y, gates, out, n);
    }
  }
}

// dy = gate * grad, dgate = grad * y of one token.
template <bool kSplit, typename T, typename M>
VITKIT_INLINE void token_gradient(const T* grad, const T* y, const M* gate, T* dy, M* dgate,
                                  int64_t n) {
  each_pair(
      n,
      [&](int64_t i) {
        f32v a, b, c, d, g, h;
        load_pair<kSplit>(grad + i, a, b);
        load_pair<kSplit>(y + i, c, d);
        load_pair<kSplit>(gate + i, g, h);
        store_pair<kSplit>(dy + i, a * g, b * h);
        store_pair<kSplit>(dgate + i, a * c, b * d);
      },
      [&](int64_t i, auto count) {
        const f32v a = load_partial(grad + i, count);
        store_partial(dgate + i, a * load_partial(y + i, count), count);
        store_partial(dy + i, a * load_partial(gate + i, count), count);
      });
}

// dy of R rows with one row of gates, and their share of its gradient.
template <bool kSplit, int R, typename T>
VITKIT_INLINE void segment_gradient(const T* grad, const T* y, const float* gates, T* dy,
                                    float* sums, int64_t n) {
  each_pair(
      n,
      [&](int64_t i) {
        const f32v g = load(gates + i), h = load(gates + i + kLanes);
        f32v s = load(sums + i), t = load(sums + i + kLanes);
        for (int r = 0; r < R; ++r) {
          f32v a, b, c, d;
          load_pair<kSplit>(grad + r * n + i, a, b);
          load_pair<kSplit>(y + r * n + i, c, d);
          store_pair<kSplit>(dy + r * n + i, a * g, b * h);
          s = fma(a, c, s);
          t = fma(b, d, t);
        }
        store(sums + i, s);
        store(sums + i + kLanes, t);
      },
      [&](int64_t i, auto count) {
        const f32v g = load_partial(gates + i, count);
        f32v s = load_partial(sums + i, count);
        for (int r = 0; r < R; ++r) {
          const f32v a = load_partial(grad + r * n + i, count);
          s = fma(a, load_partial(y + r * n + i, count), s);
          store_partial(dy + r * n + i, a * g, count);
        }
        store_partial(sums + i, s, count);
      });
}

template <typename T, typename M, bool kToken>
void backward_parts(const GatedBackward& p, int64_t begin, int64_t end) {
  constexpr bool kSplit = kIsSplit<T, M>;
  constexpr int kBlock = 4;
  const GatedShape& s = p.shape;
  const int64_t n = s.width;
  float* gates = static_cast<float*>(thread_scratch(size_t(n) * sizeof(float)));
  for (int64_t item = begin, prepared = -1; item < end; ++item) {
    const int64_t segment = item / p.parts, part = item % p.parts, first = segment * s.rows;
    int64_t row = first + s.rows * part / p.parts;
    const int64_t stop = first + s.rows * (part + 1) / p.parts;
    if constexpr (kToken) {
      for (; row < stop; ++row)
        token_gradient<kSplit>(at<T>(p.grad, row * n), at<T>(p.y, row * n),
                               at<M>(s.gate.data, row * s.gate.stride), at<T>(p.dy, row * n),
                               at<M>(p.dgate, row * n), n);
      continue;
    }
    if (segment != prepared) fill_gates<kSplit>(s, segment, gates);
    prepared = segment;
    float* sums = p.partial + item * n;
    fill(sums, n, 0.f);
    for (; row + kBlock <= stop; row += kBlock)
      segment_gradient<kSplit, kBlock>(at<T>(p.grad, row * n), at<T>(p.y, row * n), gates,
                                       at<T>(p.dy, row * n), sums, n);
    for (; row < stop; ++row)
      segment_gradient<kSplit, 1>(at<T>(p.grad, row * n), at<T>(p.y, row * n), gates,
                                  at<T>(p.dy, row * n), sums, n);
    if constexpr (kSplit) join_pairs(sums, n);
  }
}

// f(element, element of gates per token, whether there are such)
template <typename F>
void dispatch(const GatedShape& s, const F& f) {
  with_elements(s.element, s.per_token ? s.gate.element : s.element, [&](auto x, auto m) {
    if (s.per_token) return f(x, m, std::true_type{});
    if constexpr (std::is_same_v<decltype(x), decltype(m)>) f(x, m, std::false_type{});
  });
}

}  // namespace

const GatedKernels& gated_residual_kernels() {
  static constexpr GatedKernels kernels{
      [](const GatedForward& p, int64_t begin, int64_t end) {
        dispatch(p.shape, [&](auto x, auto m, auto token) {
          forward_rows<decltype(x), decltype(m), decltype(token)::value>(p, begin, end);
        });
      },
      [](const GatedBackward& p, int64_t begin, int64_t end) {
        dispatch(p.shape, [&](auto x, auto m, auto token) {
          backward_parts<decltype(x), decltype(m), decltype(token)::value>(p, begin, end);
        });
      },
  };
  return kernels;
}

}  // namespace vitkit::cpu::VITKIT_ISA
