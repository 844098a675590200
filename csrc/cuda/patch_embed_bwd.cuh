// Device code of patch_embed's gradients: two more products over the same gather. That of the
// weight is summed in splits of the tokens, whose number depends on the shape alone, and the splits
// are added in order; nothing is atomic.
#pragma once

#include "patch_embed.cuh"

namespace vitkit::patch_embed {

// Rows of whole chunks: the gradient of the projection, one row a token. It may be the gradient of
// the output itself, whose images have prefix rows between them.
struct TokenRows {
  const void* data;    // of the first patch
  int64_t image, row;  // strides
  int patches;         // of an image

  template <typename T>
  __device__ __forceinline__ const T* start(int m) const {
    return static_cast<const T*>(data) + m / patches * image + m % patches * row;
  }
};

// ---- through LayerNorm ----

constexpr int kNormTokens = 64;  // of a block

struct NormBackwardParams {
  Params forward;    // its sums are those of the projection
  const void* grad;  // like the output
  void* dz;          // [tokens, stride], zeros behind a row
  int stride;
  float* partial;  // [blocks, 2, embed]: gradients of weight and bias
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    patch_norm_bwd_kernel(const __grid_constant__ NormBackwardParams q) {
  __shared__ float statistics[kNormTokens][2];
  const Params& p = q.forward;
  const int first = int(blockIdx.x) * kNormTokens, embed = p.embed;
  const int count = min(kNormTokens, p.images.g.tokens - first);
  const auto sums_of = [&](int m) { return p.sums + int64_t(m) * embed; };
  const auto grad_of = [&](int m) { return static_cast<const T*>(q.grad) + p.out_row(m) * embed; };
  for (int i = int(threadIdx.x) / kWarp; i < count; i += kThreads / kWarp) {
    const int m = first + i;
    const float* const z = sums_of(m);
    const T* const grad = grad_of(m);
    float sum = 0.f, squares = 0.f, c1 = 0.f, c2 = 0.f;
    for (int e = lane_id(); e < embed; e += kWarp) sum += z[e];
    const float mean = warp_sum(sum) / float(embed);
    for (int e = lane_id(); e < embed; e += kWarp) squares += (z[e] - mean) * (z[e] - mean);
    const float rstd = rsqrtf(warp_sum(squares) / float(embed) + p.eps);
    for (int e = lane_id(); e < embed; e += kWarp) {
      const float h = to_float(grad[e]) * p.norm_weight.at(0, e, 1.f);
      c1 += h;
      c2 += h * (z[e] - mean) * rstd;
    }
    c1 = warp_sum(c1) / float(embed);
    c2 = warp_sum(c2) / float(embed);
    T* const dz = static_cast<T*>(q.dz) + int64_t(m) * q.stride;
    for (int e = lane_id(); e < q.stride; e += kWarp) {
      float value = 0.f;
      if (e < embed)
        value = (to_float(grad[e]) * p.norm_weight.at(0, e, 1.f) - c1 - (z[e] - mean) * rstd * c2) *
                rstd;
      from_float(value, dz + e);
    }
    if (lane_id() == 0) statistics[i][0] = mean, statistics[i][1] = rstd;
  }
  __syncthreads();
  float* const out = q.partial + int64_t(blockIdx.x) * 2 * embed;
  for (int e = int(threadIdx.x); e < embed; e += kThreads) {
    float dweight = 0.f, dbias = 0.f;
    for (int i = 0; i < count; ++i) {
      const float grad = to_float(grad_of(first + i)[e]);
      dweight += grad * (sums_of(first + i)[e] - statistics[i][0]) * statistics[i][1];
      dbias += grad;
    }
    out[e] = dweight;
    out[embed + e] = dbias;
  }
}

// Without LayerNorm: rows of the gradient that are not whole chunks, with zeros behind them.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    patch_pad_kernel(const __grid_constant__ NormBackwardParams q) {
  const Params& p = q.forward;
  const int64_t count = int64_t(p.images.g.tokens) * q.stride;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads) {
    const int m = int(i / q.stride), e = int(i % q.stride);
    static_cast<T*>(q.dz)[i] =
        e < p.embed ? static_cast<const T*>(q.grad)[p.out_row(m) * p.embed + e] : T(0.f);
  }
}

struct NormSumParams {
  const float* partial;  // [parts, 2, embed]
  int64_t parts;
  int embed;
  SmallGradient dweight, dbias;
};

