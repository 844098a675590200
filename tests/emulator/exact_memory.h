// Tensors in memory of exact size, for the sanitizers to see what lies beyond it.
#pragma once

#include <cstdio>
#include <memory>
#include <random>

namespace emulator {

inline std::mt19937 random_numbers(1);

struct Memory {
  std::unique_ptr<unsigned char[]> data;

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data.get());
  }
};

inline Memory normal(size_t count) {
  std::normal_distribution<float> draw;
  Memory m{std::make_unique<unsigned char[]>(count * 2)};
  for (size_t i = 0; i < count; ++i)
    m.as<__nv_bfloat16>()[i] = __float2bfloat16(draw(random_numbers));
  return m;
}

inline Memory normal_floats(size_t count) {
  std::normal_distribution<float> draw;
  Memory m{std::make_unique<unsigned char[]>(count * 4)};
  for (size_t i = 0; i < count; ++i) m.as<float>()[i] = draw(random_numbers);
  return m;
}

inline Memory empty(size_t bytes) {
  Memory m{std::make_unique<unsigned char[]>(bytes)};
  std::memset(m.data.get(), 0xff, bytes);
  return m;
}

inline bool finite(const Memory& m, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (!std::isfinite(__bfloat162float(m.as<__nv_bfloat16>()[i]))) return false;
  return true;
}

inline bool finite_floats(const Memory& m, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (!std::isfinite(m.as<float>()[i])) return false;
  return true;
}

}  // namespace emulator
