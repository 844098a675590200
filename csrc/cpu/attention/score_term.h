// Score terms: what is added to a scaled score before the softmax. A term has
//   kNone              true: there is nothing to add, and row is never called
//   row(i, j0, n, body)  calls body(add) once, where add(x, j, lanes) returns
//                      x + term(i, j0 + j ...) * log2(e) for `lanes` (at most kLanes) consecutive
//                      keys, j + lanes <= n; x holds scaled scores in base-2 units
// The indirection lets a term choose its inner loop per row, and each core its own layout of
// scores.
#pragma once

#include "attention/params.h"
#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

struct NoTerm {
  static constexpr bool kNone = true;
};

// A bias or mask tensor of any broadcasting; `data` is at (batch, head, 0, 0).
struct DenseTerm {
  static constexpr bool kNone = false;
  const char* data;
  ElementType type;
  int64_t query_stride, key_stride;

  template <typename Body>
  void row(int64_t i, int64_t j0, int64_t, const Body& body) const {
    const int64_t first = i * query_stride + j0 * key_stride;
    switch (type) {
      case ElementType::f32:
        return body(Add<float>{reinterpret_cast<const float*>(data) + first, key_stride});
      case ElementType::bf16:
        return body(Add<bf16>{reinterpret_cast<const bf16*>(data) + first, key_stride});
      case ElementType::f16:
        return body(Add<f16>{reinterpret_cast<const f16*>(data) + first, key_stride});
      case ElementType::boolean:
        return body(Mask{reinterpret_cast<const uint8_t*>(data) + first, key_stride});
    }
  }

 private:
  template <typename B>
  struct Add {
    const B* bias;
    int64_t stride;

    f32v operator()(f32v x, int64_t j, int lanes) const {
      f32v b = {};
      if (stride == 1)
        b = load_partial(bias + j, lanes);
      else
        for (int l = 0; l < lanes; ++l) b[l] = to_float(bias[(j + l) * stride]);
      return fma(b, splat(kLog2e), x);
    }
  };

  struct Mask {
    const uint8_t* allowed;
    int64_t stride;

    f32v operator()(f32v x, int64_t j, int lanes) const {
      u8v bytes = {};
      if (stride == 1 && lanes == kLanes)
        std::memcpy(&bytes, allowed + j, kLanes);
      else
        for (int l = 0; l < lanes; ++l) bytes[l] = allowed[(j + l) * stride];
      return __builtin_convertvector(bytes, i32v) != 0 ? x : splat(-INFINITY);
    }

   private:
    using u8v = uint8_t __attribute__((vector_size(kLanes)));
  };
};

}  // namespace vitkit::cpu::VITKIT_ISA