// One block: 32 columns.
static __global__ void __launch_bounds__(kColumnThreads)
    patch_norm_sum_kernel(const __grid_constant__ NormSumParams p) {
  const int column = int(blockIdx.x * kWarp + threadIdx.x % kWarp);
  const bool exists = column < p.embed;
  const Pair sum = column_sum(exists ? p.parts : 0, [&](int64_t part) {
    const float* const at = p.partial + part * 2 * p.embed + column;
    return Pair{at[0], at[p.embed]};
  });
  if (threadIdx.x >= kWarp || !exists) return;
  p.dweight.store(column, sum.first);
  p.dbias.store(column, sum.second);
}

// ---- the weight ----

struct WeightParams {
  Images images;
  TokenRows dz;
  int embed, columns;   // columns: the depth of a patch
  int tokens_of_split;  // whole steps
  float* partial;       // [splits, embed, columns]
  float* partial_bias;  // [splits, embed]
};

// Bytes and their indices take the registers that a second block would need.
template <typename T, typename Pixel>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, Pixel> ? kBlocks<T> : 1)
    patch_dweight_kernel(const __grid_constant__ WeightParams p) {
  constexpr int kStep = kDepth<T>;
  using Tile = SharedTile<T, kTile>;
  using M = Mma<T>;
  VITKIT_DYNAMIC_SHARED(memory);
  const int embed_tiles = (p.embed + kTile - 1) / kTile;
  const int column_tiles = (p.columns + kTile - 1) / kTile;
  const int e = int(blockIdx.x) % embed_tiles * kTile;
  const int k = int(blockIdx.x) / embed_tiles % column_tiles * kTile;
  const int split = int(blockIdx.x) / embed_tiles / column_tiles;
  const int first = split * p.tokens_of_split;
  const int end = min(first + p.tokens_of_split, p.images.g.tokens);
  const auto grads = [&](int stage) { return Tile{memory + stage * kStageBytes}; };
  const auto patches = [&](int stage) {
    return Tile{memory + stage * kStageBytes + Tile::bytes(kStep)};
  };
  auto* const columns = reinterpret_cast<Columns<kTile>*>(memory + kProductBytes);
  auto* const tokens = reinterpret_cast<Token*>(columns + 1);  // of two steps

  Gather<T, Pixel, kStep, kTile, kThreads> gather(p.images.unit_for(first, end));
  fill_columns(*columns, p.images, gather.unit, k);
  Sums d = {};
  float dbias = 0.f;
  run_pipeline((end - first + kStep - 1) / kStep,
               [&](int step) {
                 fill_tokens(tokens + step % 2 * kStep, p.images, first + step * kStep, kStep, end);
               },
               [&](int step, int stage) {
                 gather.fetch(patches(stage), p.images, tokens + step % 2 * kStep, *columns);
                 copy_tile<T, kStep>(grads(stage), first + step * kStep, end, e, p.embed,
                                     [&](int m) { return p.dz.start<T>(m); });
               },
               [&](int stage) {
                 multiply_stage<T>(
                     d, [&](int row, int i) { return M::load_a_columns(grads(stage), i, row); },
                     [&](int i, int n) { return M::load_columns(patches(stage), i, n); });
                 if (k == 0 && threadIdx.x < kTile)
#pragma unroll
                   for (int i = 0; i < kStep; ++i)
                     dbias += to_float(*grads(stage).at(i, int(threadIdx.x)));
               },
               [&](int step, int stage) { gather.store(patches(stage), *columns); });

  if (k == 0 && e + int(threadIdx.x) < p.embed && threadIdx.x < kTile)
    p.partial_bias[int64_t(split) * p.embed + e + threadIdx.x] = dbias;
  float* const out = reinterpret_cast<float*>(memory);
  spread_sums(d, out);
  float* const to = p.partial + (int64_t(split) * p.embed + e) * p.columns + k;
  for (int i = int(threadIdx.x); i < kTile * kTile; i += kThreads) {
    const int row = i / kTile, column = i % kTile;
    if (e + row < p.embed && k + column < p.columns)
      to[int64_t(row) * p.columns + column] = out[row * kOutStride + column];
  }
}

struct WeightSumParams {
  Geometry g;
  const float* partial;
  const float* partial_bias;
  int splits, embed;
  float scale;          // of bytes
  const float* tables;  // as PrepareParams
  void* dweight;        // [embed, depth] in the weight's own order
  SmallGradient dbias;
};

