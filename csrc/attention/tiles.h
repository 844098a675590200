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

// The same for cosine attention.
constexpr TileRow kCosineBackwardTiles[] = {
    {2, 64, {1, 4, 32, 2}, "inverse norms beside the statistics of every column: 64 spill"},
    {4, 64, {1, 4, 32, 2}, "64 KB"},
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
template <typename T, int kHeadDim, bool kCosine>
inline constexpr Tile kBackwardTile = kCosine ? pick_tile(kCosineBackwardTiles, sizeof(T), kHeadDim)
                                              : pick_tile(kBackwardTiles, sizeof(T), kHeadDim);
template <typename T, int kHeadDim>
inline constexpr Tile kBiasTile = pick_tile(kBiasTiles, sizeof(T), kHeadDim);

constexpr int kMaxHeadDim = 256;
constexpr int kMaxShared = 99 * 1024;  // of a block, on every GPU from sm_80 on

// Warps of a block, of at most `most`, where the longest sequence has `rows` rows and a warp takes
// `of_warp`. Every block loads the other side again, which is taken to cost what two warps do:
// blocks * (warps + 2) is as small as it can be, and of equals the one with fewer blocks is taken.
constexpr int warps_for(int rows, int of_warp, int most) {
  const int tiles = rows <= of_warp ? 1 : (rows - 1) / of_warp + 1;
  if (tiles <= most) return tiles;
  int best = most;
  long long least = 0;
  for (int warps = most; warps > 0; --warps) {
    const long long cost = (long long)((tiles - 1) / warps + 1) * (warps + 2);
    if (least == 0 || cost < least) least = cost, best = warps;
  }
  return best;
}

// What that makes of the lengths of vision models, by warps of 32 rows (forward, 16 bits, head dims
// up to 96) and of 16.
static_assert(warps_for(49, 32, 4) == 2 && warps_for(49, 16, 4) == 4, "one block: Swin, 7 x 7");
static_assert(warps_for(64, 32, 4) == 2 && warps_for(64, 16, 4) == 4, "one block: Swin V2, 8 x 8");
static_assert(warps_for(77, 32, 4) == 3, "one block: CLIP's text");
static_assert(warps_for(144, 32, 4) == 3, "96 + 48 rows: of 128 + 16, three warps would be idle");
static_assert(warps_for(144, 16, 4) == 3, "3 blocks of 48 rows, no idle warp");
static_assert(warps_for(197, 32, 4) == 4 && warps_for(197, 16, 4) == 4, "2 and 4 blocks");
static_assert(warps_for(256, 32, 4) == 4 && warps_for(257, 32, 4) == 3, "one row more: 3 x 96");
static_assert(warps_for(576, 32, 4) == 4 && warps_for(577, 32, 4) == 4, "5 blocks: Swin V2, ViT");
static_assert(warps_for(1025, 32, 4) == 4, "long sequences want few loads");

}  // namespace vitkit::attention
