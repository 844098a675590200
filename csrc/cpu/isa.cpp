// Run-time choice of the instruction set, and its two C entry points for Python (tests force a
// lower set with them).
#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(VITKIT_HAVE_AMX)
namespace vitkit::cpu::amx {
bool tile_self_test();  // amx_self_test_kernel.cpp
}
#endif

namespace vitkit::cpu {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "amx"};

#if defined(VITKIT_HAVE_AMX)
bool cpu_has_amx_bf16() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return (edx & kBf16) && (edx & kTile) && __builtin_cpu_supports("avx512bf16") && request_amx() &&
         amx::tile_self_test();
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(VITKIT_HAVE_AVX2)
  // f16c has no name in __builtin_cpu_supports of older compilers; every CPU with AVX2 and FMA has
  // it.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::base;
#if defined(VITKIT_HAVE_AVX512)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
#if defined(VITKIT_HAVE_AMX)
  if (cpu_has_amx_bf16()) return Isa::amx;
#endif
  return Isa::avx512;
#else
  return Isa::avx2;
#endif
#endif
#endif
  return Isa::base;
}

Isa detected() {
  static const Isa isa = detect();
  return isa;
}

std::atomic<int> forced{-1};

}  // namespace

bool request_amx() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
  return granted;
#else
  return false;
#endif
}

Isa active_isa() {
  const int choice = forced.load(std::memory_order_relaxed);
  return choice < 0 ? detected() : Isa(choice);
}

}  // namespace vitkit::cpu

extern "C" {

// The name of the instruction set in use.
__attribute__((visibility("default"))) const char* vitkit_cpu_isa() {
  return vitkit::cpu::kNames[int(vitkit::cpu::active_isa())];
}

// Uses `name` from now on ("auto" undoes it). Returns 0, or 1 if this machine or build cannot run
// it.
__attribute__((visibility("default"))) int vitkit_force_cpu_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    vitkit::cpu::forced = -1;
    return 0;
  }
  for (int i = 0; i <= int(vitkit::cpu::detected()); ++i) {
    if (std::strcmp(name, vitkit::cpu::kNames[i]) == 0) {
      vitkit::cpu::forced = i;
      return 0;
    }
  }
  return 1;
}
}
