// Runs the CPU kernel of conv3x3 of one instruction set, without PyTorch, against float64.
//
// Compiled together with csrc/cpu/conv3x3_kernel.cpp and the same -DVITKIT_ISA and flags. The
// output starts as NaN, and is computed three times: in blocks as large as they may be, one tile
// and one panel at a time backwards, and in parts of rows of tiles, which must agree bit by bit.
//
//   conv3x3_driver [substring of a case name]      exit code 0: every case passed
#include "conv3x3.h"

#include <algorithm>

#include "driver.h"

namespace vitkit::cpu::VITKIT_ISA {
const Conv3x3Kernels& conv3x3_kernels();
}

using namespace vitkit::cpu;
using namespace driver;

namespace {

struct Case {
  std::string name;
  ElementType type = ElementType::f32;
  bool channels_last = false, weights_last = false;
  int64_t samples = 1, channels = 1, height = 1, width = 1, columns = 1;
  bool bias = true, special = false;
};

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        x_(c.type, c.samples * c.channels * c.height * c.width, normal),
        weight_(c.type, c.columns * c.channels * 9, normal),
        bias_(size_t(c.columns + kConvPadding), 0.f) {
    for (int64_t k = 0; k < c.columns; ++k) bias_[size_t(k)] = float(normal());
    if (c.special) {
      x_.set(at(c.channels, 0, 0, 0, 0), NAN);
      x_.set(at(c.channels, c.samples - 1, c.channels - 1, c.height - 1, c.width - 2), kInf);
    }
  }

  bool check() {
    const Array whole = run(0), tiles = run(1), strips = run(2);
    bool ok = whole.intact() && tiles.intact() && strips.intact();
    if (!ok) std::printf("  written behind the end\n");
    // NaNs may differ in their signs.
    if (!c_.special && !(whole == tiles && whole == strips)) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    Error ours, plain;
    for (int64_t n = 0; n < c_.samples; ++n)
      for (int64_t k = 0; k < c_.columns; ++k)
        for (int64_t row = 0; row < c_.height; ++row)
          for (int64_t col = 0; col < c_.width; ++col) {
            const double got = whole.at(at(c_.columns, n, k, row, col));
            double exact = 0;
            float sum = 0;
            convolve(n, k, row, col, exact, sum);
            if (!std::isfinite(exact)) {
              ours.wrong |= std::isfinite(got);
            } else if (std::isfinite(got) || !near_special(n, row, col)) {
              ours.add(got, exact);
              plain.add(round_to(c_.type, sum), exact);
            }
          }
    return ok & report("y", ours, plain, kEps[int(c_.type)], double(9 * c_.channels));
  }

 private:
  int64_t at(int64_t channels, int64_t n, int64_t c, int64_t row, int64_t col) const {
    return c_.channels_last ? ((n * c_.height + row) * c_.width + col) * channels + c
                            : ((n * channels + c) * c_.height + row) * c_.width + col;
  }