// One block: a row. Adds the splits. Bytes entered as x - centre: what they stand for is (x -
// centre) * factor * scale + offset.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    patch_dweight_sum_kernel(const __grid_constant__ WeightSumParams p) {
  const int e = int(blockIdx.x), depth = p.g.depth(), channels = p.g.channels;
  float dbias = 0.f;
  for (int s = 0; s < p.splits; ++s) dbias += p.partial_bias[int64_t(s) * p.embed + e];
  if (threadIdx.x == 0) p.dbias.store(e, dbias);
  T* const to = static_cast<T*>(p.dweight) + int64_t(e) * depth;
  for (int k = int(threadIdx.x); k < depth; k += kThreads) {
    float sum = 0.f;
    for (int s = 0; s < p.splits; ++s) sum += p.partial[(int64_t(s) * p.embed + e) * depth + k];
    const Place at(p.g, k);
    if (p.tables)
      sum = sum * p.tables[2 * channels + at.channel] * p.scale +
            p.tables[3 * channels + at.channel] * dbias;
    from_float(sum, to + at.of_weight(p.g));
  }
}

// ---- the images ----

struct ImageParams {
  Images images;  // the gradient, and the unit it is written by
  TokenRows dz;
  const void* weight;  // as Params
  int64_t weight_stride;
  int embed;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    patch_dimages_kernel(const __grid_constant__ ImageParams p) {
  constexpr int kStep = kDepth<T>;
  using Rows = SharedTile<T, kStep>;
  using Tile = SharedTile<T, kTile>;
  using M = Mma<T>;
  VITKIT_DYNAMIC_SHARED(memory);
  const Geometry& g = p.images.g;
  const int depth = g.depth(), column_tiles = (depth + kTile - 1) / kTile;
  const int first = int(blockIdx.x) / column_tiles * kTile;
  const int k = int(blockIdx.x) % column_tiles * kTile;
  const auto grads = [&](int stage) { return Rows{memory + stage * kStageBytes}; };
  const auto weights = [&](int stage) {
    return Tile{memory + stage * kStageBytes + Rows::bytes(kTile)};
  };
  auto* const columns = reinterpret_cast<Columns<kTile>*>(memory + kProductBytes);
  auto* const tokens = reinterpret_cast<Token*>(columns + 1);
  const T* const weight = static_cast<const T*>(p.weight);

  const int unit = p.images.unit_for(first, first + kTile);
  fill_columns(*columns, p.images, unit, k);
  fill_tokens(tokens, p.images, first, kTile, g.tokens);
  Sums d = {};
  run_pipeline((p.embed + kStep - 1) / kStep, [](int) {},
               [&](int step, int stage) {
                 copy_tile<T, kTile>(grads(stage), first, g.tokens, step * kStep, p.embed,
                                     [&](int m) { return p.dz.start<T>(m); });
                 copy_tile<T, kStep>(weights(stage), step * kStep, p.embed, k, depth,
                                     [&](int row) { return weight + row * p.weight_stride; });
               },
               [&](int stage) {
                 multiply_stage<T>(
                     d, [&](int row, int i) { return M::load_a(grads(stage), row, i); },
                     [&](int i, int n) { return M::load_columns(weights(stage), i, n); });
               },
               [](int, int) {});

  float* const out = reinterpret_cast<float*>(memory);
  spread_sums(d, out);
  T* const pixels = static_cast<T*>(const_cast<void*>(p.images.data));
  with_unit<16 / int(sizeof(T))>(unit, [&](auto constant) {
    constexpr int kUnit = decltype(constant)::value, kUnits = kTile / kUnit;
    for (int i = int(threadIdx.x); i < kTile * kUnits; i += kThreads) {
      const Unit u = columns->unit[i % kUnits];
      const Token& t = tokens[i / kUnits];
      if (!inside(u, t)) continue;
      Pack<T, kUnit> v;
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        v.set(j, out[i / kUnits * kOutStride + i % kUnits * kUnit + j]);
      v.store(pixels + p.images.offset(u, t));
    }
  });
}

// ---- positions and prefix tokens ----

struct TokenSumParams {
  const void* grad;  // [images, rows, embed]
  int64_t images;
  int rows, embed, prefixes;
  int first;  // row of the first position
  SmallGradient dposition, dprefix;
};

// A row of positions or prefix tokens is shared by all images.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    patch_token_sum_kernel(const __grid_constant__ TokenSumParams p) {
  const int64_t of_image = int64_t(p.rows) * p.embed;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= of_image) return;
  const T* const grad = static_cast<const T*>(p.grad) + i;
  float sum = 0.f;
#pragma unroll 4
  for (int64_t b = 0; b < p.images; ++b) sum += to_float(grad[b * of_image]);
  if (i < int64_t(p.prefixes) * p.embed) p.dprefix.store(i, sum);
  if (i >= int64_t(p.first) * p.embed) p.dposition.store(i - int64_t(p.first) * p.embed, sum);
}

}  // namespace vitkit::patch_embed
