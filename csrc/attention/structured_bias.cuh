// Score terms that exist only in compact form, and where their gradients go: the decomposed
// relative positions of Segment Anything and the distances of 2-D ALiBi.
//
// The kernel of dq meets all keys of a query in one block, in one order: it sums the gradients on
// its way, in float32, and nothing is computed twice. Which of the two terms it is, is the same for
// all threads of a launch and not worth a second set of kernels.
#pragma once

#include "divisor.h"
#include "mma.cuh"
#include "score_term.cuh"

namespace vitkit::attention {

// rel_h[ih] + rel_w[iw] for key ih * width + iw.
struct DecomposedTerm {
  const void *rel_h, *rel_w;  // [B, H, Nq, Kh or Kw] by strides in elements, rows dense
  Element element;            // f32, bf16 or f16
  int64_t h_batch, h_head, h_query;
  int64_t w_batch, w_head, w_query;
  int height;
  Divisor width;

  template <bool kTransposed, int kTiles>
  __device__ __forceinline__ void add(float (&s)[kTiles][4], const Span& span, int row,
                                      int column) const {
    const int64_t h = span.batch * h_batch + span.head * h_head;
    const int64_t w = span.batch * w_batch + span.head * w_head;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i / 2 * 8, c = column + n * 8 + i % 2;
        // Beyond the end, what is added does not matter.
        const int query = min(kTransposed ? c : r, span.n_q - 1);
        const int key = min(kTransposed ? r : c, span.n_k - 1);
        const int ih = width.divide(key), iw = key - ih * width.value;
        s[n][i] += (load(rel_h, h + query * h_query + ih) + load(rel_w, w + query * w_query + iw)) *
                   kLog2e;
      }
  }

 private:
  // (The type is asked for here: code for three of them, unrolled, would be most of a kernel.)
  __device__ __forceinline__ float load(const void* data, int64_t at) const {
    if (element == Element::f32) return static_cast<const float*>(data)[at];
    if (element == Element::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    return to_float(static_cast<const __half*>(data)[at]);
  }
};

// -slope * |q_i - k_j|; NaN coordinates (a token without a place) give 0.
struct DistanceTerm {
  const float* slopes;       // [H]
  const float *q, *k;        // [B or 1, N, 2], dense but for the batch
  int64_t q_batch, k_batch;  // strides

  __device__ __forceinline__ float distance(const Span& span, int query, int key) const {
    const auto from =
        Pack<float, 2>::load(q + span.batch * q_batch + int64_t(min(query, span.n_q - 1)) * 2);
    const auto to =
        Pack<float, 2>::load(k + span.batch * k_batch + int64_t(min(key, span.n_k - 1)) * 2);
    const float dx = to.element[0] - from.element[0], dy = to.element[1] - from.element[1];
    // fmaxf drops NaN. A square root by the hardware's inverse one: 0 becomes 1e-15.
    const float squared = fminf(fmaxf(dx * dx + dy * dy, 1e-30f), 1e38f);
    return squared * rsqrtf(squared);
  }

  template <bool kTransposed, int kTiles>
  __device__ __forceinline__ void add(float (&s)[kTiles][4], const Span& span, int row,
                                      int column) const {
    const float factor = slopes[span.head] * -kLog2e;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i / 2 * 8, c = column + n * 8 + i % 2;
        s[n][i] += distance(span, kTransposed ? c : r, kTransposed ? r : c) * factor;
      }
  }
};

class StructuredSink;

struct StructuredTerm {
  static constexpr bool kActive = true, kCosine = false;
  using Sink = StructuredSink;

  bool is_distance;  // or else decomposed
  DecomposedTerm decomposed;
  DistanceTerm distance;
  // Gradients, null: none.
  void *drel_h, *drel_w;  // dense, as rel_h
  float* sums;     // [blocks, queries of a block, height + width]; null: they fit shared memory
  float* dslopes;  // [batches * tiles * warps of a block, heads]
  int heads;

  template <bool kTransposed, int kTiles>
  __device__ __forceinline__ void add(float (&s)[kTiles][4], const Span& span, int row,
                                      int column) const {
    // (Not else: where two branches meet, ptxas wants 15 registers more, and on sm_80 spills.)
    if (is_distance) distance.add<kTransposed>(s, span, row, column);
    if (!is_distance) decomposed.add<kTransposed>(s, span, row, column);
  }

  __host__ __device__ int grid_lines() const { return decomposed.height + decomposed.width.value; }
};

// Sums ds over the rows and over the columns of the grid of keys, or weighted by distance.
class StructuredSink {
 public:
  // `memory`: of the block; `block` counts the tiles of queries; `active`: this block is the one of
  // its tile that writes.
  __device__ __forceinline__ StructuredSink(const StructuredTerm& term, const Span& span,
                                            unsigned char* memory, int64_t block, bool active)
      : term_(term),
        decomposed_(active && term.drel_h != nullptr),
        distance_(active && term.dslopes != nullptr) {
    if (!decomposed_) return;
    const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
    const int lines = term.grid_lines();
    auto* const shared = reinterpret_cast<float*>(memory);
    sums_ =
        term.sums ? term.sums + (block * warps + warp) * 16 * lines : shared + warp * 16 * lines;
    stage_ = shared + (term.sums ? 0 : warps * 16 * lines);
    // The barrier of the first step stands between this and add().
    for (int i = lane_id(); i < 16 * lines; i += kWarp) sums_[i] = 0.f;
  }

