// Which instruction set the CPU kernels run with. One shared library holds every kernel compiled
// for each set; the choice is made once per process from CPUID, the operating system and a
// self-test of the tile unit.
#pragma once

namespace vitkit::cpu {

enum class Isa { base = 0, avx2 = 1, avx512 = 2, amx = 3 };

Isa active_isa();

// True on the calling thread once the operating system has granted it the AMX tile registers
// (Linux: arch_prctl).
bool request_amx();

}  // namespace vitkit::cpu

// A kernel file defines `const Table& <op>_kernels()` in each namespace; the host file declares
// them with VITKIT_ISA_TABLE(Table, op_kernels) and calls vitkit::cpu::op_kernels().
#if defined(VITKIT_HAVE_AVX2)
#define VITKIT_IF_AVX2(...) __VA_ARGS__
#else
#define VITKIT_IF_AVX2(...)
#endif
#if defined(VITKIT_HAVE_AVX512)
#define VITKIT_IF_AVX512(...) __VA_ARGS__
#else
#define VITKIT_IF_AVX512(...)
#endif
#if defined(VITKIT_HAVE_AMX)
#define VITKIT_IF_AMX(...) __VA_ARGS__
#else
#define VITKIT_IF_AMX(...)
#endif

#define VITKIT_ISA_TABLE(Table, function)                         \
  namespace vitkit::cpu {                                         \
  namespace base {                                                \
  const Table& function();                                        \
  }                                                               \
  VITKIT_IF_AVX2(namespace avx2 { const Table& function(); })     \
  VITKIT_IF_AVX512(namespace avx512 { const Table& function(); }) \
  VITKIT_IF_AMX(namespace amx { const Table& function(); })       \
  inline const Table& function() {                                \
    switch (active_isa()) {                                       \
      case Isa::amx:                                              \
        VITKIT_IF_AMX(return amx::function();)                    \
      case Isa::avx512:                                           \
        VITKIT_IF_AVX512(return avx512::function();)              \
      case Isa::avx2:                                             \
        VITKIT_IF_AVX2(return avx2::function();)                  \
      case Isa::base:                                             \
        break;                                                    \
    }                                                             \
    return base::function();                                      \
  }                                                               \
  }
