// One 16x16x32 bf16 tile product against plain arithmetic, run once before AMX is chosen: an
// emulator or hypervisor that advertises AMX but gets it wrong must cost speed, never numbers.
#include "simd.h"

#if defined(__AMX_BF16__)

namespace vitkit::cpu::VITKIT_ISA {

bool tile_self_test() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64};
    uint8_t rows[16] = {16, 16, 16};
  } config;
  alignas(64) bf16 a[16][32], b[16][32];
  alignas(64) float c[16][16], expected[16][16] = {};
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 32; ++j) {
      from_float(float((i * 7 + j * 3) % 17 - 8), &a[i][j]);
      from_float(float((i * 5 + j * 11) % 13 - 6), &b[i][j]);
    }
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j)
      for (int k = 0; k < 32; ++k)
        expected[i][j] += to_float(a[i][k]) * to_float(b[k / 2][2 * j + k % 2]);
  asm volatile("" ::: "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, 64);
  _tile_release();
  asm volatile("" ::: "memory");
  return std::memcmp(c, expected, sizeof(c)) == 0;
}

}  // namespace vitkit::cpu::VITKIT_ISA

#endif
