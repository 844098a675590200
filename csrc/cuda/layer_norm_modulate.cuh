// Device code of layer_norm_modulate and its launches. No torch header: the emulator compiles this
// very file.
//
// x is [segments, rows, width]; a segment is what shares one modulation, a sample or everything. A
// row lies in the registers of a group of threads: x is read once, y written once. The gradient
// walks the rows of a part of a segment and keeps the sums of its columns in registers, too; two
// small kernels add the parts and then the segments, in order, without atomics.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "element.cuh"
#include "launch_kernel.cuh"
#include "reduce.cuh"

namespace vitkit::layer_norm {

// Rows that the widest tile below holds.
constexpr int kMaxWidth = 8192;
// Rows of a part of the gradient at least, and parts of a segment at most: blocks enough to fill a
// GPU from a ViT's batches on, while the sums of parts stay a few percent of the traffic.
constexpr int64_t kPartRows = 32, kMaxParts = 1024;

struct Shape {
  int64_t segments, rows;
  int width;
  bool per_token;          // shift and scale have a row per row of x, not per segment
  RowTensor weight, bias;  // one row
  RowTensor shift, scale;
};

struct ForwardParams {
  Shape shape;
  const void* x;
  void* y;
  float* mean;  // [segments, rows]
  float* rstd;  // [segments, rows]
  float eps;
  unsigned blocks;  // of a segment
};

struct BackwardParams {
  Shape shape;
  const void* x;
  const void* grad;
  void* dx;
  const float* mean;
  const float* rstd;
  SmallGradient dscale;  // per token, otherwise null
  // Sums over the rows of a part of dz and dz * xhat, dz being the gradient of the rows before the
  // modulation of their segment: [segments, parts, 2, width]. Null where nothing wants them.
  float* partial;
  int64_t parts, part_rows;
};

struct SmallParams {
  Shape shape;
  const float* partial;
  float* sums;  // [segments, 2, width], of all parts; null where there is one segment
  int64_t parts;
  SmallGradient dshift, dscale;  // [segments, width]
  SmallGradient dweight, dbias;  // [width]
};

__host__ __device__ constexpr int block_threads(int group) { return group < 128 ? 128 : group; }
// Of a multiprocessor: registers for all that the gradient holds, 128 to 168 a thread.
__host__ __device__ constexpr int resident_blocks(int group) {
  return block_threads(group) < 384 ? 384 / block_threads(group) : 1;
}

// Columns [column(i), column(i) + kPack) for i below kItems are this thread's.
template <int kPack, int kGroup>
__device__ __forceinline__ int column_of(int i) {
  return (i * kGroup + int(threadIdx.x) % kGroup) * kPack;
}

template <typename T, int kPack, int kGroup, int kValues>
__global__ void __launch_bounds__(block_threads(kGroup))
    layer_norm_fwd_kernel(const __grid_constant__ ForwardParams p) {
  constexpr int kItems = kValues / kPack, kRows = block_threads(kGroup) / kGroup;
  using P = Pack<T, kPack>;
  const Shape& s = p.shape;
  const int64_t segment = blockIdx.x / p.blocks;
  const int64_t r = int64_t(blockIdx.x % p.blocks) * kRows + threadIdx.x / kGroup;
  const int64_t row = segment * s.rows + r, modulation = s.per_token ? row : segment;
  const int width = r < s.rows ? s.width : 0;  // rows behind the last have no columns
  const T* const x = static_cast<const T*>(p.x) + row * s.width;
  T* const y = static_cast<T*>(p.y) + row * s.width;

  P held[kItems];
  float sum[1] = {0.f}, squares[1] = {0.f};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = column_of<kPack, kGroup>(i);
    if (column >= width) continue;
    held[i] = P::load(x + column);
#pragma unroll
    for (int k = 0; k < kPack; ++k) sum[0] += held[i].get(k);
  }
  group_sum<kGroup>(sum);
  const float mean = sum[0] / float(s.width);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (column_of<kPack, kGroup>(i) >= width) continue;
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const float d = held[i].get(k) - mean;
      squares[0] += d * d;
    }
  }
  group_sum<kGroup>(squares);
  const float rstd = rsqrtf(squares[0] / float(s.width) + p.eps);
  if (width != 0 && threadIdx.x % kGroup == 0) {
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = column_of<kPack, kGroup>(i);
    if (column >= width) continue;
    float weight[kPack], bias[kPack], scale[kPack], shift[kPack];
    s.weight.load(weight, 0, column, 1.f);
    s.bias.load(bias, 0, column, 0.f);
    s.scale.load(scale, modulation, column, 0.f);
    s.shift.load(shift, modulation, column, 0.f);
    P out;
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const float normed = (held[i].get(k) - mean) * rstd * weight[k] + bias[k];
      out.set(k, normed * (1.f + scale[k]) + shift[k]);
    }
    out.store(y + column);
  }
}

