// Matrix product on AMX tiles: bfloat16 operands stored tile by tile, float32 sums.
#pragma once

#include "amx.h"

#if defined(VITKIT_AMX)

#include "lanes.h"

namespace vitkit::cpu::VITKIT_ISA {

static_assert(kLanes == 16, "a vector is a row of a tile");

constexpr int64_t kTile = 16;       // rows of any tile, columns of a sum
constexpr int64_t kTileK = 32;      // k of one product
constexpr int64_t kTileSize = 512;  // bfloat16 elements of an operand
constexpr int64_t kTileSums = 256;  // float32 elements of a sum

// v[c][r] becomes v[r][c]. Lanes are only moved: they may hold anything of 32 bits.
VITKIT_INLINE void transpose16(f32v (&v)[16]) {
  f32v a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = low_singles(v[i], v[i + 1]);
    a[i + 1] = high_singles(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      b[i + 2 * h] = low_pairs(a[i + h], a[i + h + 2]);
      b[i + 2 * h + 1] = high_pairs(a[i + h], a[i + h + 2]);
    }
  // b[4 g + c] holds in quarter q column 4 q + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const f32v even0 = even_quarters(b[c], b[4 + c]), odd0 = odd_quarters(b[c], b[4 + c]);
    const f32v even1 = even_quarters(b[8 + c], b[12 + c]), odd1 = odd_quarters(b[8 + c], b[12 + c]);
    v[c] = even_quarters(even0, even1);
    v[8 + c] = odd_quarters(even0, even1);
    v[4 + c] = even_quarters(odd0, odd1);
    v[12 + c] = odd_quarters(odd0, odd1);
  }
}

// kRows x kCols tiles of C (+)= A B over k tiles. Tile (i, s) of A is a + i * a_row + s *
// kTileSize, tile (s, j) of B is b + j * b_col + s * b_step, tile (i, j) of C is c + i * c_row + j
// * kTileSums.
struct TileOperands {
  const bf16* a;
  int64_t a_row;
  const bf16* b;
  int64_t b_col, b_step, k;
  float* c;
  int64_t c_row;
};

template <int kRows, int kCols>
VITKIT_INLINE void tile_product(const TileOperands& o, bool accumulate) {
  constexpr int64_t kSumStride = kTile * sizeof(float);
  if (accumulate) {
    tile_load<0>(o.c, kSumStride);
    if constexpr (kCols > 1) tile_load<1>(o.c + kTileSums, kSumStride);
    if constexpr (kRows > 1) tile_load<2>(o.c + o.c_row, kSumStride);
    if constexpr (kRows > 1 && kCols > 1) tile_load<3>(o.c + o.c_row + kTileSums, kSumStride);
  } else {
    tile_zero<0>();
    if constexpr (kCols > 1) tile_zero<1>();
    if constexpr (kRows > 1) tile_zero<2>();
    if constexpr (kRows > 1 && kCols > 1) tile_zero<3>();
  }
  for (int64_t s = 0; s < o.k; ++s) {
    tile_load<4>(o.a + s * kTileSize, kTileRowBytes);
    tile_load<6>(o.b + s * o.b_step, kTileRowBytes);
    tile_multiply<0, 4, 6>();
    if constexpr (kCols > 1) {
      tile_load<7>(o.b + o.b_col + s * o.b_step, kTileRowBytes);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (kRows > 1) {
      tile_load<5>(o.a + o.a_row + s * kTileSize, kTileRowBytes);
      tile_multiply<2, 5, 6>();
    }
    if constexpr (kRows > 1 && kCols > 1) tile_multiply<3, 5, 7>();
  }
  tile_store<0>(o.c, kSumStride);
  if constexpr (kCols > 1) tile_store<1>(o.c + kTileSums, kSumStride);
  if constexpr (kRows > 1) tile_store<2>(o.c + o.c_row, kSumStride);
  if constexpr (kRows > 1 && kCols > 1) tile_store<3>(o.c + o.c_row + kTileSums, kSumStride);
}

VITKIT_INLINE void tile_product(int64_t rows, int64_t cols, const TileOperands& o,
                                bool accumulate) {
  if (rows > 1)
    cols > 1 ? tile_product<2, 2>(o, accumulate) : tile_product<2, 1>(o, accumulate);
  else
    cols > 1 ? tile_product<1, 2>(o, accumulate) : tile_product<1, 1>(o, accumulate);
}

}  // namespace vitkit::cpu::VITKIT_ISA

#endif  // AMX
