// The twin of csrc/core/ptx.cuh: the same functions, for the emulator.
#pragma once

#include "emulator.h"

namespace vitkit::ptx {

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - emulator::dynamic_shared());
}

inline void write_16_bytes(unsigned char* to, uint64_t low, uint64_t high) {
  // Not memset, which g++ expands without asking the sanitizers.
  auto* words = reinterpret_cast<uint64_t*>(to);
  words[0] = low;
  words[1] = high;
}

// Poison until somebody waits for the copy.
inline void copy_async(uint32_t to, const void* from, bool exists, EMULATED_HERE) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail(here, "misaligned source of a copy");
  write_16_bytes(emulator::shared_at(to, 16, here), ~0ull, ~0ull);
  emulator::begin_copy({to, exists ? from : nullptr}, here);
}

inline void copy_commit() { emulator::close_copy_group(); }

template <int kGroups>
inline void copy_wait(EMULATED_HERE) {
  for (emulator::Copy copy; emulator::next_copy(kGroups, copy);) {
    const auto* from = static_cast<const uint64_t*>(copy.from);
    unsigned char* const to = emulator::shared_at(copy.to, 16, here);
    write_16_bytes(to, from ? from[0] : 0, from ? from[1] : 0);
  }
}

template <bool kTransposed>
inline void load_matrices_as(uint32_t (&r)[4], uint32_t row, emulator::Site here) {
  emulator::LoadMatrix load;
  std::memcpy(load.row, emulator::shared_at(row, 16, here), 16);
  emulator::collective(emulator::load_matrix_op<kTransposed>, &load, false, here);
  std::memcpy(r, load.out, 16);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t row, EMULATED_HERE) {
  load_matrices_as<false>(r, row, here);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t row, EMULATED_HERE) {
  load_matrices_as<true>(r, row, here);
}

template <typename T>
inline void multiply_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           EMULATED_HERE) {
  emulator::Multiply m{d, a, b};
  emulator::collective(emulator::multiply_16816_op<T>, &m, false, here);
}

inline void multiply_tf32_1688(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               EMULATED_HERE) {
  emulator::Multiply m{d, a, b};
  emulator::collective(emulator::multiply_tf32_1688_op, &m, false, here);
}

// Rounds to nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace vitkit::ptx
