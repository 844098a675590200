// Device code of patch_embed, forward, and its launches. No torch header: the emulator compiles
// this very file.
//
// One product per call: tiles of 128 tokens by 128 elements of a token, by tensor cores, its left
// operand gathered from the images (patch_gather.cuh). Bias, LayerNorm (where a tile holds a whole
// token), positions and prefix tokens are added on the way out. Weights are used where they lie,
// unless bytes are to be normalised, channels are innermost, or rows are not whole 16 bytes: then
// one kernel copies them, in the order and with the factors they need.
#pragma once

#include "launch_kernel.cuh"
#include "patch_gather.cuh"
#include "reduce.cuh"

namespace vitkit::patch_embed {

// 8 warps of 32 x 64 elements each; a stage is 16 KiB and two blocks share a multiprocessor.
constexpr int kThreads = 256, kTile = 128, kStages = 4;
// float32 of a tile on its way out: rows 8 banks apart, which pairs of eight rows fill evenly.
constexpr int kOutStride = kTile + 8;
template <typename T>
constexpr int kDepth = 64 / int(sizeof(T));  // of a step

struct Params {
  Images images;
  const void* weight;     // [embed, weight_stride]
  int64_t weight_stride;  // elements, whole chunks
  int embed;
  float scale;      // of sums
  RowTensor shift;  // [embed]
  RowTensor norm_weight, norm_bias, position, prefix;
  float eps;
  bool norm;   // the tile holds whole tokens, which pass a LayerNorm
  bool packs;  // four elements of a token, and of what is added to it, are one access
  int prefixes;
  int position_first;    // row of the first patch
  const int* positions;  // of a packed call: row of each token, -1 if its place is broken
  void* out;             // [images, prefixes + patches, embed]
  float* sums;           // [tokens, embed], instead of out; null otherwise

  __host__ __device__ int token_tiles() const { return (images.g.tokens + kTile - 1) / kTile; }
  __host__ __device__ int embed_tiles() const { return (embed + kTile - 1) / kTile; }
  __device__ __forceinline__ int64_t out_row(int m) const {
    return int64_t(m / images.g.patches) * (prefixes + images.g.patches) + prefixes +
           m % images.g.patches;
  }
};

// Four elements of a row from `column`, `otherwise` beyond the last.
__device__ __forceinline__ void load_four(float (&v)[4], const RowTensor& t, const Params& p,
                                          int64_t row, int column, float otherwise) {
  if (p.packs) {
    t.load(v, row, column < p.embed ? column : 0, otherwise);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i] = column + i < p.embed ? t.at(row, column + i, otherwise) : otherwise;
  }
}

template <typename T>
__device__ __forceinline__ void store_four(const float (&v)[4], T* row, const Params& p,
                                           int column) {
  if (p.packs) {
    if (column < p.embed) {
      Pack<T, 4> out;
#pragma unroll
      for (int i = 0; i < 4; ++i) out.set(i, v[i]);
      out.store(row + column);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < p.embed) from_float(v[i], row + column + i);
  }
}

// LayerNorm of a row of at most 128 elements, four of them a lane, those at `column`.
__device__ __forceinline__ void normalise(float (&z)[4], const Params& p, int column) {
  float sum = 0.f, squares = 0.f, weight[4], bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += column + i < p.embed ? z[i] : 0.f;
  const float mean = warp_sum(sum) / float(p.embed);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    z[i] -= mean;
    squares += column + i < p.embed ? z[i] * z[i] : 0.f;
  }
  const float rstd = rsqrtf(warp_sum(squares) / float(p.embed) + p.eps);
  load_four(weight, p.norm_weight, p, 0, column, 1.f);
  load_four(bias, p.norm_bias, p, 0, column, 0.f);
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = z[i] * rstd * weight[i] + bias[i];
}

// Adds the position of token m and writes four elements of it. A token whose place is broken shows:
// it is NaN.
template <typename T>
__device__ __forceinline__ void finish(float (&z)[4], const Params& p, int m, int column) {
  const int row = p.positions ? p.positions[m] : p.position_first + m % p.images.g.patches;
  float position[4];
  load_four(position, p.position, p, max(row, 0), column, 0.f);
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = row < 0 ? NAN : z[i] + position[i];
  store_four(z, static_cast<T*>(p.out) + p.out_row(m) * p.embed, p, column);
}

template <typename T>
__device__ __forceinline__ void write_prefix(const Params& p, int image) {
  const int count = p.prefixes * p.embed;
  T* const out =
      static_cast<T*>(p.out) + int64_t(image) * (p.prefixes + p.images.g.patches) * p.embed;
  for (int i = int(threadIdx.x); i < count; i += kThreads) {
    const int row = i / p.embed, column = i % p.embed;
    const float position = p.position_first ? p.position.at(row, column, 0.f) : 0.f;
    from_float(p.prefix.at(row, column, 0.f) + position, out + i);
  }
}

// ---- products of tiles ----

