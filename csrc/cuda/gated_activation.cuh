// Device code of swiglu, geglu and gelu and its launches. No torch header: the emulator compiles
// this very file.
//
// value and gate are rows at a distance of their own, so that the halves of a packed tensor are
// read, and their gradients written, where they lie. Rows without gaps are one long row. Every
// element is read once and written once.
#pragma once

#include <type_traits>

#include "gate_fits.h"
#include "launch_kernel.cuh"
#include "ptx.cuh"
#include "tiling.cuh"

namespace vitkit::gated_activation {

// Rows of dense elements, `stride` elements apart. Data is null where the op has no such operand.
struct Rows {
  void* data;
  int64_t stride;
};

struct ForwardParams {
  int64_t rows, columns;
  Rows value, gate, y;
  Tiling tiling;
};

struct BackwardParams {
  int64_t rows, columns;
  Rows grad, value, gate, dvalue, dgate;
  Tiling tiling;
};

// ---- activations, by the fits of gate_fits.h ----

template <typename T>
constexpr int kSignificantBits = std::is_same_v<T, float>    ? 24
                                 : std::is_same_v<T, __half> ? 11
                                                             : 8;

// factor * (kC[n - 1] s^(n - 1) + ... + kC[kFrom])
template <const auto& kC, int kFrom = 0>
__device__ __forceinline__ float polynomial(float s, float factor) {
  constexpr int kLast = int(sizeof(kC) / sizeof(float)) - 1;
  constexpr float c = kC[kFrom];
  if constexpr (kFrom < kLast) {
    return fmaf(polynomial<kC, kFrom + 1>(s, factor), s, c * factor);
  } else {
    return c * factor;
  }
}

template <typename T, Activation kActivation>
struct Gate {
  using Fit = std::conditional_t<kActivation == Activation::gelu_tanh, TanhLogit,
                                 NormalLogit<kSignificantBits<T>>>;
  float z, weight;  // weight: activation(z) / z, 0 far below: -infinity gives NaN, as in PyTorch

  __device__ __forceinline__ explicit Gate(float z) : z(z) {
    constexpr float end = kLogitEnd<kSignificantBits<T>, kActivation>;
    // Comparisons that let NaN pass.
    x_ = z < -end ? -end : z > end ? end : z;
    constexpr float kLog2e = 1.4426950408889634f;
    if constexpr (kActivation == Activation::silu) {
      e_ = ptx::exp2_approx(x_ * -kLog2e);
    } else {
      e_ = ptx::exp2_approx(x_ * polynomial<Fit::kValue>(x_ * x_, -kLog2e));
    }
    whole_ = __fdividef(1.f, 1.f + e_);
    weight = z < -end ? 0.f : whole_;
  }

  // d activation(z) / dz. That of the sigmoid is weight * (1 - weight), without the subtraction.
  __device__ __forceinline__ float slope() const {
    float g = 1.f;
    if constexpr (kActivation != Activation::silu) g = polynomial<Fit::kSlope>(x_ * x_, 1.f);
    return fmaf(x_ * weight, e_ * whole_ * g, weight);
  }

 private:
  float x_, e_, whole_;  // z within the fit, exp(-g(z)), the weight before it is cut off
};

// ---- kernels ----

template <typename T>
__device__ __forceinline__ T* start(const Rows& r, int64_t row, int64_t column) {
  return static_cast<T*>(r.data) + row * r.stride + column;
}

template <typename T, int kPack, Activation kActivation, bool kGated>
__global__ void __launch_bounds__(kTileThreads)
    gated_activation_fwd_kernel(const __grid_constant__ ForwardParams p) {
  using P = Pack<T, kPack>;
  const Tiling::Place at = p.tiling.place(blockIdx.x);
  if (!at.exists) return;
  const int64_t column = at.unit * kPack, left = p.columns - column;
  const P gate = load_part<T, kPack>(start<const T>(p.gate, at.row, column), left);
  P value, y;
  if constexpr (kGated) value = load_part<T, kPack>(start<const T>(p.value, at.row, column), left);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const Gate<T, kActivation> g(gate.get(k));
    float out = g.z * g.weight;
    if constexpr (kGated) out *= value.get(k);
    y.set(k, out);
  }
  store_part(y, start<T>(p.y, at.row, column), left);
}

template <typename T, int kPack, Activation kActivation, bool kGated>
__global__ void __launch_bounds__(kTileThreads)
    gated_activation_bwd_kernel(const __grid_constant__ BackwardParams p) {
  using P = Pack<T, kPack>;
  const Tiling::Place at = p.tiling.place(blockIdx.x);
  if (!at.exists) return;
  const int64_t column = at.unit * kPack, left = p.columns - column;
  const P grad = load_part<T, kPack>(start<const T>(p.grad, at.row, column), left);
  const P gate = load_part<T, kPack>(start<const T>(p.gate, at.row, column), left);
  P value, dvalue, dgate;
  if constexpr (kGated) value = load_part<T, kPack>(start<const T>(p.value, at.row, column), left);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const Gate<T, kActivation> g(gate.get(k));
    float dz = grad.get(k) * g.slope();
    if constexpr (kGated) {
      dz *= value.get(k);
      dvalue.set(k, grad.get(k) * (g.z * g.weight));
    }
    dgate.set(k, dz);
  }
  store_part(dgate, start<T>(p.dgate, at.row, column), left);
  if constexpr (kGated) store_part(dvalue, start<T>(p.dvalue, at.row, column), left);
}

// ---- launches ----

// Makes rows without gaps one row; whether packs of 16 bytes begin where all rows do.
template <size_t kCount>
bool join_rows(int64_t& rows, int64_t& columns, Rows* const (&all)[kCount], int bytes) {
  bool dense = true, packs = true;
  for (const Rows* r : all) dense = dense && (r->data == nullptr || r->stride == columns);
  if (dense) {
    columns *= rows;
    rows = 1;
  }
  for (const Rows* r : all)
    packs = packs && aligned(r->data) && (rows == 1 || r->stride * bytes % 16 == 0);
  return packs;
}

// value.data is null without kGated.
template <Activation kActivation, bool kGated>
const char* launch_forward(ForwardParams p, Element element, Stream stream) {
  const bool packs = join_rows(p.rows, p.columns, {&p.value, &p.gate, &p.y}, bytes_of(element));
  return with_pack(element, packs, [&](auto* type, auto pack) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    const char* error = make_tiling(p.tiling, 1, p.rows, (p.columns + pack - 1) / pack);
    if (error) return error;
    return launch_kernel(&gated_activation_fwd_kernel<T, pack, kActivation, kGated>,
                         blocks_of(p.tiling), kTileThreads, 0, stream, p);
  });
}

template <Activation kActivation, bool kGated>
const char* launch_backward(BackwardParams p, Element element, Stream stream) {
  const bool packs = join_rows(p.rows, p.columns, {&p.grad, &p.value, &p.gate, &p.dvalue, &p.dgate},
                               bytes_of(element));
  return with_pack(element, packs, [&](auto* type, auto pack) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    const char* error = make_tiling(p.tiling, 1, p.rows, (p.columns + pack - 1) / pack);
    if (error) return error;
    return launch_kernel(&gated_activation_bwd_kernel<T, pack, kActivation, kGated>,
                         blocks_of(p.tiling), kTileThreads, 0, stream, p);
  });
}

}  // namespace vitkit::gated_activation
