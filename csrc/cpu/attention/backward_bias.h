// Where the gradient of a score term goes. A sink has
//   kNone          true: there is no gradient, and add is never called
//   kExactDelta    true: delta is summed from P and dP, not from the rounded `out`; all keys of a
//                  query are then in one cell
//   kChanges       true: add leaves the gradient of the scaled product of rows in ds
//   add(i, j0, n, ds)   ds[j] is the gradient of the score of query i and key j0 + j, j < n; zero
//                  behind, up to a whole vector
#pragma once

#include "attention/pack.h"
#include "attention/params.h"

namespace vitkit::cpu::VITKIT_ISA {

struct NoSink {
  static constexpr bool kNone = true;
  static constexpr bool kExactDelta = false, kChanges = false;
  void add(int64_t, int64_t, int64_t, const float*) const {}
};

// The gradient of a bias tensor; `data` is at (batch, head, 0, 0).
struct DenseSink {
  static constexpr bool kNone = false;
  static constexpr bool kExactDelta = false, kChanges = false;
  char* data;
  ElementType type;
  bool accumulate;
  int64_t query_stride, key_stride;  // key_stride is 0 or 1

  void add(int64_t i, int64_t j0, int64_t n, const float* ds) const {
    const int64_t first = i * query_stride + j0 * key_stride;
    if (!accumulate) return write(first, n, ds);
    float* to = reinterpret_cast<float*>(data) + first;
    int64_t j = 0;
    if (key_stride == 1) {
      for (; j + kLanes <= n; j += kLanes) store(to + j, load(to + j) + load(ds + j));
      for (; j < n; ++j) to[j] += ds[j];
    } else {
      f32v sum = {};
      for (; j + kLanes <= n; j += kLanes) sum += load(ds + j);
      if (j < n) sum += load_partial(ds + j, int(n - j));
      *to += reduce_add(sum);
    }
  }

 private:
  void write(int64_t first, int64_t n, const float* ds) const {
    switch (type) {
      case ElementType::f32:
        return write_row(ds, n, 1.f, reinterpret_cast<float*>(data) + first);
      case ElementType::bf16:
        return write_row(ds, n, 1.f, reinterpret_cast<bf16*>(data) + first);
      case ElementType::f16:
        return write_row(ds, n, 1.f, reinterpret_cast<f16*>(data) + first);
      case ElementType::boolean:
        return;
    }
  }
};

}  // namespace vitkit::cpu::VITKIT_ISA
