// Element types of the norm kernels, and tensors as rows: what host files and every instruction set
// share.
#pragma once

#include <cstdint>

namespace vitkit::cpu {

enum class NormElement { f32, bf16, f16 };

// Rows of a tensor, dense in its last dimension, `stride` elements apart: 0 where all rows are one.
// An absent tensor has no data.
struct Rows {
  const void* data;
  NormElement element;
  int64_t stride;
};

}  // namespace vitkit::cpu
