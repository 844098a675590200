// SiLU and both GELUs as one thing: z * sigmoid(g(z)), with
//
//   silu       g(z) = z
//   gelu_tanh  g(z) = sqrt(8 / pi) (z + 0.044715 z^3), an identity of tanh
//   gelu       g(z) = log(Phi(z) / Phi(-z)), an odd and almost cubic function
//
// So erf costs a polynomial in z^2 and the exponential that SiLU has, and both tails keep their
// leading digits, which 1 + erf(z) loses below -1. The polynomials minimise the largest error of
// gelu and of its derivative (an error of g counts little where the sigmoid hardly moves), g and g'
// each on its own; tests/test_gelu.py holds the errors. Kernels of CPUs and GPUs share them.
#pragma once

namespace vitkit {

enum class Activation : int { silu, gelu, gelu_tanh };

// g(z) = z * q(z^2) and g'(z) = r(z^2) for |z| up to kEnd, as exact as the elements: float32 has 24
// significant bits, bfloat16 8, float16 11.
template <int kBits>
struct NormalLogit;

// At most 2e-08 of gelu(z), 2e-08 of its derivative.
template <>
struct NormalLogit<24> {
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
struct NormalLogit<8> {
  static constexpr float kEnd = 5.f;
  static constexpr float kValue[] = {1.595384f, 0.0734953731f, -0.000527610187f, -1.54949266e-05f};
  static constexpr float kSlope[] = {1.59548819f, 0.219114989f, -0.00139148044f, -0.000405006926f,
                                     1.89984075e-05f};
};

// At most 1e-06 of gelu(z), 4e-07 of its derivative.
template <>
struct NormalLogit<11> {
  static constexpr float kEnd = 5.5f;
  static constexpr float kValue[] = {1.59574378f,      0.0727398768f,   -0.000122595971f,
                                     -9.27132132e-05f, 5.41388954e-06f, -1.07233106e-07f};
  static constexpr float kSlope[] = {1.59576416f,      0.218013212f,   -0.000335263991f,
                                     -0.000772527244f, 7.1370283e-05f, -2.93349603e-06f,
                                     4.69387622e-08f};
};

// g and g' of gelu_tanh, in the same form.
struct TanhLogit {
  static constexpr float kSqrt8OverPi = 1.5957691216057308f, kCubic = 0.044715f;
  static constexpr float kValue[] = {kSqrt8OverPi, kSqrt8OverPi * kCubic};
  static constexpr float kSlope[] = {kSqrt8OverPi, 3 * kSqrt8OverPi * kCubic};
};

// Where the sigmoid is 0 or 1 for every purpose: |z * sigmoid(g(-z))| beyond is below 1e-8 for
// float32, 2e-6 for bfloat16, 3e-7 for float16.
template <int kBits, Activation kActivation>
inline constexpr float kLogitEnd = kActivation == Activation::gelu        ? NormalLogit<kBits>::kEnd
                                   : kActivation == Activation::gelu_tanh ? 9.f
                                                                          : 83.f;

}  // namespace vitkit
