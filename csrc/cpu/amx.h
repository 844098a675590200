// The few AMX instructions the kernels use. All eight tiles are 16 rows of 64 bytes: 16 x 16
// float32 sums, or 16 x 32 bfloat16 operands, the right one as pairs of consecutive k side by side
// ("VNNI": row p holds b[2p][n], b[2p + 1][n]).
//
// With -DVITKIT_EMULATE_AMX the same vocabulary is plain C++, so that a kernel file runs unchanged
// on any machine.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) || defined(VITKIT_EMULATE_AMX)
#define VITKIT_AMX

namespace vitkit::cpu::VITKIT_ISA {

constexpr int kTileRowBytes = 64;

#if defined(VITKIT_EMULATE_AMX)

struct EmulatedTile {
  alignas(64) unsigned char bytes[16][kTileRowBytes];
};
static thread_local EmulatedTile emulated_tiles[8];
static thread_local bool emulated_tiles_configured = false;

// Holds the tile unit of this thread. Tiles start as NaN: hardware zeroes them, but no kernel may
// rely on it.
class TileUnit {
 public:
  TileUnit() {
    std::memset(emulated_tiles, 0xff, sizeof(emulated_tiles));
    emulated_tiles_configured = true;
  }
  ~TileUnit() { emulated_tiles_configured = false; }
};

template <int kTile>
VITKIT_INLINE EmulatedTile& emulated_tile() {
  if (!emulated_tiles_configured) __builtin_trap();
  return emulated_tiles[kTile];
}

template <int kTile>
VITKIT_INLINE void tile_zero() {
  std::memset(&emulated_tile<kTile>(), 0, sizeof(EmulatedTile));
}

template <int kTile>
VITKIT_INLINE void tile_load(const void* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(emulated_tile<kTile>().bytes[r], static_cast<const char*>(p) + r * stride_bytes,
                kTileRowBytes);
}

template <int kTile>
VITKIT_INLINE void tile_store(void* p, int64_t stride_bytes) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(static_cast<char*>(p) + r * stride_bytes, emulated_tile<kTile>().bytes[r],
                kTileRowBytes);
}

// c += a b. As the hardware: even and odd k are summed apart, in float32. Sanitizers have nothing
// to find in tiles of fixed size, but would take most of the time.
[[maybe_unused]] static __attribute__((noinline, no_sanitize("address", "undefined"))) void
emulated_multiply(EmulatedTile* c, const EmulatedTile& a, const EmulatedTile& b) {
  for (int m = 0; m < 16; ++m) {
    u32v row;
    f32v sums, even = {}, odd = {};
    std::memcpy(&row, a.bytes[m], sizeof(row));
    const f32v a_even = (f32v)(row << 16), a_odd = (f32v)(row & 0xffff0000u);
    for (int k = 0; k < 16; ++k) {
      std::memcpy(&row, b.bytes[k], sizeof(row));
      even += a_even[k] * (f32v)(row << 16);
      odd += a_odd[k] * (f32v)(row & 0xffff0000u);
    }
    std::memcpy(&sums, c->bytes[m], sizeof(sums));
    sums += even + odd;
    std::memcpy(c->bytes[m], &sums, sizeof(sums));
  }
}

template <int kC, int kA, int kB>
VITKIT_INLINE void tile_multiply() {
  emulated_multiply(&emulated_tile<kC>(), emulated_tile<kA>(), emulated_tile<kB>());
}

#else

// Holds the tile unit of this thread: its state is part of every context switch while configured.
class TileUnit {
 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config;
    for (int t = 0; t < 16; ++t) {
      config.row_bytes[t] = t < 8 ? kTileRowBytes : 0;
      config.rows[t] = t < 8 ? 16 : 0;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileUnit() { asm volatile("tilerelease" ::: "memory"); }
};

// Own assembly instead of the compiler's intrinsics: those of GCC need literal tile numbers and, up
// to GCC 12 at least, do not tell the compiler that they read and write memory.
template <int kTile>
VITKIT_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
VITKIT_INLINE void tile_load(const void* p, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
VITKIT_INLINE void tile_store(void* p, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride_bytes), "i"(kTile) : "memory");
}

// c += a b.
template <int kC, int kA, int kB>
VITKIT_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#endif

}  // namespace vitkit::cpu::VITKIT_ISA

#endif  // AMX
