// Carves a thread's scratch into arrays, and keeps denormals from slowing a kernel down.
#pragma once

#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

// Run once over a null base, the same code that hands out the arrays tells how many bytes they
// need.
struct Arena {
  char* next;

  template <typename T>
  T* take(int64_t count) {
    char* p = next;
    next += (count * int64_t(sizeof(T)) + 63) & ~int64_t(63);
    return reinterpret_cast<T*>(p);
  }
};

// Denormal operands cost a hundred cycles each; probabilities far below the row maximum are full of
// them. The caller's floating-point mode is restored.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }  // FTZ, DAZ
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace vitkit::cpu::VITKIT_ISA
