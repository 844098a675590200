// conv3x3 for one instruction set: Winograd's minimal filtering F(2 x 2, 3 x 3).
//
//   y tile = A^T [sum over channels of (G g G^T) * (B^T d B)] A
//
// d is the 4 x 4 of x that a 2 x 2 tile of y depends on, g the 3 x 3 of weights. The elementwise
// product of 16 positions is 16 matrix products over the channels, 4 multiplications for an element
// of y where a direct sum takes 9. A group of columns keeps its transformed weights while all
// tiles of its range go by; a block of tiles is transformed, multiplied and transformed back in
// cache.
#include "conv3x3.h"

#include "attention/arena.h"
#include "attention/pack.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

constexpr int kPositions = 16;
constexpr int64_t kBlockTiles = 48 / kTileRows * kTileRows;
// Channels of the weight that are transformed at a time.
constexpr int64_t kWeightDepth = 32;

// Tiles of some samples, and the pixels they are computed from.
struct Block {
  int64_t sample, samples, row, rows, col, cols;

  Block(const Conv3x3Forward& p, int64_t index) {
    const int64_t by_cols = p.blocks_of_cols(), by_rows = p.blocks_of_rows();
    col = index % by_cols * p.block_cols;
    row = index / by_cols % by_rows * p.block_rows;
    sample = index / by_cols / by_rows * p.block_samples;
    cols = smaller(p.block_cols, p.tile_cols() - col);
    rows = smaller(p.block_rows, p.tile_rows() - row);
    samples = smaller(p.block_samples, p.samples - sample);
  }
  int64_t tiles() const { return samples * rows * cols; }
};

struct Scratch {
  // Floats from a tile to the next, and of the three arrays from a position to the next: a little
  // more than they hold, so that the 16 do not meet in one set of the cache.
  int64_t stride, of_weights, of_inputs, of_products;
  float* weights;   // [kPositions, of_weights]: [panels, channels, kPanel]
  float* inputs;    // [kPositions, of_inputs]: [tiles, stride]
  float* products;  // [panels, kPositions, of_products]: [tiles, kPanel]
  float* taps;      // [9 * kWeightDepth, kPanel]
  float* pixels;    // [of a sample in a block, kPanel]
  size_t bytes;

  Scratch(const Conv3x3Forward& p, void* base) {
    Arena arena{static_cast<char*>(base)};
    const int64_t tiles = round_rows(p.block_samples * p.block_rows * p.block_cols);
    stride = row_stride_of(p.channels);
    of_weights = p.group_panels * p.channels * kPanel + 16;
    of_inputs = tiles * stride + 16;
    of_products = tiles * kPanel + 16;
    weights = arena.take<float>(kPositions * of_weights);
    inputs = arena.take<float>(kPositions * of_inputs);
    products = arena.take<float>(p.group_panels * kPositions * of_products);
    taps = arena.take<float>(9 * kWeightDepth * kPanel);
    const int64_t around = (2 * p.block_rows + 2) * (2 * p.block_cols + 2);
    pixels = arena.take<float>((around + kPanel) * kPanel);
    bytes = size_t(arena.next - static_cast<char*>(base));
  }
};

// ---- weights ----

// G g G^T of kLanes columns: g[3 i + j], every `step` floats, to u[4 i + j], every `stride` floats.
VITKIT_INLINE void transform_weights(const float* g, int64_t step, float* u, int64_t stride) {
  f32v rows[4][3];
  for (int j = 0; j < 3; ++j) {
    const f32v a = load(g + j * step), b = load(g + (3 + j) * step), c = load(g + (6 + j) * step);
    const f32v ends = (a + c) * .5f, middle = b * .5f;
    rows[0][j] = a;
    rows[1][j] = ends + middle;
    rows[2][j] = ends - middle;
    rows[3][j] = c;
  }
  for (int i = 0; i < 4; ++i) {
    const f32v ends = (rows[i][0] + rows[i][2]) * .5f, middle = rows[i][1] * .5f;
    store(u + (4 * i) * stride, rows[i][0]);
    store(u + (4 * i + 1) * stride, ends + middle);
    store(u + (4 * i + 2) * stride, ends - middle);
    store(u + (4 * i + 3) * stride, rows[i][2]);
  }
}

