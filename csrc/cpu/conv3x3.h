// Parameters of the kernels behind conv3x3, shared by the host file and every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/params.h"

namespace vitkit::cpu {

// y = conv2d(x, weight, bias, stride 1, padding 1), by tiles of 2 x 2 of y. An item is a group of
// panels of columns (output channels) and a range of blocks of tiles. A block is `block_cols` tiles
// of a row of tiles, or `block_rows` whole rows, or `block_samples` whole samples.
struct Conv3x3Forward {
  ElementType type;
  bool channels_last;  // x and y lie as [N, H, W, C], or as [N, C, H, W]
  int64_t samples, height, width, channels, columns;
  const char* x;
  const char* weight;  // [columns, channels, 3, 3]: the three strides are
  int64_t weight_stride, channel_stride, tap_stride;
  const float* bias;  // [columns], zeros up to kConvPadding more; or null
  char* y;
  int64_t group_panels, range_blocks;
  int64_t block_samples, block_rows, block_cols;

  int64_t tile_rows() const { return (height + 1) / 2; }
  int64_t tile_cols() const { return (width + 1) / 2; }
  int64_t blocks_of_samples() const { return (samples + block_samples - 1) / block_samples; }
  int64_t blocks_of_rows() const { return (tile_rows() + block_rows - 1) / block_rows; }
  int64_t blocks_of_cols() const { return (tile_cols() + block_cols - 1) / block_cols; }
  int64_t blocks() const { return blocks_of_samples() * blocks_of_rows() * blocks_of_cols(); }
  int64_t ranges() const { return (blocks() + range_blocks - 1) / range_blocks; }
};

constexpr int64_t kConvPadding = 64;

struct Conv3x3Kernels {
  int64_t panel, block_tiles;  // columns of a panel, most tiles of a block
  size_t (*scratch_bytes)(const Conv3x3Forward&);
  void (*forward)(const Conv3x3Forward&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace vitkit::cpu
