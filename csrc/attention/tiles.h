// Tiles of the attention kernels, by element size and head dim: one table a kernel, each row with
// its reason.
//
// A warp holds 16 * row_tiles rows; its tensor-core fragments of the other side are shared by its
// row tiles, so that two halve the traffic from shared memory, which one already exhausts (a load
// of 512 bytes feeds two products of 8 cycles). The number of warps is chosen at launch, so that 49
// queries do not occupy the registers of 128. Ends are cut in units of 16 rows and keys: 197 tokens
// cost 13 x 13 tiles of 16, whatever the tile is.
#pragma once

namespace vitkit::attention {

struct Tile {
  int row_tiles, warps;  // at most
  int others;            // keys of a step, or queries for the gradients of keys
  int stages;
};

struct TileRow {
  int itemsize, head_dim;  // up to this one
  Tile tile;
  const char* reason;
};

constexpr TileRow kForwardTiles[] = {
    {2, 64, {2, 4, 64, 2}, "128 x 64: 160 registers of scores, outputs and queries"},
    {2, 96, {2, 4, 32, 2}, "32 keys leave room for 96 registers of outputs"},
    {2, 128, {1, 4, 64, 2}, "two row tiles would hold 128 registers of outputs"},
    {2, 192, {1, 4, 32, 2}, "96 registers of outputs; 72 KB, which sm_86 has"},
    {2, 256, {1, 4, 16, 2}, "128 registers of outputs; 32 keys spill on sm_100"},
    {4, 64, {1, 4, 32, 2}, "fragments of float32 are split in two: twice the registers"},
    {4, 128, {1, 4, 16, 2}, "64 KB at 128: three blocks on sm_90"},
    {4, 256, {1, 2, 16, 2}, "32 rows: 96 KB, which sm_86 has"},
};

// Of dq (rows are queries) and of dk and dv (rows are keys): 16 rows a warp, of which both operands
// stay in shared memory.
constexpr TileRow kBackwardTiles[] = {
    {2, 48, {1, 4, 64, 2}, "64 registers of scores and their gradients; at 64 a term spills"},
    {2, 128, {1, 4, 32, 2}, "128 registers of dk and dv"},
    {2, 256, {1, 4, 16, 2}, "96 KB, which sm_86 has"},
    {4, 64, {1, 4, 32, 2}, "64 KB"},
    {4, 128, {1, 4, 16, 2}, "96 KB, which sm_86 has"},
    {4, 256, {1, 1, 16, 2}, "96 KB, which sm_86 has"},
};

// Of the gradient of a dense term: no operand is as wide as the head dim, nothing is prefetched.
constexpr TileRow kBiasTiles[] = {
    {2, 128, {1, 4, 64, 1}, "64 KB at 128: two blocks on sm_80"},
    {2, 256, {1, 4, 32, 1}, "96 KB, which sm_86 has"},
    {4, 128, {1, 4, 32, 1}, "96 KB, which sm_86 has"},
    {4, 256, {1, 2, 16, 1}, "96 KB, which sm_86 has"},
};

template <int kRows>
constexpr Tile pick_tile(const TileRow (&table)[kRows], int itemsize, int head_dim) {
  for (const TileRow& row : table)
    if (row.itemsize == itemsize && head_dim <= row.head_dim) return row.tile;
  return {};
}

template <typename T, int kHeadDim>
inline constexpr Tile kForwardTile = pick_tile(kForwardTiles, sizeof(T), kHeadDim);
template <typename T, int kHeadDim>
inline constexpr Tile kBackwardTile = pick_tile(kBackwardTiles, sizeof(T), kHeadDim);
template <typename T, int kHeadDim>
inline constexpr Tile kBiasTile = pick_tile(kBiasTiles, sizeof(T), kHeadDim);

constexpr int kMaxHeadDim = 256;

}  // namespace vitkit::attention