// Columns up to a whole vector repeat the last one: their sums are not stored.
template <typename T>
void pack_weights(const Conv3x3Forward& p, int64_t first, int64_t columns, const Scratch& s) {
  const T* weight = reinterpret_cast<const T*>(p.weight);
  const bool taps_together = p.tap_stride == 1;
  for (int64_t panel = 0; panel < num_panels(columns); ++panel) {
    const int64_t left = columns - panel * kPanel;
    const int64_t wide = smaller(kPanel, round_up(left, kLanes < 8 ? 8 : kLanes));
    for (int64_t c = 0; c < p.channels; c += kWeightDepth) {
      const int64_t depth = smaller(kWeightDepth, p.channels - c);
      for (int64_t j = 0; j < wide; j += 8) {
        const T* from[8];
        for (int r = 0; r < 8; ++r)
          from[r] = weight + (first + panel * kPanel + smaller(j + r, left - 1)) * p.weight_stride +
                    c * p.channel_stride;
        if (taps_together) {
          pack_eight_columns(from, 9 * depth, s.taps + j);
          continue;
        }
        for (int tap = 0; tap < 9; ++tap) {
          pack_eight_columns(from, depth, s.taps + tap * depth * kPanel + j);
          for (int r = 0; r < 8; ++r) from[r] += p.tap_stride;
        }
      }
      const int64_t step = taps_together ? kPanel : depth * kPanel;
      const int64_t next = taps_together ? 9 * kPanel : kPanel;
      float* u = s.weights + (panel * p.channels + c) * kPanel;
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t v = 0; v < wide; v += kLanes)
          transform_weights(s.taps + i * next + v, step, u + i * kPanel + v, s.of_weights);
    }
  }
}

// ---- input ----

// B^T d B of kLanes channels: d[i][j] at i * row + j * pixel, v[4 i + j] every `stride` floats.
template <typename T>
VITKIT_INLINE void transform_input(const T* d, int64_t row, int64_t pixel, float* v,
                                   int64_t stride) {
  constexpr int kFirst[] = {0, 1, 2, 1}, kSecond[] = {2, 2, 1, 3};  // of the rows of d
  for (int i = 0; i < 4; ++i) {
    f32v t[4];
    for (int j = 0; j < 4; ++j) {
      const f32v a = load(d + kFirst[i] * row + j * pixel);
      const f32v b = load(d + kSecond[i] * row + j * pixel);
      t[j] = i == 1 ? a + b : a - b;
    }
    store(v + (4 * i) * stride, t[0] - t[2]);
    store(v + (4 * i + 1) * stride, t[1] + t[2]);
    store(v + (4 * i + 2) * stride, t[2] - t[1]);
    store(v + (4 * i + 3) * stride, t[1] - t[3]);
  }
}

// Pixels of an image, or of a part of it: pixel (row, col) lies at data + (row - first_row) * row
// + (col - first_col) * pixel.
template <typename T>
struct Pixels {
  const T* data;
  int64_t first_row, first_col, row, pixel;
};

// `count` channels of a sample's tiles of the block, to v + tile * s.stride.
template <typename T>
void transform_tiles(const Conv3x3Forward& p, const Block& block, const Pixels<T>& from,
                     int64_t count, const Scratch& s, float* v) {
  for (int64_t r = 0; r < block.rows; ++r) {
    for (int64_t c = 0; c < block.cols; ++c, v += s.stride) {
      const int64_t row = 2 * (block.row + r) - 1, col = 2 * (block.col + c) - 1;
      const T* d =
          from.data + (row - from.first_row) * from.row + (col - from.first_col) * from.pixel;
      const bool inside = row >= 0 && col >= 0 && row + 4 <= p.height && col + 4 <= p.width;
      for (int64_t i = 0; i < count; i += kLanes) {
        if (inside && count - i >= kLanes) {
          transform_input(d + i, from.row, from.pixel, v + i, s.of_inputs);
          continue;
        }
        alignas(64) float around[kPositions * kLanes];
        for (int k = 0; k < kPositions; ++k) {
          const int64_t y = row + k / 4, x = col + k % 4;
          const bool there = y >= 0 && x >= 0 && y < p.height && x < p.width;
          store(around + k * kLanes,
                there ? load_partial(d + (k / 4) * from.row + (k % 4) * from.pixel + i,
                                     int(smaller(count - i, kLanes)))
                      : f32v{});
        }
        transform_input(around, 4 * kLanes, kLanes, v + i, s.of_inputs);
      }
    }
  }
}

