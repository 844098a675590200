// Attention forward on Hopper, without a score term: 128 queries a block, which two warpgroups of
// 64 multiply (wgmma) while one thread of a third has the copy engine (TMA) fill a ring of keys and
// one of values. The scores of a step are multiplied while the weights of the step before are.
#pragma once

#include "forward.cuh"
#include "hopper.cuh"

namespace vitkit::attention {

struct HopperTile {
  int head_dim;  // up to this one
  int panel;     // columns of a row of shared memory, which is what a box has
  int stages;
  const char* reason;
};

// 128 keys a step: 64 registers of scores and 32 of weights beside up to 64 of outputs, of the 240
// that a thread has once the producers gave theirs away. One block fills a multiprocessor, whose
// 227 KB hold the queries and, of each stage, keys and values.
constexpr HopperTile kHopperTiles[] = {
    {64, 64, 3, "one panel; 113 KB"},
    {80, 16, 3, "panels that divide 80 (72: with 8 columns of zeros, not 24); 141 KB"},
    {96, 32, 3, "panels that divide 96; 169 KB"},
    {128, 64, 2, "two panels; 161 KB, and 225 with three stages"},
};
constexpr int kHopperKeys = 128, kHopperConsumers = 2;

constexpr HopperTile hopper_tile(int head_dim) {
  for (const HopperTile& row : kHopperTiles)
    if (head_dim <= row.head_dim) return row;
  return {};
}

struct HopperForwardParams : ForwardTensors {
  SequenceMap map;
  TensorMap q_boxes, k_boxes, v_boxes;
};

// Shared memory of a block, by addresses: queries of each warpgroup, stages of keys and of values,
// each in panels; barriers.
template <int kHeadDim>
struct HopperMemory {
  static constexpr HopperTile kTile = hopper_tile(kHeadDim);
  static constexpr int kPanels = kHeadDim / kTile.panel, kRowBytes = kTile.panel * 2;
  static constexpr int kQueryPanel = 64 * kRowBytes, kQueryBytes = kPanels * kQueryPanel;
  static constexpr int kKeyPanel = kHopperKeys * kRowBytes, kKeyBytes = kPanels * kKeyPanel;
  static constexpr int kBarriers = 1 + 4 * kTile.stages;
  static constexpr int kBytes =
      kHopperConsumers * kQueryBytes + 2 * kTile.stages * kKeyBytes + 8 * kBarriers;
  static_assert(kHeadDim % kTile.panel == 0 && kQueryPanel % 1024 == 0 && kKeyPanel % 1024 == 0);

  uint32_t base;  // a multiple of 1 KiB

  __device__ __forceinline__ uint32_t queries(int consumer) const {
    return base + consumer * kQueryBytes;
  }
  __device__ __forceinline__ uint32_t keys(int stage) const {
    return base + kHopperConsumers * kQueryBytes + 2 * stage * kKeyBytes;
  }
  __device__ __forceinline__ uint32_t values(int stage) const { return keys(stage) + kKeyBytes; }

  __device__ __forceinline__ uint32_t queries_full() const { return keys(kTile.stages); }
  // Barriers of keys (0) and values (1): the copy arrived; all warps have read it.
  __device__ __forceinline__ uint32_t full(int stage, int which) const {
    return queries_full() + 8 * (1 + 4 * stage + which);
  }
  __device__ __forceinline__ uint32_t empty(int stage, int which) const {
    return full(stage, which) + 16;
  }
};

// Fills the memory, a step ahead of who reads it by as many stages as there are. One thread.
template <int kHeadDim>
__device__ __forceinline__ void produce(const HopperForwardParams& p,
                                        const HopperMemory<kHeadDim>& memory, const Span& span,
                                        int consumers, int steps) {
  using Memory = HopperMemory<kHeadDim>;
  constexpr int kStages = Memory::kTile.stages, kPanel = Memory::kTile.panel;
  const int head = int(span.head), batch = int(span.batch);
  ptx::phase_arrive_expecting(memory.queries_full(), consumers * Memory::kQueryBytes);
  for (int c = 0; c < consumers; ++c)
#pragma unroll
    for (int i = 0; i < Memory::kPanels; ++i)
      ptx::copy_box(memory.queries(c) + i * Memory::kQueryPanel, p.q_boxes, memory.queries_full(),
                    i * kPanel, span.first + c * 64, head, batch);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, round = step / kStages;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const uint32_t full = memory.full(stage, which);
      const uint32_t to = which ? memory.values(stage) : memory.keys(stage);
      ptx::phase_wait(memory.empty(stage, which), round % 2 ^ 1);
      ptx::phase_arrive_expecting(full, Memory::kKeyBytes);
#pragma unroll
      for (int i = 0; i < Memory::kPanels; ++i)
        ptx::copy_box(to + i * Memory::kKeyPanel, which ? p.v_boxes : p.k_boxes, full, i * kPanel,
                      step * kHopperKeys, head, batch);
    }
  }
}

