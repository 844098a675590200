// Mixing the branches of dilated attention, forward and backward, and the launches of both. Results
// of a branch are rows beside each other; a token finds its own by arithmetic.
#pragma once

#include <algorithm>

#include "attention/backward.cuh"
#include "attention/dilated_map.cuh"
#include "attention/forward.cuh"

namespace vitkit::attention {

using DilatedForward = ForwardParams<DilatedMap<false>, NoTerm>;
using DilatedBackward = BackwardParams<DilatedMap<true>, NoTerm>;

// Tensors [B, N, H, D] of tokens, [B, rows, H, D] and [B, H, rows] of results.
struct MixParams {
  Rows parts, out;  // out: its gradient, backward
  float* lse;       // [B, H, N], of all branches
  float* part_lse;
  float* delta;           // backward
  const float* grad_lse;  // by strides; null: none
  int64_t grad_lse_batch, grad_lse_head, grad_lse_token;
  int64_t row_count;
  int batch, heads, tokens, head_dim;
  int count;
  DilatedBranch branches[kMaxBranches];
};

// A token of a head takes eight lanes, which share its row in chunks of 16 bytes.
constexpr int kRowLanes = 8, kRowsOfBlock = 128 / kRowLanes;

struct MixedRow {
  Span span;
  int token, lane;
  bool exists;

  __device__ __forceinline__ explicit MixedRow(const MixParams& p)
      : lane(int(threadIdx.x) % kRowLanes) {
    const int64_t all = int64_t(p.batch) * p.tokens * p.heads;
    const int64_t index = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / kRowLanes;
    exists = index < all;
    const int64_t at = exists ? index : all - 1, place = at / p.heads;
    token = int(place % p.tokens);
    span = {place / p.tokens, at % p.heads, 0, 0, 0, 0, 0};
  }

  __device__ __forceinline__ int64_t plane(const MixParams& p) const {
    return span.batch * p.heads + span.head;
  }
};

// out = sum_b exp(lse_b - lse) out_b with lse = log sum_b exp(lse_b), over the branches that keep
// the token.
template <typename T>
__global__ void __launch_bounds__(128) dilated_mix_kernel(const __grid_constant__ MixParams p) {
  constexpr int kChunk = kFullPack<T>;
  const MixedRow row(p);
  if (!row.exists) return;
  const float* const part_lse = p.part_lse + row.plane(p) * p.row_count;
  const T* const parts = p.parts.plane<const T>(row.span);
  T* const out = p.out.plane<T>(row.span) + row.token * p.out.token;
  for (int c = row.lane * kChunk; c < p.head_dim; c += kRowLanes * kChunk) {
    float peak = -INFINITY, total = 0.f, sum[kChunk] = {};
    for (int b = 0; b < p.count; ++b) {
      const int64_t at = p.branches[b].row_of(row.token, int(row.span.head));
      const float z = at < 0 ? -INFINITY : part_lse[at] * kLog2e;
      if (z == -INFINITY) continue;
      const float top = fmaxf(peak, z);
      const float keep = ptx::exp2_approx(peak - top), weight = ptx::exp2_approx(z - top);
      const auto part = Pack<T, kChunk>::load(parts + at * p.parts.token + c);
      peak = top;
      total = total * keep + weight;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum[i] = sum[i] * keep + weight * part.get(i);
    }
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    Pack<T, kChunk> mixed;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) mixed.set(i, sum[i] * inverse);
    mixed.store(out + c);
    if (c == 0)
      p.lse[row.plane(p) * p.tokens + row.token] =
          total == 0.f ? -INFINITY : peak * kLn2 + logf(total);
  }
}