  void convolve(int64_t n, int64_t k, int64_t row, int64_t col, double& exact, float& sum) const {
    for (int64_t c = 0; c < c_.channels; ++c)
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t y = row + tap / 3 - 1, x = col + tap % 3 - 1;
        if (y < 0 || x < 0 || y >= c_.height || x >= c_.width) continue;
        const double a = x_.at(at(c_.channels, n, c, y, x));
        const double b = weight_.at(k * 9 * c_.channels +
                                    (c_.weights_last ? tap * c_.channels + c : c * 9 + tap));
        exact += a * b;
        sum += float(a) * float(b);
      }
    exact += c_.bias ? double(bias_[size_t(k)]) : 0;
    sum += c_.bias ? bias_[size_t(k)] : 0;
  }

  // Whether the tile of a result depends on a pixel that is no number.
  bool near_special(int64_t n, int64_t row, int64_t col) const {
    const int64_t first_row = row / 2 * 2 - 1, first_col = col / 2 * 2 - 1;
    for (int64_t y = first_row; y < first_row + 4; ++y)
      for (int64_t x = first_col; x < first_col + 4; ++x)
        for (int64_t c = 0; c < c_.channels; ++c)
          if (y >= 0 && x >= 0 && y < c_.height && x < c_.width &&
              !std::isfinite(x_.at(at(c_.channels, n, c, y, x))))
            return true;
    return false;
  }

  // 0: one item, blocks as large as they may be; 1: an item for every tile and panel; 2: blocks of
  // parts of rows.
  Array run(int split) {
    const Conv3x3Kernels& kernels = isa::conv3x3_kernels();
    Array y(c_.type, c_.samples * c_.columns * c_.height * c_.width, [] { return double(NAN); });
    Conv3x3Forward p{};
    p.type = c_.type;
    p.channels_last = c_.channels_last;
    p.samples = c_.samples;
    p.height = c_.height;
    p.width = c_.width;
    p.channels = c_.channels;
    p.columns = c_.columns;
    p.x = x_.data();
    p.weight = weight_.data();
    p.weight_stride = 9 * c_.channels;
    p.channel_stride = c_.weights_last ? 1 : 9;
    p.tap_stride = c_.weights_last ? c_.channels : 1;
    p.bias = c_.bias ? bias_.data() : nullptr;
    p.y = y.data();
    const int64_t panels = (c_.columns + kernels.panel - 1) / kernels.panel;
    const int64_t most = kernels.block_tiles;
    p.block_samples = p.block_rows = p.block_cols = 1;
    if (split == 0) {
      p.block_cols = std::min(p.tile_cols(), most);
      p.block_rows =
          p.block_cols < p.tile_cols() ? 1 : std::min(p.tile_rows(), most / p.block_cols);
      if (p.block_rows == p.tile_rows() && p.block_cols == p.tile_cols())
        p.block_samples = std::max<int64_t>(1, most / (p.block_rows * p.block_cols));
    } else if (split == 2) {
      p.block_cols = 3;
    }
    p.group_panels = split == 1 ? 1 : panels;
    p.range_blocks = split == 0 ? p.blocks() : (split == 1 ? 1 : 2);
    const int64_t items = (panels + p.group_panels - 1) / p.group_panels * p.ranges();
    const Poisoned scratch(kernels.scratch_bytes(p));
    if (split == 0)
      kernels.forward(p, 0, items, scratch.get());
    else
      for (int64_t i = items; i-- > 0;) kernels.forward(p, i, i + 1, scratch.get());
    return y;
  }

  Case c_;
  Array x_, weight_;
  std::vector<float> bias_;
};

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  for (int last = 0; last < 2; ++last) {
    const auto add = [&](const std::string& name, int64_t samples, int64_t channels, int64_t height,
                         int64_t width, int64_t columns) -> Case& {
      Case c;
      c.name = std::string(kTypeNames[int(type)]) + (last ? "/channels_last/" : "/nchw/") + name;
      c.type = type;
      c.channels_last = c.weights_last = last == 1;
      c.samples = samples;
      c.channels = channels;
      c.height = height;
      c.width = width;
      c.columns = columns;
      all.push_back(c);
      return all.back();
    };
    for (int64_t size : {1, 2, 3, 4, 5, 7, 8, 15})
      add("square_" + std::to_string(size), 2, 5, size, size, 3);
    add("tall", 1, 3, 21, 2, 4);
    add("wide", 1, 3, 2, 21, 4);
    add("longer_than_a_block", 1, 2, 3, 131, 2);
    add("samples_of_a_block", 7, 3, 4, 3, 5);
    for (int64_t channels : {1, 7, 8, 9, 16, 17, 31, 33, 40})
      add("channels_" + std::to_string(channels), 1, channels, 5, 4, 6);
    for (int64_t columns : {1, 7, 8, 9, 16, 17, 31, 33, 70})
      add("columns_" + std::to_string(columns), 1, 6, 4, 5, columns);
    add("other_weights", 1, 37, 5, 5, 10).weights_last = last == 0;
    add("no_bias", 1, 9, 4, 4, 9).bias = false;
    add("special", 2, 9, 9, 7, 18).special = true;
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
