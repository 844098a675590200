// Device code of gated_residual and its launches. No torch header: the emulator compiles this very
// file.
//
// Tensors are [segments, rows, width]; a segment is what shares one gate, a sample or everything.
// The gradient walks the rows of a part of a segment and keeps the sums of its columns in
// registers; a small kernel adds the parts in order, without atomics.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "launch_kernel.cuh"
#include "reduce.cuh"
#include "tiling.cuh"

namespace vitkit::gated_residual {

// Rows of a part of the gradient at least, and parts of a segment at most: blocks enough to fill a
// GPU from a ViT's batches on, while the sums of parts stay a few percent of the traffic.
constexpr int64_t kPartRows = 64, kMaxParts = 1024;

struct Shape {
  int64_t segments, rows;
  int width;
  bool per_token;  // gate has a row per row of x, not per segment
  RowTensor gate;
};

struct ForwardParams {
  Shape shape;
  const void* x;
  const void* y;
  void* out;
  Tiling tiling;  // of rows and packs
};

struct BackwardParams {
  Shape shape;
  const void* grad;
  const void* y;
  void* dy;
  SmallGradient dgate;  // [segments, rows, width] or [segments, width]
  float* partial;       // [segments, parts, width]; null: per token
  int64_t parts, part_rows;
  Tiling tiling;  // of parts and packs; a block is one part of some packs
};

template <typename T, int kPack>
__global__ void __launch_bounds__(kTileThreads)
    gated_residual_fwd_kernel(const __grid_constant__ ForwardParams p) {
  using P = Pack<T, kPack>;
  const Shape& s = p.shape;
  const Tiling::Place at = p.tiling.place(blockIdx.x);
  if (!at.exists) return;
  const int64_t row = at.segment * s.rows + at.row;
  const int column = int(at.unit) * kPack;
  const int64_t i = row * s.width + column;
  const P x = P::load(static_cast<const T*>(p.x) + i);
  const P y = P::load(static_cast<const T*>(p.y) + i);
  float gate[kPack];
  s.gate.load(gate, s.per_token ? row : at.segment, column, 1.f);
  P out;
#pragma unroll
  for (int k = 0; k < kPack; ++k) out.set(k, x.get(k) + gate[k] * y.get(k));
  out.store(static_cast<T*>(p.out) + i);
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kTileThreads)
    gated_residual_bwd_kernel(const __grid_constant__ BackwardParams p) {
  using P = Pack<T, kPack>;
  VITKIT_DYNAMIC_SHARED(memory);
  const Shape& s = p.shape;
  const int lanes = p.tiling.lanes(), groups = kTileThreads >> p.tiling.shift;
  const int lane = int(threadIdx.x) & (lanes - 1), group = int(threadIdx.x) >> p.tiling.shift;
  const int first = int(blockIdx.x % p.tiling.unit_blocks) * lanes * kPack;
  const unsigned item = blockIdx.x / p.tiling.unit_blocks;  // segment and part
  const int64_t segment = item / unsigned(p.parts), part = item % unsigned(p.parts);
  const int column = first + lane * kPack;

  float sum[kPack] = {};
  if (column < s.width) {
    float gate[kPack];
    if (!s.per_token) s.gate.load(gate, segment, column, 1.f);
    const int64_t end = min(s.rows, (part + 1) * p.part_rows);
    for (int64_t r = part * p.part_rows + group; r < end; r += groups) {
      const int64_t row = segment * s.rows + r, i = row * s.width + column;
      const P grad = P::load(static_cast<const T*>(p.grad) + i);
      const P y = P::load(static_cast<const T*>(p.y) + i);
      float dgate[kPack];
      if (s.per_token) s.gate.load(gate, row, column, 1.f);
      P dy;
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        dy.set(k, gate[k] * grad.get(k));
        dgate[k] = grad.get(k) * y.get(k);
        sum[k] += dgate[k];
      }
      dy.store(static_cast<T*>(p.dy) + i);
      if (s.per_token) p.dgate.store(i, dgate);
    }
  }
  if (p.partial == nullptr) return;