// What one warpgroup does.
template <typename T, int kHeadDim>
struct HopperConsumer {
  using Memory = HopperMemory<kHeadDim>;
  static constexpr int kStages = Memory::kTile.stages, kRowBytes = Memory::kRowBytes;
  static constexpr int kTiles = kHopperKeys / 8, kOut = kHeadDim / 8;

  const HopperForwardParams& p;
  const Memory memory;
  const Span span;
  const int consumer, first_row, n_k;
  float s[1][kTiles][4];
  float out[1][kOut][4] = {};
  uint32_t weights[kTiles / 2][4];
  OnlineSoftmax<1> softmax;

  // Begins s = q k^T.
  __device__ __forceinline__ void begin_scores(int step) {
    const uint32_t q = memory.queries(consumer), k = memory.keys(step % kStages);
    ptx::phase_wait(memory.full(step % kStages, 0), step / kStages % 2);
    ptx::product_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const int panel = i * 32 / kRowBytes, at = i * 32 % kRowBytes;
      ptx::product_of_rows<T>(s[0], matrix_at<kRowBytes>(q + panel * Memory::kQueryPanel + at, 0),
                              matrix_at<kRowBytes>(k + panel * Memory::kKeyPanel + at, 0), i > 0);
    }
    ptx::product_commit();
  }

  // Begins out += weights v.
  __device__ __forceinline__ void begin_outputs(int step) {
    const uint32_t v = memory.values(step % kStages);
    ptx::phase_wait(memory.full(step % kStages, 1), step / kStages % 2);
    ptx::product_fence();
#pragma unroll
    for (int i = 0; i < kHopperKeys / 16; ++i)
      ptx::product_of_columns<T>(out[0], weights[i],
                                 matrix_at<kRowBytes>(v + i * 16 * kRowBytes, Memory::kKeyPanel));
    ptx::product_commit();
  }

  // A warp has read the keys (0) or values (1) of a step: its products were waited for.
  __device__ __forceinline__ void release(int step, int which) {
    if (lane_id() == 0) ptx::phase_arrive(memory.empty(step % kStages, which));
  }

  __device__ __forceinline__ void mask(int step) {
    const int first = step * kHopperKeys;
    const int row = first_row + int(threadIdx.x) % kWarpgroup / kWarp * 16 + lane_id() / 4;
    if (first + kHopperKeys <= n_k && !(p.causal && first + kHopperKeys - 1 > first_row)) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + n * 8 + lane_id() % 4 * 2 + i % 2;
        if (n_k <= key || (p.causal && row + i / 2 * 8 < key)) s[0][n][i] = -INFINITY;
      }
  }

  // The scores of a step to weights, and what was accumulated before is to be multiplied by `keep`.
  __device__ __forceinline__ void weigh(int step, bool fold, float (&keep)[2]) {
    if (!fold) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[0][n][i] *= p.scale;
    }
    mask(step);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      keep[half] = softmax.weigh(s[0], 0, half, fold ? p.scale : 1.f);
  }

  // Weights become an operand, in the registers of their own.
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      const auto a = Mma<T>::from_accumulators(&s[0][2 * i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) weights[i][j] = a.r[j];
    }
  }

  // `steps` of the block; this warpgroup attends the keys of the first `mine`.
  __device__ __forceinline__ void run(int steps, int mine, bool fold) {
    float keep[2];
    if (mine > 0) {
      ptx::phase_wait(memory.queries_full(), 0);
      begin_scores(0);
      ptx::product_wait<0>();
      ptx::product_done(s[0]);
      release(0, 0);
      weigh(0, fold, keep);
      pack_weights();
    }
    for (int step = 1; step < mine; ++step) {
      begin_scores(step);
      begin_outputs(step - 1);
      ptx::product_wait<1>();
      ptx::product_done(s[0]);
      release(step, 0);
      weigh(step, fold, keep);
      ptx::product_wait<0>();
      ptx::product_done(out[0]);
      release(step - 1, 1);
#pragma unroll
      for (int half = 0; half < 2; ++half) softmax.rescale(out[0], half, keep[half]);
      pack_weights();
    }
    if (mine > 0) {
      begin_outputs(mine - 1);
      ptx::product_wait<0>();
      ptx::product_done(out[0]);
      release(mine - 1, 1);
    }
    for (int step = mine; step < steps; ++step)
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        ptx::phase_wait(memory.full(step % kStages, which), step / kStages % 2);
        release(step, which);
      }
  }

  // By way of the memory of the queries, which every warp has read then.
  __device__ __forceinline__ void store(unsigned char* queries, bool fold) {
    const int warp_row = int(threadIdx.x) % kWarpgroup / kWarp * 16;
    const int row = first_row + warp_row + lane_id() / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float lse = softmax.finish(out, 0, half, fold ? p.scale : 1.f);
      if (row + half * 8 < span.n_q && lane_id() % 4 == 0)
        p.lse[span.batch * p.lse_batch + span.head * p.lse_head + row + half * 8] = lse;
    }
    ptx::warpgroup_barrier(1 + consumer);
    store_rows(out, SharedTile<T, kHeadDim>{queries}, warp_row, p.out.template plane<T>(span),
               p.out.token, first_row + warp_row, span.n_q, 0, p.head_dim,
               [](int i) { return int64_t(i); });
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__((1 + kHopperConsumers) * kWarpgroup, 1)
    attention_fwd_hopper_kernel(const __grid_constant__ HopperForwardParams p) {
#ifdef VITKIT_HOPPER
  using Memory = HopperMemory<kHeadDim>;
  VITKIT_DYNAMIC_SHARED(shared);
  const uint32_t at = ptx::shared_address(shared), base = (at + 1023) / 1024 * 1024;
  const Memory memory{base};
  const Span span = p.map.span(blockIdx.x, kHopperConsumers * 64, false);
  const int consumers = min(kHopperConsumers, (span.n_q - span.first + 63) / 64);
  const int n_k = p.causal ? min(span.n_k, span.first + consumers * 64) : span.n_k;
  const int steps = (n_k + kHopperKeys - 1) / kHopperKeys;
  if (threadIdx.x == 0) {
    ptx::phase_init(memory.queries_full(), 1);
    for (int stage = 0; stage < Memory::kTile.stages; ++stage)
      for (int which = 0; which < 2; ++which) {
        ptx::phase_init(memory.full(stage, which), 1);
        ptx::phase_init(memory.empty(stage, which), consumers * 4);
      }
    ptx::phase_init_done();
  }
  __syncthreads();
  const int warpgroup = int(threadIdx.x) / kWarpgroup;
  if (warpgroup == 0) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0) produce<kHeadDim>(p, memory, span, consumers, steps);
  } else {
    ptx::take_registers<240>();
    const int consumer = warpgroup - 1;
    if (consumer >= consumers) return;
    const int first_row = span.first + consumer * 64;
    const int mine_k = p.causal ? min(n_k, first_row + 64) : n_k;
    const bool fold = p.scale > 0.f;
    HopperConsumer<T, kHeadDim> c{p, memory, span, consumer, first_row, span.n_k};
    c.run(steps, (mine_k + kHopperKeys - 1) / kHopperKeys, fold);
    c.store(shared + (memory.queries(consumer) - at), fold);
  }
