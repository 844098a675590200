// What both directions of group_norm_silu share: parts of a sample and affine maps of a channel.
#pragma once

#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

VITKIT_INLINE Range part_of(int64_t positions, int64_t part, int64_t parts) {
  return {positions * part / parts, positions * (part + 1) / parts};
}

template <typename T>
VITKIT_INLINE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

template <typename T>
VITKIT_INLINE T* at(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}

// z = x * factor + term. The term is rounded once: it cancels against x * factor where a group lies
// far from 0.
struct Affine {
  float factor, term;
};

}  // namespace vitkit::cpu::VITKIT_ISA