template <typename T, int kPack, int kGroup, int kValues>
__global__ void __launch_bounds__(block_threads(kGroup), resident_blocks(kGroup))
    layer_norm_bwd_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kItems = kValues / kPack, kRows = block_threads(kGroup) / kGroup;
  using P = Pack<T, kPack>;
  VITKIT_DYNAMIC_SHARED(memory);
  const Shape& s = p.shape;
  const int64_t segment = blockIdx.x / unsigned(p.parts), part = blockIdx.x % unsigned(p.parts);
  const int group = int(threadIdx.x) / kGroup;
  const float inverse = 1.f / float(s.width);

  float gain[kItems][kPack], dz_sum[kItems][kPack] = {}, dz_xhat_sum[kItems][kPack] = {};
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = column_of<kPack, kGroup>(i);
    float scale[kPack];
    if (column >= s.width) continue;
    s.weight.load(gain[i], 0, column, 1.f);
    if (s.per_token) continue;
    s.scale.load(scale, segment, column, 0.f);
#pragma unroll
    for (int k = 0; k < kPack; ++k) gain[i][k] *= 1.f + scale[k];
  }

  const int64_t end = min((part + 1) * p.part_rows, s.rows);
  for (int64_t first = part * p.part_rows; first < end; first += kRows) {
    const int64_t row = segment * s.rows + first + group;
    const int width = first + group < end ? s.width : 0;
    const float mean = width ? p.mean[row] : 0.f, rstd = width ? p.rstd[row] : 0.f;
    const int64_t start = row * s.width;
    float dz[kItems][kPack], xhat[kItems][kPack], c[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int column = column_of<kPack, kGroup>(i);
      if (column >= width) continue;
      const P x = P::load(static_cast<const T*>(p.x) + start + column);
      const P grad = P::load(static_cast<const T*>(p.grad) + start + column);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        xhat[i][k] = (x.get(k) - mean) * rstd;
        dz[i][k] = grad.get(k);
      }
      if (s.per_token) {
        float bias[kPack], scale[kPack], dscale[kPack];
        s.bias.load(bias, 0, column, 0.f);
        s.scale.load(scale, row, column, 0.f);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          dscale[k] = dz[i][k] * (xhat[i][k] * gain[i][k] + bias[k]);
          dz[i][k] *= 1.f + scale[k];
        }
        p.dscale.store(start + column, dscale);
      }
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        dz_sum[i][k] += dz[i][k];
        dz_xhat_sum[i][k] += dz[i][k] * xhat[i][k];
        c[0] += dz[i][k] * gain[i][k];
        c[1] += dz[i][k] * gain[i][k] * xhat[i][k];
      }
    }
    group_sum<kGroup>(c);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int column = column_of<kPack, kGroup>(i);
      if (column >= width) continue;
      P dx;
