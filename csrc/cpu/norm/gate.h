// SiLU and both GELUs as one thing: z * sigmoid(g(z)), with
//
//   silu       g(z) = z
//   gelu_tanh  g(z) = sqrt(8 / pi) (z + 0.044715 z^3), an identity of tanh
//   gelu       g(z) = log(Phi(z) / Phi(-z)), an odd and almost cubic function
//
// So erf costs a polynomial in z^2 and the exponential that SiLU has, and both tails keep their
// leading digits, which 1 + erf(z) loses below -1. The polynomials minimise the largest error of
// gelu and of its derivative (an error of g counts little where the sigmoid hardly moves), g and g'
// each on its own; tests/test_gelu.py holds the errors.
#pragma once

#include "gated_activation.h"
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

// g(z) = z * q(z^2) and g'(z) = r(z^2) for |z| up to kEnd.
template <typename T>
struct NormalLogit;

// At most 2e-08 of gelu(z), 2e-08 of its derivative.
template <>
struct NormalLogit<float> {
  static constexpr float kEnd = 6.f;
  static constexpr float kValue[] = {
      1.59576976f,      0.0726676881f,    -6.85626801e-05f, -0.000107971493f, 6.97758151e-06f,
      -8.78529178e-08f, -1.40926799e-08f, 9.31182909e-10f,  -2.408314e-11f,   2.34314331e-13f};
  static constexpr float kSlope[] = {1.59576976f,      0.218008518f,    -0.000358900143f,
                                     -0.000739910058f, 5.54697144e-05f, 8.44780004e-07f,
                                     -4.39056663e-07f, 3.50559155e-08f, -1.40277967e-09f,
                                     2.90186816e-11f,  -2.45453153e-13f};
};

// At most 2e-05 of gelu(z), 1e-05 of its derivative.
template <>
struct NormalLogit<bf16> {
  static constexpr float kEnd = 5.f;
  static constexpr float kValue[] = {1.595384f, 0.0734953731f, -0.000527610187f, -1.54949266e-05f};
  static constexpr float kSlope[] = {1.59548819f, 0.219114989f, -0.00139148044f, -0.000405006926f,
                                     1.89984075e-05f};
};

// At most 1e-06 of gelu(z), 4e-07 of its derivative.
template <>
struct NormalLogit<f16> {
  static constexpr float kEnd = 5.5f;
  static constexpr float kValue[] = {1.59574378f,      0.0727398768f,   -0.000122595971f,
                                     -9.27132132e-05f, 5.41388954e-06f, -1.07233106e-07f};
  static constexpr float kSlope[] = {1.59576416f,      0.218013212f,   -0.000335263991f,
                                     -0.000772527244f, 7.1370283e-05f, -2.93349603e-06f,
                                     4.69387622e-08f};
};

constexpr float kSqrt8OverPi = 1.5957691216057308f, kTanhCubic = 0.044715f;

// Where the sigmoid is 0 or 1 for every purpose: |z * sigmoid(g(-z))| beyond is below 1e-8 for
// float32, 2e-6 for bfloat16, 3e-7 for float16.
template <typename T, Activation kActivation>
constexpr float kEnd = kActivation == Activation::gelu        ? NormalLogit<T>::kEnd
                       : kActivation == Activation::gelu_tanh ? 9.f
                                                              : 83.f;

// -g(z) / z in binary digits
template <typename T, Activation kActivation>
VITKIT_INLINE f32v logit_over(f32v s) {
  constexpr float kLinear = -kLog2e * kSqrt8OverPi;
  if constexpr (kActivation == Activation::silu) return splat(-kLog2e);
  if constexpr (kActivation == Activation::gelu)
    return polynomial(NormalLogit<T>::kValue, s, -kLog2e);
  return fma(s, splat(kLinear * kTanhCubic), splat(kLinear));
}

// g'(z)
template <typename T, Activation kActivation>
VITKIT_INLINE f32v logit_slope(f32v s) {
  if constexpr (kActivation == Activation::silu) return splat(1.f);
  if constexpr (kActivation == Activation::gelu) return polynomial(NormalLogit<T>::kSlope, s, 1.f);
  return fma(s, splat(3 * kSqrt8OverPi * kTanhCubic), splat(kSqrt8OverPi));
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