#else
  __trap();
#endif
}

// Of 16 bits, dense. Null, or the error.
template <typename T, int kHeadDim>
const char* launch_hopper_forward(const ForwardTensors& t, const SequenceMap& map, Stream stream) {
  using Memory = HopperMemory<kHeadDim>;
  HopperForwardParams p{t, map, {}, {}, {}};
  const auto boxes = [&](TensorMap& to, const Rows& rows, int n, int box_rows) {
    const BoxedTensor tensor{rows.data,  t.head_dim, n,          map.heads,           map.batch,
                             rows.token, rows.head,  rows.batch, Memory::kTile.panel, box_rows};
    return encode(to, tensor);
  };
  const char* error = boxes(p.q_boxes, t.q, map.n_q, 64);
  if (!error) error = boxes(p.k_boxes, t.k, map.n_k, kHopperKeys);
  if (!error) error = boxes(p.v_boxes, t.v, map.n_k, kHopperKeys);
  if (error) return error;
  const int64_t blocks = map.blocks(kHopperConsumers * 64, false);
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  return launch_kernel(&attention_fwd_hopper_kernel<T, kHeadDim>, unsigned(blocks),
                       (1 + kHopperConsumers) * kWarpgroup, Memory::kBytes + 1024, stream, p);
}

}  // namespace vitkit::attention