#pragma unroll
      for (int k = 0; k < kPack; ++k)
        dx.set(k, (dz[i][k] * gain[i][k] - (c[0] + xhat[i][k] * c[1]) * inverse) * rstd);
      dx.store(static_cast<T*>(p.dx) + start + column);
    }
  }
  if (p.partial == nullptr) return;

  // The rows of a block are added in shared memory.
  float* const out = p.partial + int64_t(blockIdx.x) * 2 * s.width;
  float* const shared = reinterpret_cast<float*>(memory);
  float* const mine = kRows == 1 ? out : shared + group * 2 * s.width;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = column_of<kPack, kGroup>(i);
    if (column >= s.width) continue;
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      mine[column + k] = dz_sum[i][k];
      mine[s.width + column + k] = dz_xhat_sum[i][k];
    }
  }
  if constexpr (kRows > 1) {
    __syncthreads();
    for (int i = int(threadIdx.x); i < 2 * s.width; i += int(blockDim.x)) {
      float total = shared[i];
      for (int g = 1; g < kRows; ++g) total += shared[g * 2 * s.width + i];
      out[i] = total;
    }
  }
}

__device__ __forceinline__ float modulation_factor(const Shape& s, int64_t segment, int column) {
  return s.per_token ? 1.f : 1.f + s.scale.at(segment, column, 0.f);
}

// One block: 32 columns of a segment. Adds the parts.
static __global__ void __launch_bounds__(kColumnThreads)
    layer_norm_merge_kernel(const __grid_constant__ SmallParams p) {
  const Shape& s = p.shape;
  const unsigned blocks = unsigned(s.width + kWarp - 1) / kWarp;
  const int64_t segment = blockIdx.x / blocks;
  const int column = int(blockIdx.x % blocks * kWarp + threadIdx.x % kWarp);
  const bool exists = column < s.width;
  const Pair sum = column_sum(exists ? p.parts : 0, [&](int64_t part) {
    const float* const at = p.partial + (segment * p.parts + part) * 2 * s.width + column;
    return Pair{at[0], at[s.width]};
  });
  if (threadIdx.x >= kWarp || !exists) return;
  const int64_t i = segment * s.width + column;
  p.dshift.store(i, sum.first);
  p.dscale.store(i,
                 s.weight.at(0, column, 1.f) * sum.second + s.bias.at(0, column, 0.f) * sum.first);
  if (p.sums) {
    p.sums[segment * 2 * s.width + column] = sum.first;
    p.sums[(segment * 2 + 1) * s.width + column] = sum.second;
  } else {
    const float factor = modulation_factor(s, 0, column);
    p.dweight.store(column, factor * sum.second);
    p.dbias.store(column, factor * sum.first);
  }
}

// One block: 32 columns. Adds the segments.
static __global__ void __launch_bounds__(kColumnThreads)
    layer_norm_weight_kernel(const __grid_constant__ SmallParams p) {
  const Shape& s = p.shape;
  const int column = int(blockIdx.x * kWarp + threadIdx.x % kWarp);
  const bool exists = column < s.width;
  const Pair sum = column_sum(exists ? s.segments : 0, [&](int64_t segment) {
    const float factor = modulation_factor(s, segment, column);
    const float* const at = p.sums + segment * 2 * s.width + column;
    return Pair{factor * at[0], factor * at[s.width]};
  });
  if (threadIdx.x >= kWarp || !exists) return;
  p.dbias.store(column, sum.first);
  p.dweight.store(column, sum.second);
}

// ---- launches ----

inline int64_t part_rows_of(int64_t rows) {
  return std::max(kPartRows, (rows + kMaxParts - 1) / kMaxParts);
}

// Whether rows of x and of all small tensors can be read 16 bytes at a time.
inline bool packs_fit(const Shape& s, int bytes, std::initializer_list<const void*> tensors) {
  bool fit = s.width * bytes % 16 == 0;
  for (const void* t : tensors) fit = fit && reinterpret_cast<uintptr_t>(t) % 16 == 0;
  for (const RowTensor& t : {s.weight, s.bias, s.shift, s.scale}) fit = fit && t.takes_packs();
  return fit;
}

