// conv3x3 on the CPU: checks, and groups of columns and ranges of tiles to threads.
#include "conv3x3.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "attention/inputs.h"
#include "isa.h"
#include "memory.h"
#include "panel_items.h"
#include "rows.h"
#include "small_tensor.h"

VITKIT_ISA_TABLE(Conv3x3Kernels, conv3x3_kernels)

namespace vitkit::cpu {
namespace {

constexpr const char* kOp = "conv3x3";
// Transformed weights of an item: they are read once for every block of tiles, from the third-level
// cache.
constexpr int64_t kGroupBytes = 6 << 20;
// Tiles below which transforming a group of weights once more costs more than a few percent.
constexpr int64_t kLeastTiles = 512;
constexpr int64_t kItemsPerThread = 2;

// How the work is cut changes no result: every sum is taken in one order.
void cut(Conv3x3Forward& p, const Conv3x3Kernels& kernels, int64_t threads) {
  const int64_t most = kernels.block_tiles, per_sample = p.tile_rows() * p.tile_cols();
  const int64_t pieces = divide_up(p.tile_cols(), most);
  p.block_cols = divide_up(p.tile_cols(), pieces);
  p.block_rows = pieces > 1 ? 1 : std::min(p.tile_rows(), most / p.tile_cols());
  p.block_samples = std::clamp<int64_t>(most / per_sample, 1, p.samples);

  const int64_t panels = divide_up(p.columns, kernels.panel);
  const int64_t bytes = 16 * panels * kernels.panel * p.channels * int64_t(sizeof(float));
  const auto [groups, ranges] =
      share_panels(panels, divide_up(bytes, kGroupBytes), p.samples * per_sample / kLeastTiles,
                   threads, kItemsPerThread);
  p.group_panels = divide_up(panels, groups);
  p.range_blocks = divide_up(p.blocks(), ranges);
}

// [samples, columns, height, width] in the layout of x.
Tensor empty_image(const Tensor& x, const Conv3x3Forward& p) {
  if (!p.channels_last)
    return torch::stable::new_empty(x, {p.samples, p.columns, p.height, p.width});
  const Tensor y = torch::stable::new_empty(x, {p.samples, p.height, p.width, p.columns});
  return torch::stable::transpose(torch::stable::transpose(y, 2, 3), 1, 2);
}

Tensor conv3x3_forward(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  check_floating(kOp, "x", x);
  check_rank(kOp, "x", x, 4);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), kOp,
                  ": weight must have the dtype of x");
  STD_TORCH_CHECK(weight.get_device_index() == x.get_device_index(), kOp,
                  ": weight must be on the device of x");
  check_rank(kOp, "weight", weight, 4);
  check_size(kOp, "weight", weight, 1, x.size(1));
  check_size(kOp, "weight", weight, 2, 3);
  check_size(kOp, "weight", weight, 3, 3);
  x = dense_image(x);
  weight = dense_image(weight);
  Conv3x3Forward p{};
  p.type = element_type(x);
  p.channels_last = is_channels_last(x);
  p.samples = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.columns = weight.size(0);
  std::vector<float> shift = small_floats(kOp, "bias", bias, {p.columns});
  Tensor y = empty_image(x, p);
  if (y.numel() == 0) return y;
  STD_TORCH_CHECK(p.channels > 0, kOp, ": x must have at least one channel, got 0");
  p.x = static_cast<const char*>(x.const_data_ptr());
  p.weight = static_cast<const char*>(weight.const_data_ptr());
  p.weight_stride = 9 * p.channels;
  const bool channels_last = is_channels_last(weight);
  p.channel_stride = channels_last ? 1 : 9;
  p.tap_stride = channels_last ? p.channels : 1;
  if (bias) shift.resize(shift.size() + size_t(kConvPadding));
  p.bias = bias ? shift.data() : nullptr;
  p.y = static_cast<char*>(y.mutable_data_ptr());
  prefer_huge_pages(y);
  const Conv3x3Kernels& kernels = conv3x3_kernels();
  const int64_t threads = threads_for(18. * double(y.numel()) * double(p.channels));
  cut(p, kernels, threads);
  run_panel_items(p, kernels, threads);
  return y;
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("conv3x3_fwd", TORCH_BOX(&vitkit::cpu::conv3x3_forward));
}