  // The rows of a block are added in shared memory.
  float* const shared = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int k = 0; k < kPack; ++k) shared[int(threadIdx.x) * kPack + k] = sum[k];
  __syncthreads();
  const int columns = min(lanes * kPack, s.width - first);
  for (int i = int(threadIdx.x); i < columns; i += kTileThreads) {
    float total = shared[i];
    for (int g = 1; g < groups; ++g) total += shared[g * lanes * kPack + i];
    p.partial[int64_t(item) * s.width + first + i] = total;
  }
}

// One block: 64 columns of a segment, two a thread. Adds the parts.
static __global__ void __launch_bounds__(kColumnThreads)
    gated_residual_sum_kernel(const __grid_constant__ BackwardParams p) {
  const Shape& s = p.shape;
  const unsigned blocks = unsigned(s.width + 2 * kWarp - 1) / (2 * kWarp);
  const int64_t segment = blockIdx.x / blocks;
  const int column = int(blockIdx.x % blocks * kWarp + threadIdx.x % kWarp) * 2;
  const bool both = column + 1 < s.width, exists = column < s.width;
  const Pair sum = column_sum(exists ? p.parts : 0, [&](int64_t part) {
    const float* const at = p.partial + (segment * p.parts + part) * s.width + column;
    return Pair{at[0], both ? at[1] : 0.f};
  });
  if (threadIdx.x >= kWarp || !exists) return;
  p.dgate.store(segment * s.width + column, sum.first);
  if (both) p.dgate.store(segment * s.width + column + 1, sum.second);
}

// ---- launches ----

inline int64_t part_rows_of(int64_t rows) {
  const int64_t least = (rows + kMaxParts - 1) / kMaxParts;
  return least > kPartRows ? least : kPartRows;
}

// Whether all rows begin at multiples of 16 bytes.
inline bool packs_fit(const Shape& s, Element element, std::initializer_list<const void*> tensors) {
  bool fit = s.gate.takes_packs() && int64_t(s.width) * bytes_of(element) % 16 == 0;
  for (const void* t : tensors) fit = fit && aligned(t);
  return fit;
}

inline const char* gated_residual_forward(ForwardParams p, Element element, Stream stream) {
  const Shape& s = p.shape;
  const bool packs = packs_fit(s, element, {p.x, p.y, p.out});
  return with_pack(element, packs, [&](auto* type, auto pack) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    const char* error = make_tiling(p.tiling, s.segments, s.rows, s.width / pack);
    if (error) return error;
    return launch_kernel(&gated_residual_fwd_kernel<T, pack>, blocks_of(p.tiling), kTileThreads, 0,
                         stream, p);
  });
}

inline const char* gated_residual_backward(BackwardParams p, Element element, Stream stream) {
  const Shape& s = p.shape;
  const bool packs = packs_fit(s, element, {p.grad, p.y, p.dy});
  const char* error = with_pack(element, packs, [&](auto* type, auto pack) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    Tiling& t = p.tiling;
    const char* failed = make_tiling(t, s.segments, p.parts, s.width / pack);
    t.row_blocks = unsigned(p.parts);  // a block is all rows of a part
    if (failed || s.segments * p.parts > 0x7fffffff / t.unit_blocks)
      return "more than 2^31 - 1 blocks";
    const int shared = p.partial ? kTileThreads * pack * int(sizeof(float)) : 0;
    return launch_kernel(&gated_residual_bwd_kernel<T, pack>, blocks_of(t), kTileThreads, shared,
                         stream, p);
  });
  if (error || !p.partial) return error;
  const int64_t blocks = (int64_t(s.width) + 2 * kWarp - 1) / (2 * kWarp) * s.segments;
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  return launch_kernel(&gated_residual_sum_kernel, unsigned(blocks), kColumnThreads, 0, stream, p);
}

}  // namespace vitkit::gated_residual