template <typename T, int kPack, int kGroup, int kValues>
const char* launch_rows(ForwardParams p, Stream stream) {
  constexpr int kRows = block_threads(kGroup) / kGroup;
  const int64_t blocks = (p.shape.rows + kRows - 1) / kRows;
  if (blocks * p.shape.segments > 0x7fffffff) return "more than 2^31 - 1 blocks";
  p.blocks = unsigned(blocks);
  return launch_kernel(&layer_norm_fwd_kernel<T, kPack, kGroup, kValues>,
                       unsigned(blocks * p.shape.segments), block_threads(kGroup), 0, stream, p);
}

template <typename T, int kPack, int kGroup, int kValues>
const char* launch_rows(const BackwardParams& p, Stream stream) {
  constexpr int kRows = block_threads(kGroup) / kGroup;
  const int64_t blocks = p.shape.segments * p.parts;
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  const int shared = kRows > 1 && p.partial ? kRows * 2 * p.shape.width * int(sizeof(float)) : 0;
  return launch_kernel(&layer_norm_bwd_kernel<T, kPack, kGroup, kValues>, unsigned(blocks),
                       block_threads(kGroup), shared, stream, p);
}

// Threads of a row and the values each holds. 16 x 8: Swin's 96 and 128, of which a warp of packs
// would leave most lanes idle. 32: ViT's widths, sums without a barrier. 256 x 32: DiT-XL and
// wider; more values a thread would spill, fewer need more warps at the barriers.
inline const char* layer_norm_forward(const ForwardParams& p, Element element, Stream stream) {
  const int width = p.shape.width;
  if (width > kMaxWidth) return "rows this wide have no kernel";
  return with_element(element, [&](auto* type) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = kFullPack<T>;
    if (!packs_fit(p.shape, sizeof(T), {p.x, p.y})) {
      if (width <= 1024) return launch_rows<T, 1, 32, 32>(p, stream);
      return launch_rows<T, 1, 512, 16>(p, stream);
    }
    if (width <= 128) return launch_rows<T, kPack, 16, 8>(p, stream);
    if (width <= 1024) return launch_rows<T, kPack, 32, 32>(p, stream);
    return launch_rows<T, kPack, 256, 32>(p, stream);
  });
}

// 16 values a thread: beside gain, gradient and xhat of each, it holds the two sums of its column.
inline const char* layer_norm_backward(const BackwardParams& p, Element element, Stream stream) {
  const int width = p.shape.width;
  if (width > kMaxWidth) return "rows this wide have no kernel";
  return with_element(element, [&](auto* type) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = kFullPack<T>;
    if (!packs_fit(p.shape, sizeof(T), {p.x, p.grad, p.dx})) {
      if (width <= 512) return launch_rows<T, 1, 32, 16>(p, stream);
      return launch_rows<T, 1, 512, 16>(p, stream);
    }
    if (width <= 128) return launch_rows<T, kPack, 16, 8>(p, stream);
    if (width <= 512) return launch_rows<T, kPack, 32, 16>(p, stream);
    if (width <= 2048) return launch_rows<T, kPack, 128, 16>(p, stream);
    return launch_rows<T, kPack, 512, 16>(p, stream);
  });
}

// Gradients of the small tensors from the sums of the parts.
inline const char* layer_norm_small_gradients(const SmallParams& p, Stream stream) {
  const int64_t columns = (p.shape.width + kWarp - 1) / kWarp;
  if (columns * p.shape.segments > 0x7fffffff) return "more than 2^31 - 1 blocks";
  const char* error = launch_kernel(&layer_norm_merge_kernel, unsigned(columns * p.shape.segments),
                                    kColumnThreads, 0, stream, p);
  if (error || !p.sums) return error;
  return launch_kernel(&layer_norm_weight_kernel, unsigned(columns), kColumnThreads, 0, stream, p);
}

}  // namespace vitkit::layer_norm