template <typename T>
void pack_inputs(const Conv3x3Forward& p, const Block& block, const Scratch& s) {
  const T* x = reinterpret_cast<const T*>(p.x);
  const int64_t area = p.height * p.width, per_sample = block.rows * block.cols;
  const int64_t row = block.row ? 2 * block.row - 1 : 0, col = block.col ? 2 * block.col - 1 : 0;
  const int64_t rows = smaller(p.height, 2 * (block.row + block.rows) + 1) - row;
  const int64_t cols = smaller(p.width, 2 * (block.col + block.cols) + 1) - col;
  for (int64_t n = 0; n < block.samples; ++n) {
    const T* sample = x + (block.sample + n) * p.channels * area;
    float* v = s.inputs + n * per_sample * s.stride;
    if (p.channels_last) {
      const Pixels<T> all{sample, 0, 0, p.width * p.channels, p.channels};
      transform_tiles(p, block, all, p.channels, s, v);
      continue;
    }
    // A panel of channels at a time is turned into rows of channels.
    for (int64_t c = 0; c < p.channels; c += kPanel) {
      const int64_t count = smaller(kPanel, p.channels - c);
      for (int64_t j = 0; j < count; j += 8) {
        const T* from[8];
        for (int r = 0; r < 8; ++r)
          from[r] = sample + (c + smaller(j + r, count - 1)) * area + row * p.width + col;
        if (cols == p.width) {
          pack_eight_columns(from, rows * cols, s.pixels + j);
          continue;
        }
        for (int64_t i = 0; i < rows; ++i) {
          pack_eight_columns(from, cols, s.pixels + i * cols * kPanel + j);
          for (int r = 0; r < 8; ++r) from[r] += p.width;
        }
      }
      const Pixels<float> panel{s.pixels, row, col, cols * kPanel, kPanel};
      transform_tiles(p, block, panel, round_up(count, kLanes), s, v + c);
    }
  }
  if (block.tiles() % 2 == 1)  // a product takes rows in pairs
    for (int k = 0; k < kPositions; ++k) {
      float* last = s.inputs + k * s.of_inputs + block.tiles() * s.stride;
      std::memcpy(last, last - s.stride, size_t(p.channels) * sizeof(float));
    }
}

// ---- output ----

// A^T m A of kLanes columns: m[4 i + j] every `stride` floats.
VITKIT_INLINE void transform_output(const float* m, int64_t stride, f32v bias, f32v (&y)[2][2]) {
  f32v rows[2][4];
  for (int j = 0; j < 4; ++j) {
    const f32v a = load(m + j * stride), b = load(m + (4 + j) * stride);
    const f32v c = load(m + (8 + j) * stride), d = load(m + (12 + j) * stride);
    rows[0][j] = a + b + c;
    rows[1][j] = b - c - d;
  }
  for (int i = 0; i < 2; ++i) {
    y[i][0] = rows[i][0] + rows[i][1] + rows[i][2] + bias;
    y[i][1] = rows[i][1] - rows[i][2] - rows[i][3] + bias;
  }
}

// A panel of columns of one sample's tiles. put(row, col, v, values): pixels of the block.
template <typename Put>
VITKIT_INLINE void transform_back(const Conv3x3Forward& p, const Block& block, const Scratch& s,
                                  const float* m, int64_t column, int vecs, const Put& put) {
  const int64_t rows = smaller(2 * block.rows, p.height - 2 * block.row);
  const int64_t cols = smaller(2 * block.cols, p.width - 2 * block.col);
  f32v bias[kPanelVecs] = {};
  for (int v = 0; p.bias && v < vecs; ++v) bias[v] = load(p.bias + column + v * kLanes);
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < cols; c += 2, m += kPanel)
      for (int v = 0; v < vecs; ++v) {
        f32v y[2][2];
        transform_output(m + v * kLanes, s.of_products, bias[v], y);
        for (int i = 0; i < 2 && r + i < rows; ++i)
          for (int j = 0; j < 2 && c + j < cols; ++j) put(r + i, c + j, v, y[i][j]);
      }
}

// `pixels` consecutive pixels of `columns` planes of y.
template <typename T>
void write_planes(const float* from, int64_t pixels, T* y, int64_t area, int64_t columns) {
  for (int64_t i = 0; i < pixels; i += kPanel) {
    alignas(64) float turned[kPanel * kPanel];
    for (int64_t g = 0; g < kPanel; g += 8) {
      const float* rows[8];
      for (int r = 0; r < 8; ++r) rows[r] = from + (i + g + r) * kPanel;
      pack_eight_columns(rows, kPanel, turned + g);
    }
    const int64_t count = smaller(kPanel, pixels - i);
    for (int64_t j = 0; j < columns; ++j)
      each_vector(count, [&](int64_t k, auto n) {
        store_partial(y + j * area + i + k, load(turned + j * kPanel + k), n);
      });
  }
}