  // Queries from `row` on and keys from `column` on are those of the lane's first element.
  template <int kTiles>
  __device__ __forceinline__ void add(const float (&ds)[kTiles][4], const Span& span, int row,
                                      int column) {
    if (distance_) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          slope_ -=
              ds[n][i] * term_.distance.distance(span, row + i / 2 * 8, column + n * 8 + i % 2);
    }
    if (decomposed_) add_to_grid(ds, span, column - lane_id() % 4 * 2);
  }

  // Behind a barrier of the block that follows the last add().
  __device__ __forceinline__ void finish(const Span& span) {
    const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
    if (distance_) {
      const float total = warp_sum(slope_);
      const int tiles = (span.n_q + warps * 16 - 1) / (warps * 16);
      const int64_t copy = (span.batch * tiles + span.first / (warps * 16)) * warps + warp;
      if (lane_id() == 0) term_.dslopes[copy * term_.heads + span.head] = total;
    }
    if (!decomposed_) return;
    const int lines = term_.grid_lines(), height = term_.decomposed.height;
    for (int r = 0; r < 16; ++r) {
      const int query = span.first + warp * 16 + r;
      if (query >= span.n_q) return;
      const int64_t line = (span.batch * term_.heads + span.head) * span.n_q + query;
      for (int i = lane_id(); i < lines; i += kWarp) {
        const float value = sums_[r * lines + i];
        if (i < height) {
          store(term_.drel_h, line * height + i, value);
        } else {
          store(term_.drel_w, line * (lines - height) + i - height, value);
        }
      }
    }
  }

  static int shared_bytes(const StructuredTerm& term, int warps, int keys) {
    if (term.drel_h == nullptr) return 0;
    return shared_floats(term.sums ? 0 : term.grid_lines(), warps, keys) * int(sizeof(float));
  }
  // Of sums over `lines` rows and columns, and of what is staged of ds.
  static int shared_floats(int lines, int warps, int keys) {
    return warps * 16 * (lines + keys + 1);
  }

 private:
  // Lanes hold what belongs together apart: by way of shared memory, a warp's 16 rows of keys from
  // `first` on become a row a lane for the sums over columns, and a key a lane for those over rows.
  template <int kTiles>
  __device__ __forceinline__ void add_to_grid(const float (&ds)[kTiles][4], const Span& span,
                                              int first) {
    constexpr int kKeys = kTiles * 8, kStride = kKeys + 1;
    const int lane = lane_id(), lines = term_.grid_lines(), height = term_.decomposed.height;
    const Divisor width = term_.decomposed.width;
    float* const stage = stage_ + int(threadIdx.x) / kWarp * 16 * kStride;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        stage[(lane / 4 + i / 2 * 8) * kStride + n * 8 + lane % 4 * 2 + i % 2] = ds[n][i];
    __syncwarp();
    const int keys = min(kKeys, span.n_k - first);
    if (lane < 16) {
      float* const to = sums_ + lane * lines;
      int ih = width.divide(first), end = (ih + 1) * width.value - first;
      float run = 0.f;
      for (int key = 0; key < keys; ++key) {
        if (key == end) {
          to[ih++] += run;
          run = 0.f;
          end += width.value;
        }
        run += stage[lane * kStride + key];
      }
      to[ih] += run;
    }
    // Keys of one column of the grid are `width` apart: as many at a time share none.
    const int round = width.divide(lane);
#pragma unroll
    for (int base = 0; base < kKeys; base += kWarp) {
      const int key = base + lane, at = first + key;
      float* const to = sums_ + height + at - width.divide(at) * width.value;
      for (int r = 0; r * width.value < kWarp; ++r) {
        if (r == round && key < keys) {
          float sum[16];
#pragma unroll
          for (int i = 0; i < 16; ++i) sum[i] = to[i * lines] + stage[i * kStride + key];
#pragma unroll
          for (int i = 0; i < 16; ++i) to[i * lines] = sum[i];
        }
        __syncwarp();
      }
    }
  }

  __device__ __forceinline__ void store(void* to, int64_t at, float value) const {
    if (term_.decomposed.element == Element::f32) {
      static_cast<float*>(to)[at] = value;
    } else if (term_.decomposed.element == Element::bf16) {
      from_float(value, static_cast<__nv_bfloat16*>(to) + at);
    } else {
      from_float(value, static_cast<__half*>(to) + at);
    }
  }

  const StructuredTerm& term_;
  bool decomposed_, distance_;
  float* sums_ = nullptr;   // of this warp's queries
  float* stage_ = nullptr;  // of the block
  float slope_ = 0.f;
};

}  // namespace vitkit::attention
