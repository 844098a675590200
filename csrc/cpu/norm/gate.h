// Gates of several vectors: activation(z) / z and the derivatives of the activations, by the fits
// of csrc/core/gate_fits.h.
#pragma once

#include "gate_fits.h"
#include "norm/activation.h"

namespace vitkit::cpu::VITKIT_ISA {

// factor * (c[n - 1] s^(n - 1) + ... + c[0]), even and odd powers apart: half the latency.
template <int n>
VITKIT_INLINE f32v polynomial(const float (&c)[n], f32v s, float factor) {
  constexpr int kLast = n - 1;
  const f32v square = s * s;
  f32v p = splat(factor * c[kLast]), q = splat(factor * c[kLast - 1]);
#pragma GCC unroll 8
  for (int i = kLast - 2; i > 0; i -= 2) {
    p = fma(p, square, splat(factor * c[i]));
    q = fma(q, square, splat(factor * c[i - 1]));
  }
  if constexpr (n % 2 == 0) return fma(p, s, q);
  return fma(q, s, fma(p, square, splat(factor * c[0])));
}

template <typename T>
inline constexpr int kSignificantBits = 24;
template <>
inline constexpr int kSignificantBits<bf16> = 8;
template <>
inline constexpr int kSignificantBits<f16> = 11;
template <typename T>
using NormalLogit = vitkit::NormalLogit<kSignificantBits<T>>;
template <typename T, Activation kActivation>
constexpr float kEnd = kLogitEnd<kSignificantBits<T>, kActivation>;

// -g(z) / z in binary digits
template <typename T, Activation kActivation>
VITKIT_INLINE f32v logit_over(f32v s) {
  if constexpr (kActivation == Activation::silu) return splat(-kLog2e);
  if constexpr (kActivation == Activation::gelu)
    return polynomial(NormalLogit<T>::kValue, s, -kLog2e);
  return polynomial(TanhLogit::kValue, s, -kLog2e);
}

// g'(z)
template <typename T, Activation kActivation>
VITKIT_INLINE f32v logit_slope(f32v s) {
  if constexpr (kActivation == Activation::silu) return splat(1.f);
  if constexpr (kActivation == Activation::gelu) return polynomial(NormalLogit<T>::kSlope, s, 1.f);
  return polynomial(TanhLogit::kSlope, s, 1.f);
}

template <typename T, Activation kActivation>
VITKIT_INLINE f32v limited(f32v z) {
  constexpr float end = kEnd<T, kActivation>;
  return max(splat(-end), min(splat(end), z));
}

// activation(z) / z of several vectors, step by step for all of them: one alone is a chain of
// dependent instructions longer than a core looks ahead. 0 far below zero, so that -infinity gives
// NaN as it does in PyTorch.
template <typename T, Activation kActivation, int n>
VITKIT_INLINE void gate_weights(const f32v (&z)[n], f32v (&weight)[n]) {
  f32v t[n];
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
    const f32v x = limited<T, kActivation>(z[i]);
    t[i] = x * logit_over<T, kActivation>(x * x);
  }
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) t[i] = exp2_for<T>(t[i]);
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
    const f32v w = reciprocal<T>(1.f + t[i]);
    weight[i] = z[i] > splat(-kEnd<T, kActivation>) ? w : f32v{};
  }
}

// activation(z) / z, and d activation(z) / dz. The derivative of the sigmoid is weight * rest with
// rest = 1 - weight, computed without that subtraction.
template <typename T, Activation kActivation>
VITKIT_INLINE void gate_weight_and_slope(f32v z, f32v& weight, f32v& slope) {
  const f32v x = limited<T, kActivation>(z), s = x * x;
  const f32v e = exp2_for<T>(x * logit_over<T, kActivation>(s));
  const f32v w = reciprocal<T>(1.f + e);
  weight = z > splat(-kEnd<T, kActivation>) ? w : f32v{};
  slope = fma(x * weight, e * w * logit_slope<T, kActivation>(s), weight);
}

}  // namespace vitkit::cpu::VITKIT_ISA