template <typename T>
void write_outputs(const Conv3x3Forward& p, const Block& block, int64_t column, int64_t columns,
                   const Scratch& s) {
  T* y = reinterpret_cast<T*>(p.y);
  const int64_t area = p.height * p.width;
  const int64_t rows = smaller(2 * block.rows, p.height - 2 * block.row);
  const int64_t cols = smaller(2 * block.cols, p.width - 2 * block.col);
  const int64_t corner = 2 * block.row * p.width + 2 * block.col;
  for (int64_t panel = 0; panel < num_panels(columns); ++panel) {
    const int64_t to = column + panel * kPanel, wide = smaller(kPanel, p.columns - to);
    const int vecs = panel_vecs(columns, panel);
    for (int64_t n = 0; n < block.samples; ++n) {
      const float* m =
          s.products + panel * kPositions * s.of_products + n * block.rows * block.cols * kPanel;
      const int64_t sample = (block.sample + n) * p.columns * area;
      if (p.channels_last) {
        T* out = y + sample + corner * p.columns + to;
        transform_back(p, block, s, m, to, vecs, [&](int64_t r, int64_t c, int v, f32v value) {
          store_partial(out + (r * p.width + c) * p.columns + v * kLanes, value,
                        int(smaller(wide - v * kLanes, kLanes)));
        });
        continue;
      }
      transform_back(p, block, s, m, to, vecs, [&](int64_t r, int64_t c, int v, f32v value) {
        store(s.pixels + (r * cols + c) * kPanel + v * kLanes, value);
      });
      T* out = y + sample + to * area + corner;
      if (cols == p.width) {
        write_planes(s.pixels, rows * cols, out, area, wide);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        write_planes(s.pixels + r * cols * kPanel, cols, out + r * p.width, area, wide);
    }
  }
}

// ---- all of it ----

void multiply(const Conv3x3Forward& p, int64_t tiles, int64_t columns, const Scratch& s) {
  for (int k = 0; k < kPositions; ++k)
    for (int64_t panel = 0; panel < num_panels(columns); ++panel) {
      const float* a = s.inputs + k * s.of_inputs;
      const float* b = s.weights + k * s.of_weights + panel * p.channels * kPanel;
      float* c = s.products + (panel * kPositions + k) * s.of_products;
      const int vecs = panel_vecs(columns, panel);
      for (int64_t t = 0; t < tiles; t += kTileRows)
        gemm_rows<false, Epilogue::overwrite>(smaller(tiles - t, kTileRows), vecs, p.channels,
                                              a + t * s.stride, s.stride, b, c + t * kPanel,
                                              kPanel);
    }
}

template <typename T>
void forward(const Conv3x3Forward& p, int64_t begin, int64_t end, const Scratch& s) {
  const int64_t ranges = p.ranges(), group_columns = p.group_panels * kPanel;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t column = item / ranges * group_columns, first = item % ranges * p.range_blocks;
    const int64_t columns = smaller(group_columns, p.columns - column);
    const int64_t last = smaller(first + p.range_blocks, p.blocks());
    pack_weights<T>(p, column, columns, s);
    for (int64_t index = first; index < last; ++index) {
      const Block block(p, index);
      pack_inputs<T>(p, block, s);
      multiply(p, block.tiles(), columns, s);
      write_outputs<T>(p, block, column, columns, s);
    }
  }
}

}  // namespace

const Conv3x3Kernels& conv3x3_kernels() {
  static constexpr Conv3x3Kernels kernels{
      kPanel,
      kBlockTiles,
      [](const Conv3x3Forward& p) { return Scratch(p, nullptr).bytes; },
      [](const Conv3x3Forward& p, int64_t begin, int64_t end, void* base) {
        const Scratch scratch(p, base);
        switch (p.type) {
          case ElementType::f32:
            return forward<float>(p, begin, end, scratch);
          case ElementType::bf16:
            return forward<bf16>(p, begin, end, scratch);
          case ElementType::f16:
            return forward<f16>(p, begin, end, scratch);
          case ElementType::boolean:
            return;  // not an element type of this op: the host refuses it
        }
      },
  };
  return kernels;
}

}  // namespace vitkit::cpu::VITKIT_ISA