// Rows [first_row, ...) below row_end and columns [first_column, ...) below column_end of a matrix
// whose rows begin at start(row), zeros outside.
template <typename T, int kRows, int kColumns, typename Start>
__device__ __forceinline__ void copy_tile(const SharedTile<T, kColumns>& tile, int first_row,
                                          int row_end, int first_column, int column_end,
                                          Start&& start) {
  using Tile = SharedTile<T, kColumns>;
  static_assert(kRows * Tile::kChunks % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kRows * Tile::kChunks / kThreads; ++i) {
    const int at = int(threadIdx.x) + i * kThreads;
    const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
    const int column = first_column + chunk * Tile::kChunk;
    const bool exists = first_row + row < row_end && column < column_end;
    const T* const from = exists ? start(first_row + row) + column : start(0);
    ptx::copy_async(tile.address(row, chunk), from, exists);
  }
}

using Sums = float[2][8][4];

// d += a tile of 32 x 64 a warp over a stage: a(row, k) and b(k, column) load fragments.
template <typename T, typename LoadA, typename LoadB>
__device__ __forceinline__ void multiply_stage(Sums& d, LoadA&& load_a, LoadB&& load_b) {
  using M = Mma<T>;
  const int warp = int(threadIdx.x) / kWarp, row = warp % 4 * 32, column = warp / 4 * 64;
#pragma unroll
  for (int k = 0; k < kDepth<T>; k += M::kDepth) {
    typename M::A a[2];
    a[0] = load_a(row, k);
    a[1] = load_a(row + 16, k);
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      const typename M::B b = load_b(k, column + n * 8);
      M::multiply(&d[0][n], a[0], b);
      M::multiply(&d[1][n], a[1], b);
    }
  }
}

// The pipeline of every product: prepare(s) makes the indices of step s, fetch(s) starts its loads,
// multiply(stage) uses what came, store(s) writes what came through registers. Indices are kept for
// two steps, prepared a step ahead of their use.
template <typename Prepare, typename Fetch, typename Multiply, typename Store>
__device__ __forceinline__ void run_pipeline(int steps, Prepare&& prepare, Fetch&& fetch,
                                             Multiply&& multiply, Store&& store) {
  const auto load = [&](int step) {
    if (step < steps) fetch(step, step % kStages);
  };
  const auto land = [&](int step) {
    if (step < steps) store(step, step % kStages);
    ptx::copy_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) {
    prepare(step);
    __syncthreads();
    load(step);
    land(step);
  }
  prepare(kStages - 1);
  for (int step = 0; step < steps; ++step) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    multiply(step % kStages);
    land(step + kStages - 1);
    prepare(step + kStages);
  }
  ptx::copy_wait<0>();
  __syncthreads();
}

// The sums of a block as [kTile][kOutStride] float32, which may lie over its stages.
__device__ __forceinline__ void spread_sums(const Sums& d, float* to) {
  const int warp = int(threadIdx.x) / kWarp, lane = lane_id();
  float* const mine = to + (warp % 4 * 32 + lane / 4) * kOutStride + warp / 4 * 64 + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pack<float, 2> pair;
        pair.element[0] = d[r][n][half * 2];
        pair.element[1] = d[r][n][half * 2 + 1];
        pair.store(mine + (r * 16 + half * 8) * kOutStride + n * 8);
      }
  __syncthreads();
}

constexpr int kStageBytes = 2 * kTile * 64;
constexpr int kProductBytes =
    std::max(kStages * kStageBytes, kTile * kOutStride * int(sizeof(float)));

// float32 splits its operands in registers, which leaves room for one block.
template <typename T>
constexpr int kBlocks = sizeof(T) == 4 ? 1 : 2;

template <typename T, typename Pixel>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    patch_project_kernel(const __grid_constant__ Params p) {
  constexpr int kStep = kDepth<T>;
  using Tile = SharedTile<T, kStep>;
  using M = Mma<T>;
  VITKIT_DYNAMIC_SHARED(memory);
  const int tiles = p.token_tiles() * p.embed_tiles();
  if (int(blockIdx.x) >= tiles) return write_prefix<T>(p, int(blockIdx.x) - tiles);
  const Geometry& g = p.images.g;
  const int first = int(blockIdx.x) / p.embed_tiles() * kTile;
  const int column = int(blockIdx.x) % p.embed_tiles() * kTile, depth = g.depth();
  const auto patches = [&](int stage) { return Tile{memory + stage * kStageBytes}; };
  const auto weights = [&](int stage) {
    return Tile{memory + stage * kStageBytes + Tile::bytes(kTile)};
  };
  auto* const columns = reinterpret_cast<Columns<kStep>*>(memory + kProductBytes);  // of two steps
  auto* const tokens = reinterpret_cast<Token*>(columns + 2);
  const T* const weight = static_cast<const T*>(p.weight);

  fill_tokens(tokens, p.images, first, kTile, g.tokens);
  Gather<T, Pixel, kTile, kStep, kThreads> gather(p.images.unit_for(first, first + kTile));
  Sums d = {};
  run_pipeline(
      (depth + kStep - 1) / kStep,
      [&](int step) { fill_columns(columns[step % 2], p.images, gather.unit, step * kStep); },
      [&](int step, int stage) {
        gather.fetch(patches(stage), p.images, tokens, columns[step % 2]);
        copy_tile<T, kTile>(weights(stage), column, p.embed, step * kStep, depth,
                            [&](int row) { return weight + row * p.weight_stride; });
      },
      [&](int stage) {
        multiply_stage<T>(
            d, [&](int row, int k) { return M::load_a(patches(stage), row, k); },
            [&](int k, int n) { return M::load_rows(weights(stage), n, k); });
      },
      [&](int step, int stage) { gather.store(patches(stage), columns[step % 2]); });

  float* const out = reinterpret_cast<float*>(memory);
  spread_sums(d, out);
  const int e = column + lane_id() * 4;
  float shift[4];
  load_four(shift, p.shift, p, 0, e, 0.f);
  for (int row = int(threadIdx.x) / kWarp; row < kTile; row += kThreads / kWarp) {
    const int m = first + row;
    if (m >= g.tokens) break;
    float z[4];
    const auto sums = Pack<float, 4>::load(out + row * kOutStride + lane_id() * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) z[i] = sums.element[i] * p.scale + shift[i];
    if (p.sums) {
      store_four(z, p.sums + int64_t(m) * p.embed, p, e);
    } else {
      if (p.norm) normalise(z, p, e);
      finish<T>(z, p, m, e);
    }
  }
}