// The statistics of every branch's results: delta = sum_d grad * out_b - grad_lse, for the weights
// of the branches are constants, and the lse of all branches.
template <typename T>
__global__ void __launch_bounds__(128) dilated_delta_kernel(const __grid_constant__ MixParams p) {
  constexpr int kChunk = kFullPack<T>;
  const MixedRow row(p);
  const int64_t statistics = row.plane(p) * p.row_count;
  const T* const parts = p.parts.plane<const T>(row.span);
  const T* const grad = p.out.plane<const T>(row.span) + row.token * p.out.token;
  const float lse = p.lse[row.plane(p) * p.tokens + row.token];
  const float grad_lse =
      p.grad_lse ? p.grad_lse[row.span.batch * p.grad_lse_batch + row.span.head * p.grad_lse_head +
                              row.token * p.grad_lse_token]
                 : 0.f;
  for (int b = 0; b < p.count; ++b) {
    const int64_t at = p.branches[b].row_of(row.token, int(row.span.head));
    float sum = 0.f;
    for (int c = row.lane * kChunk; at >= 0 && c < p.head_dim; c += kRowLanes * kChunk) {
      const auto x = Pack<T, kChunk>::load(parts + at * p.parts.token + c);
      const auto y = Pack<T, kChunk>::load(grad + c);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum += x.get(i) * y.get(i);
    }
#pragma unroll
    for (int lanes = kRowLanes / 2; lanes > 0; lanes /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (at < 0 || row.lane != 0 || !row.exists) continue;
    p.part_lse[statistics + at] = lse;
    p.delta[statistics + at] = sum - grad_lse;
  }
}

template <typename T>
const char* launch_mix(const MixParams& p, bool backward, Stream stream) {
  const int64_t rows = int64_t(p.batch) * p.tokens * p.heads;
  const int64_t blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  return launch_kernel(backward ? &dilated_delta_kernel<T> : &dilated_mix_kernel<T>,
                       unsigned(blocks), 128, 0, stream, p);
}

// The branches of a call, as `branches` in vitkit/ops/dilated_attention.py. There are tokens, heads
// and at most kMaxBranches branches.
struct DilatedLayout {
  int tokens, count;
  int64_t rows = 0;
  DilatedBranch branches[kMaxBranches];

  DilatedLayout(int tokens_in, int heads, int count_in, const int64_t* lengths,
                const int64_t* ratios, bool torchscale)
      : tokens(tokens_in), count(count_in) {
    for (int i = 0; i < count; ++i) {
      DilatedBranch& b = branches[i];
      // Beyond the tokens and the heads, a larger ratio changes nothing but may overflow.
      const int ratio = int(std::min<int64_t>(ratios[i], std::max(tokens, heads)));
      b.length = int(std::min<int64_t>(lengths[i], tokens));
      b.segments = (tokens - 1) / b.length + 1;
      b.slots = (b.length - 1) / ratio + 1;
      b.ratio = Divisor::of(ratio);
      b.pitch = Divisor::of(torchscale ? b.slots * ratio : b.length);
      b.heads_per_phase = Divisor::of((heads - 1) / ratio + 1);
      b.first_row = rows;
      const int last = std::min(b.segments, (tokens - 1) / b.pitch.value + 1) - 1;
      const int rest = tokens - last * b.pitch.value;
      rows += int64_t(last) * b.slots + std::min(b.slots, (rest - 1) / ratio + 1);
    }
  }

  // Whether one branch keeps every token of every head.
  bool has_dense() const { return std::any_of(branches, branches + count, is_dense); }
  static bool is_dense(const DilatedBranch& b) { return b.ratio.value == 1; }
};

// Results of all branches.
template <typename T, int kHeadDim>
const char* launch_dilated_forward(DilatedForward p, const DilatedLayout& layout, Stream stream) {
  p.map.count = layout.count;
  std::copy(layout.branches, layout.branches + layout.count, p.map.branches);
  // The longest first: what is left at the end is short.
  std::stable_sort(p.map.branches, p.map.branches + layout.count,
                   [](const auto& a, const auto& b) { return a.slots > b.slots; });
  return launch_forward<T, kHeadDim>(p, p.map.branches[0].slots, stream);
}

// The sums of dk and dv, or of dq, a branch after the other: a row has one writer at a time. A
// dense branch comes first and writes them; without one, they are zeros already.
template <typename T, int kHeadDim>
const char* launch_dilated_gradient(DilatedBackward p, const DilatedLayout& layout, bool keys,
                                    Stream stream) {
  DilatedBranch order[kMaxBranches];
  std::copy(layout.branches, layout.branches + layout.count, order);
  std::stable_partition(order, order + layout.count, DilatedLayout::is_dense);
  p.map.count = 1;
  p.map.adds = !layout.has_dense();
  for (int i = 0; i < layout.count; ++i, p.map.adds = true) {
    p.map.branches[0] = order[i];
    const char* error = keys ? launch_dkv<T, kHeadDim>(p, order[i].slots, stream)
                             : launch_dq<T, kHeadDim>(p, order[i].slots, stream);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace vitkit::attention
