// Warp operations on the registers of 32 lanes, laid out as the figures of the PTX manual have it.
#include "emulator.h"

#include <vector>

namespace emulator {

void nothing_op(void* const (&)[32]) {}

void shuffle_op(void* const (&lanes)[32]) {
  uint64_t values[32];
  for (int i = 0; i < 32; ++i) values[i] = static_cast<Shuffle*>(lanes[i])->value;
  for (int i = 0; i < 32; ++i) {
    auto* s = static_cast<Shuffle*>(lanes[i]);
    s->value = values[s->source & 31];
  }
}

template <bool kTransposed>
void load_matrix_op(void* const (&lanes)[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](int row, int column) {
        return uint32_t(static_cast<LoadMatrix*>(lanes[matrix * 8 + row])->row[column]);
      };
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = kTransposed ? element(column, row) : element(row, column);
      const uint32_t high = kTransposed ? element(column + 1, row) : element(row, column + 1);
      static_cast<LoadMatrix*>(lanes[lane])->out[matrix] = low | high << 16;
    }
  }
}
template void load_matrix_op<false>(void* const (&)[32]);
template void load_matrix_op<true>(void* const (&)[32]);

template <>
float widen<__nv_bfloat16>(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <>
float widen<__half>(uint32_t bits) {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t i = 0; i < all.size(); ++i) {
      const int exponent = int(i >> 10 & 31), fraction = int(i & 1023);
      const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                              : exponent == 0 ? std::ldexp(float(fraction), -24)
                                              : std::ldexp(float(1024 + fraction), exponent - 25);
      all[i] = i >> 15 ? -magnitude : magnitude;
    }
    return all;
  }();
  return values[bits & 0xffff];
}

namespace {

// The tensor core does not read the low 13 bits of a tf32.
float truncated(uint32_t bits) {
  bits &= 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <int kDepth>
void multiply(void* const (&lanes)[32], const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  float c[16][8] = {};
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<Multiply*>(lanes[lane])->d[i] += c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace

template <typename T>
void multiply_16816_op(void* const (&lanes)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* m = static_cast<Multiply*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[group + i % 2 * 8][pair + half + i / 2 * 8] = widen<T>(m->a[i] >> 16 * half & 0xffff);
      for (int i = 0; i < 2; ++i)
        b[pair + half + i * 8][group] = widen<T>(m->b[i] >> 16 * half & 0xffff);
    }
  }
  multiply<16>(lanes, a, b);
}
template void multiply_16816_op<__nv_bfloat16>(void* const (&)[32]);
template void multiply_16816_op<__half>(void* const (&)[32]);

void multiply_tf32_1688_op(void* const (&lanes)[32]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* m = static_cast<Multiply*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = truncated(m->a[i]);
    for (int i = 0; i < 2; ++i) b[lane % 4 + i * 4][lane / 4] = truncated(m->b[i]);
  }
  multiply<8>(lanes, a, b);
}

}  // namespace emulator