// Tokens wider than a tile: LayerNorm of their sums, a warp a token.
template <typename T>
__global__ void __launch_bounds__(kThreads) patch_norm_kernel(const __grid_constant__ Params p) {
  constexpr int kWarps = kThreads / kWarp;
  const int blocks = (p.images.g.tokens + kWarps - 1) / kWarps;
  if (int(blockIdx.x) >= blocks) return write_prefix<T>(p, int(blockIdx.x) - blocks);
  const int m = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp;
  if (m >= p.images.g.tokens) return;
  const RowTensor sums{p.sums, Element::f32, p.embed};
  float sum = 0.f, squares = 0.f, z[4];
  const auto each = [&](auto&& f) {
    for (int e = lane_id() * 4; e < p.embed; e += kWarp * 4) {
      load_four(z, sums, p, m, e, 0.f);
      f(e);
    }
  };
  each([&](int) {
    for (const float x : z) sum += x;
  });
  const float mean = warp_sum(sum) / float(p.embed);
  each([&](int e) {
    for (int i = 0; i < 4; ++i) squares += e + i < p.embed ? (z[i] - mean) * (z[i] - mean) : 0.f;
  });
  const float rstd = rsqrtf(warp_sum(squares) / float(p.embed) + p.eps);
  each([&](int e) {
    float weight[4], bias[4];
    load_four(weight, p.norm_weight, p, 0, e, 1.f);
    load_four(bias, p.norm_bias, p, 0, e, 0.f);
    for (int i = 0; i < 4; ++i) z[i] = (z[i] - mean) * rstd * weight[i] + bias[i];
    finish<T>(z, p, m, e);
  });
}

// ---- weights in the order of the gather, bytes folded into them ----

struct PrepareParams {
  Geometry g;
  const void* weight;  // [embed, depth]
  void* prepared;      // [embed, stride], zeros behind the last
  int stride;
  RowTensor bias;
  const float* tables;  // [4, channels]: centre, padding, factor, offset; null: no bytes
  float* shift;         // [embed], of bytes: bias and what the offsets add
};

// One block: a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    patch_prepare_kernel(const __grid_constant__ PrepareParams p) {
  const int e = int(blockIdx.x), depth = p.g.depth(), channels = p.g.channels;
  const T* const weight = static_cast<const T*>(p.weight) + int64_t(e) * depth;
  T* const to = static_cast<T*>(p.prepared) + int64_t(e) * p.stride;
  float shift = 0.f;
  for (int k = int(threadIdx.x); k < p.stride; k += kThreads) {
    float value = 0.f;
    if (k < depth) {
      const Place at(p.g, k);
      value = to_float(weight[at.of_weight(p.g)]);
      if (p.tables) {
        shift += value * p.tables[3 * channels + at.channel];
        value *= p.tables[2 * channels + at.channel];
      }
    }
    from_float(value, to + k);
  }
  if (p.tables == nullptr) return;
  shift = block_sum<kThreads>(shift);
  if (threadIdx.x == 0) p.shift[e] = shift + p.bias.at(0, e, 0.f);
}

// (x / 255 - mean) / std = (x - centre) * factor * scale + offset, factors at most 1: constants of
// 64 channels at a time, as arguments, which need no memory of the host's.
struct TableParams {
  float values[4][64];
  float* tables;
  int first, channels;
};

static __global__ void __launch_bounds__(64)
    patch_table_kernel(const __grid_constant__ TableParams p) {
  const int c = p.first + int(threadIdx.x);
  if (c >= p.channels) return;
  for (int i = 0; i < 4; ++i) p.tables[i * p.channels + c] = p.values[i][threadIdx.x];
}

}  // namespace vitkit::patch_embed
