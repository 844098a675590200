// Score terms: what is added to a scaled score before the softmax. A term has
//   kNone                               true: there is nothing to add, scores stay unscaled and apply is never called
//   apply(i, j0, n, scale, s)           s[j] = s[j] * scale + term(i, j0 + j) * log2(e) for j < n; returns the maximum
#pragma once

#include "attention/params.h"
#include "attention/softmax.h"

namespace vitkit::cpu::VITKIT_ISA {

struct NoTerm {
  static constexpr bool kNone = true;
  float apply(int64_t, int64_t, int64_t, float, float*) const { return 0.f; }
};

// A bias or mask tensor of any broadcasting; `data` is at (batch, head, 0, 0).
struct DenseTerm {
  static constexpr bool kNone = false;
  const char* data;
  ElementType type;
  int64_t query_stride, key_stride;

  float apply(int64_t i, int64_t j0, int64_t n, float scale, float* s) const {
    const int64_t first = i * query_stride + j0 * key_stride;
    switch (type) {
      case ElementType::f32:
        return add(reinterpret_cast<const float*>(data) + first, n, scale, s);
      case ElementType::bf16:
        return add(reinterpret_cast<const bf16*>(data) + first, n, scale, s);
      case ElementType::f16:
        return add(reinterpret_cast<const f16*>(data) + first, n, scale, s);
      case ElementType::boolean:
        return mask(reinterpret_cast<const uint8_t*>(data) + first, n, scale, s);
    }
    __builtin_unreachable();
  }

 private:
  template <typename B>
  float add(const B* bias, int64_t n, float scale, float* s) const {
    const f32v c = splat(scale), unit = splat(kLog2e);
    if (key_stride == 1)
      return row_map_max(s, n, [=](f32v x, int64_t j, int lanes) {
        return fma(load_partial(bias + j, lanes), unit, x * c);
      });
    return row_map_max(s, n, [=, this](f32v x, int64_t j, int lanes) {
      f32v b = {};
      for (int l = 0; l < lanes; ++l) b[l] = to_float(bias[(j + l) * key_stride]);
      return fma(b, unit, x * c);
    });
  }

  float mask(const uint8_t* allowed, int64_t n, float scale, float* s) const {
    const f32v c = splat(scale);
    return row_map_max(s, n, [=, this](f32v x, int64_t j, int lanes) {
      u8v bytes = {};
      if (key_stride == 1 && lanes == kLanes)
        std::memcpy(&bytes, allowed + j, kLanes);
      else
        for (int l = 0; l < lanes; ++l) bytes[l] = allowed[(j + l) * key_stride];
      return __builtin_convertvector(bytes, i32v) != 0 ? x * c : splat(-INFINITY);
    });
  }

  using u8v = uint8_t __attribute__((vector_size(kLanes)));
};

}  // namespace vitkit::cpu::VITKIT_ISA
