// swiglu, geglu and gelu for one instruction set: one read of each operand, one write of each
// result, two vectors at a time (bfloat16 as its even and odd elements).
#include "gated_activation.h"

#include "norm/gate.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

template <typename T>
VITKIT_INLINE T* at(ActivationRows rows, int64_t row, int64_t column) {
  return reinterpret_cast<T*>(rows.data) + row * rows.stride + column;
}

// Columns [column, column + n) of a row, one per item.
template <typename Params, typename F>
VITKIT_INLINE void each_item(const Params& p, int64_t begin, int64_t end, const F& f) {
  const int64_t chunks = p.chunks();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / chunks, column = item % chunks * p.chunk;
    const int64_t left = p.columns - column;
    f(row, column, left < p.chunk ? left : p.chunk);
  }
}

template <typename T, Activation kActivation, bool kGated>
void forward(const GatedForward& p, int64_t begin, int64_t end) {
  each_item(p, begin, end, [&](int64_t row, int64_t column, int64_t n) {
    const T* gate = at<T>(p.gate, row, column);
    const T* value = kGated ? at<T>(p.value, row, column) : nullptr;
    T* y = at<T>(p.y, row, column);
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      f32v z[4], w[4], v[4];
      load2(gate + i, z[0], z[1]);
      load2(gate + i + 2 * kLanes, z[2], z[3]);
      gate_weights<T, kActivation>(z, w);
      if constexpr (kGated) {
        load2(value + i, v[0], v[1]);
        load2(value + i + 2 * kLanes, v[2], v[3]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) w[k] = kGated ? z[k] * w[k] * v[k] : z[k] * w[k];
      store2(y + i, w[0], w[1]);
      store2(y + i + 2 * kLanes, w[2], w[3]);
    }
    each_vector(n - i, [&](int64_t k, auto count) {
      const f32v z[1] = {load_partial(gate + i + k, count)};
      f32v w[1];
      gate_weights<T, kActivation>(z, w);
      f32v a = z[0] * w[0];
      if constexpr (kGated) a *= load_partial(value + i + k, count);
      store_partial(y + i + k, a, count);
    });
  });
}

template <typename T, Activation kActivation, bool kGated>
void backward(const GatedBackward& p, int64_t begin, int64_t end) {
  each_item(p, begin, end, [&](int64_t row, int64_t column, int64_t n) {
    const T* grad = at<T>(p.grad, row, column);
    const T* gate = at<T>(p.gate, row, column);
    const T* value = kGated ? at<T>(p.value, row, column) : nullptr;
    T* dgate = at<T>(p.dgate, row, column);
    T* dvalue = kGated ? at<T>(p.dvalue, row, column) : nullptr;
    // z and v in, their gradients out.
    const auto differentiate = [&](f32v g, f32v& z, f32v& v) {
      f32v weight, slope;
      gate_weight_and_slope<T, kActivation>(z, weight, slope);
      const f32v dz = g * slope;
      if constexpr (kGated) {
        const f32v activated = z * weight;
        z = dz * v;
        v = g * activated;
      } else {
        z = dz;
      }
    };
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      f32v g, h, a, b, u = {}, v = {};
      load2(grad + i, g, h);
      load2(gate + i, a, b);
      if constexpr (kGated) load2(value + i, u, v);
      differentiate(g, a, u);
      differentiate(h, b, v);
      store2(dgate + i, a, b);
      if constexpr (kGated) store2(dvalue + i, u, v);
    }
    each_vector(n - i, [&](int64_t k, auto count) {
      f32v z = load_partial(gate + i + k, count), v = {};
      if constexpr (kGated) v = load_partial(value + i + k, count);
      differentiate(load_partial(grad + i + k, count), z, v);
      store_partial(dgate + i + k, z, count);
      if constexpr (kGated) store_partial(dvalue + i + k, v, count);
    });
  });
}

// Calls f<T, activation, gated>.
template <typename Params, typename F>
void dispatch(const Params& p, const F& f) {
  const auto with_activation = [&](auto element, auto activation) {
    if (p.value.data) return f(element, activation, std::true_type{});
    f(element, activation, std::false_type{});
  };
  const auto with_element = [&](auto element) {
    switch (p.activation) {
      case Activation::silu:
        return with_activation(element, std::integral_constant<Activation, Activation::silu>{});
      case Activation::gelu:
        return with_activation(element, std::integral_constant<Activation, Activation::gelu>{});
      case Activation::gelu_tanh:
        return with_activation(element,
                               std::integral_constant<Activation, Activation::gelu_tanh>{});
    }
  };
  switch (p.type) {
    case ElementType::f32:
      return with_element(float{});
    case ElementType::bf16:
      return with_element(bf16{});
    case ElementType::f16:
      return with_element(f16{});
    case ElementType::boolean:
      return;  // not an element type of this op: the host refuses it
  }
}

}  // namespace

const GatedKernels& gated_kernels() {
  static constexpr GatedKernels kernels{
      [](const GatedForward& p, int64_t begin, int64_t end) {
        dispatch(p, [&](auto element, auto activation, auto gated) {
          forward<decltype(element), decltype(activation)::value, decltype(gated)::value>(p, begin,
                                                                                          end);
        });
      },
      [](const GatedBackward& p, int64_t begin, int64_t end) {
        dispatch(p, [&](auto element, auto activation, auto gated) {
          backward<decltype(element), decltype(activation)::value, decltype(gated)::value>(p, begin,
                                                                                           end);
        });
      },
  };
  return kernels;
}

}  // namespace vitkit::cpu::VITKIT_ISA
