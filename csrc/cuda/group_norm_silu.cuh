// Device code of group_norm_silu. No torch header: the emulator compiles this very file.
//
// [N, C, positions] tensors whose groups fit a block are done by one kernel that reads x once.
// Everything else goes in parts: statistics of every channel in every part of the positions, a
// merge per group in a fixed order, and an elementwise pass. No atomics anywhere.
#pragma once

#include "element.cuh"
#include "reduce.cuh"

namespace vitkit::group_norm {

constexpr int kThreads = 256;

// [N, C] or [C] (stride_n 0), any floating dtype, any strides; data null where absent.
struct SmallTensor {
  const void* data;
  Element element;
  int64_t stride_n, stride_c;

  __device__ __forceinline__ float at(int64_t n, int64_t c, float otherwise) const {
    if (data == nullptr) return otherwise;
    const int64_t i = n * stride_n + c * stride_c;
    if (element == Element::f32) return static_cast<const float*>(data)[i];
    if (element == Element::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    return to_float(static_cast<const __half*>(data)[i]);
  }
};

struct Params {
  const void* x;
  const void* grad;  // backward only
  void* y;           // the output, or dx
  SmallTensor weight, bias, add, scale, shift;
  float* mean;        // [N, groups]
  float* rstd;        // [N, groups]
  float* partial;     // [N, parts, C, 2] forward, [N, parts, C, 3] backward
  float* sums;        // backward: [N, C, 3], sums of dz, dz * xhat and xhat
  float* group_sums;  // backward: [N, groups, 2], sums of gain * dz and gain * dz * xhat
  int64_t samples, channels, positions, groups, parts;  // channels fit 32 bits
  float eps;

  // In 32 bits: a division of 64 is a call of a hundred instructions.
  __host__ __device__ __forceinline__ unsigned per_group() const {
    return unsigned(channels) / unsigned(groups);
  }
  __device__ __forceinline__ int64_t group_of(int64_t n, int64_t c) const {
    return n * groups + unsigned(c) / per_group();
  }
  __device__ __forceinline__ float gain(int64_t n, int64_t c) const {
    return weight.at(n, c, 1.f) * (1.f + scale.at(n, c, 0.f));
  }
  __device__ __forceinline__ float offset(int64_t n, int64_t c) const {
    return bias.at(n, c, 0.f) * (1.f + scale.at(n, c, 0.f)) + shift.at(n, c, 0.f);
  }
};

// What a kernel needs of one channel: z = x * factor + term, xhat = x * rstd + centre.
struct Channel {
  float factor, term, rstd, centre;

  Channel() = default;
  __device__ __forceinline__ Channel(const Params& p, int64_t n, int64_t c) {
    const int64_t group = p.group_of(n, c);
    set(p, n, c, p.mean[group], p.rstd[group]);
  }
  __device__ __forceinline__ Channel(const Params& p, int64_t n, int64_t c, float mean,
                                     float rstd) {
    set(p, n, c, mean, rstd);
  }
  __device__ __forceinline__ void set(const Params& p, int64_t n, int64_t c, float mean, float r) {
    rstd = r;
    centre = (p.add.at(n, c, 0.f) - mean) * r;
    factor = r * p.gain(n, c);
    term = p.gain(n, c) * centre + p.offset(n, c);
  }
};

template <bool kSilu>
__device__ __forceinline__ float activate(float z) {
  return kSilu ? z / (1.f + __expf(-z)) : z;
}

template <bool kSilu>
__device__ __forceinline__ float slope(float z) {
  if (!kSilu) return 1.f;
  const float s = 1.f / (1.f + __expf(-z));
  return s * (1.f + z * (1.f - s));
}

__device__ __forceinline__ int64_t part_begin(const Params& p, int64_t part) {
  return p.positions * part / p.parts;
}

// ---- [N, C, positions], a group per block ----

// Of less than 2^31 elements. Keeps the group in shared memory (as T) between its three readings
// where `cached`, else rereads it.
template <typename T, bool kSilu, int kPack>
__global__ void __launch_bounds__(kThreads) group_norm_silu_fwd_kernel(Params p, bool cached) {
  VITKIT_DYNAMIC_SHARED(shared_bytes);
  T* const kept = reinterpret_cast<T*>(shared_bytes);
  const int64_t group = blockIdx.x, n = group / p.groups;
  const int64_t first = group % p.groups * p.per_group();
  const int64_t start = (n * p.channels + first) * p.positions;
  const unsigned positions = unsigned(p.positions), size = p.per_group() * positions;
  const T* const x = static_cast<const T*>(p.x) + start;
  T* const y = static_cast<T*>(p.y) + start;
  using P = Pack<T, kPack>;

  float sum = 0.f;
  for (unsigned i = threadIdx.x * kPack; i < size; i += kThreads * kPack) {
    const P v = P::load(x + i);
    if (cached) v.store(kept + i);
    const float add = p.add.at(n, first + i / positions, 0.f);
#pragma unroll
    for (int k = 0; k < kPack; ++k) sum += v.get(k) + add;
  }
  const float mean = block_sum<kThreads>(sum) / float(size);

  float squares = 0.f;
  const T* const source = cached ? kept : x;
  for (unsigned i = threadIdx.x * kPack; i < size; i += kThreads * kPack) {
    const P v = P::load(source + i);
    const float shift = p.add.at(n, first + i / positions, 0.f) - mean;
#pragma unroll
    for (int k = 0; k < kPack; ++k) squares += (v.get(k) + shift) * (v.get(k) + shift);
  }
  const float rstd = rsqrtf(block_sum<kThreads>(squares) / float(size) + p.eps);
  if (threadIdx.x == 0) {
    p.mean[group] = mean;
    p.rstd[group] = rstd;
  }

  for (unsigned i = threadIdx.x * kPack; i < size; i += kThreads * kPack) {
    P v = P::load(source + i);
    const Channel channel(p, n, first + i / positions, mean, rstd);
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      v.set(k, activate<kSilu>(v.get(k) * channel.factor + channel.term));
    v.store(y + i);
  }
}

// ---- statistics of every channel in every part ----

template <typename T, int kPack>
__device__ __forceinline__ void add_pack(Moments& m, const Pack<T, kPack>& v) {
  Moments of_pack;
#pragma unroll
  for (int k = 0; k < kPack; ++k) of_pack.mean += v.get(k);
  of_pack.mean /= float(kPack);
  of_pack.count = float(kPack);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const float d = v.get(k) - of_pack.mean;
    of_pack.m2 += d * d;
  }
  m.merge(of_pack);
}

__device__ __forceinline__ void store_moments(const Params& p, int64_t n, int64_t part, int64_t c,
                                              const Moments& m) {
  float* out = p.partial + ((n * p.parts + part) * p.channels + c) * 2;
  out[0] = m.mean;
  out[1] = m.m2;
}

// One block: a part of one channel's row. Rows start aligned, parts begin at multiples of kPack.
template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) row_statistics_kernel(Params p) {
  const int64_t part = blockIdx.y, row = blockIdx.x;
  const int64_t begin = part_begin(p, part) / kPack * kPack;
  const int64_t end = part + 1 == p.parts ? p.positions : part_begin(p, part + 1) / kPack * kPack;
  const T* const x = static_cast<const T*>(p.x) + row * p.positions;
  Moments m;
  for (int64_t i = begin + int64_t(threadIdx.x) * kPack; i < end; i += kThreads * kPack)
    add_pack(m, Pack<T, kPack>::load(x + i));
  m = block_moments<kThreads>(m);
  if (threadIdx.x == 0) store_moments(p, row / p.channels, part, row % p.channels, m);
}

// Channels last. One block: kWarp packs of channels of one part; warps take turns over its
// positions.
template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) column_statistics_kernel(Params p) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Moments of_warp[kWarps][kWarp][kPack];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t n = blockIdx.z, part = blockIdx.y, c = (int64_t(blockIdx.x) * kWarp + lane) * kPack;
  Moments m[kPack];
  if (c < p.channels) {
    const T* const x = static_cast<const T*>(p.x) + n * p.positions * p.channels + c;
    const int64_t end = part_begin(p, part + 1);
    for (int64_t i = part_begin(p, part) + warp; i < end; i += kWarps) {
      const auto v = Pack<T, kPack>::load(x + i * p.channels);
#pragma unroll
      for (int k = 0; k < kPack; ++k) m[k].merge({1.f, v.get(k), 0.f});
    }
  }
#pragma unroll
  for (int k = 0; k < kPack; ++k) of_warp[warp][lane][k] = m[k];
  __syncthreads();
  if (warp == 0 && c < p.channels) {
    for (int k = 0; k < kPack; ++k) {
      Moments total = of_warp[0][lane][k];
      for (int w = 1; w < kWarps; ++w) total.merge(of_warp[w][lane][k]);
      store_moments(p, n, part, c + k, total);
    }
  }
}

// One block: a group. Parts of a channel, then channels, each thread a fixed share.
// `rows_pack`: what row_statistics_kernel rounded its parts to, 1 for columns.
static __global__ void __launch_bounds__(kThreads)
    merge_statistics_kernel(Params p, int rows_pack) {
  const int64_t group = blockIdx.x, n = group / p.groups, first = group % p.groups * p.per_group();
  Moments m;
  for (int64_t i = threadIdx.x; i < p.per_group() * p.parts; i += kThreads) {
    const int64_t c = first + i % p.per_group(), part = i / p.per_group();
    const int64_t begin = part_begin(p, part) / rows_pack * rows_pack;
    const int64_t end =
        part + 1 == p.parts ? p.positions : part_begin(p, part + 1) / rows_pack * rows_pack;
    const float* in = p.partial + ((n * p.parts + part) * p.channels + c) * 2;
    m.merge({float(end - begin), in[0] + p.add.at(n, c, 0.f), in[1]});
  }
  m = block_moments<kThreads>(m);
  if (threadIdx.x == 0) {
    p.mean[group] = m.mean;
    p.rstd[group] = rsqrtf(m.m2 / m.count + p.eps);
  }
}

// ---- elementwise passes ----

// A thread's elements begin, begin + step, ... below end, of one part of the positions. Rows: a
// block has a part of one channel's row. Columns: kWarp packs of channels, warps take positions in
// turns. Either way a thread's channels, from c on, stay the same.
template <int kPack, bool kColumns>
struct Share {
  int64_t n, c, begin, end, step;

  __device__ __forceinline__ explicit Share(const Params& p) {
    const int64_t part = blockIdx.y;
    if constexpr (kColumns) {
      n = blockIdx.z;
      c = (int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp) * kPack;
      const int64_t start = n * p.positions * p.channels + c;
      begin = start + (part_begin(p, part) + threadIdx.x / kWarp) * p.channels;
      end = c < p.channels ? start + part_begin(p, part + 1) * p.channels : begin;
      step = kThreads / kWarp * p.channels;
    } else {
      n = blockIdx.x / unsigned(p.channels);
      c = blockIdx.x % unsigned(p.channels);
      const int64_t start = int64_t(blockIdx.x) * p.positions;
      begin = start + part_begin(p, part) / kPack * kPack + int64_t(threadIdx.x) * kPack;
      end = start + (part + 1 == p.parts ? p.positions : part_begin(p, part + 1) / kPack * kPack);
      step = kThreads * kPack;
    }
  }
};

template <typename T, bool kSilu, int kPack, bool kColumns>
__global__ void __launch_bounds__(kThreads) apply_fwd_kernel(Params p) {
  using P = Pack<T, kPack>;
  constexpr int kChannels = kColumns ? kPack : 1;
  const Share<kPack, kColumns> at(p);
  if (at.begin >= at.end) return;
  float factor[kChannels], term[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const Channel channel(p, at.n, at.c + k);
    factor[k] = channel.factor;
    term[k] = channel.term;
  }
  for (int64_t i = at.begin; i < at.end; i += at.step) {
    P v = P::load(static_cast<const T*>(p.x) + i);
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      v.set(k, activate<kSilu>(v.get(k) * factor[k % kChannels] + term[k % kChannels]));
    v.store(static_cast<T*>(p.y) + i);
  }
}

// ---- backward ----

struct Sums {
  float dz = 0.f, dz_xhat = 0.f, xhat = 0.f;

  template <bool kSilu>
  __device__ __forceinline__ void add(const Channel& channel, float x, float grad) {
    const float h = x * channel.rstd + channel.centre;
    const float d = grad * slope<kSilu>(x * channel.factor + channel.term);
    dz += d;
    dz_xhat += d * h;
    xhat += h;
  }
};

__device__ __forceinline__ void store_sums(float* out, const Sums& s) {
  out[0] = s.dz;
  out[1] = s.dz_xhat;
  out[2] = s.xhat;
}

// One block: a part of one channel's row.
template <typename T, bool kSilu, int kPack>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(Params p) {
  using P = Pack<T, kPack>;
  const int64_t part = blockIdx.y, row = blockIdx.x, n = row / p.channels, c = row % p.channels;
  const int64_t begin = part_begin(p, part) / kPack * kPack;
  const int64_t end = part + 1 == p.parts ? p.positions : part_begin(p, part + 1) / kPack * kPack;
  const T* const x = static_cast<const T*>(p.x) + row * p.positions;
  const T* const grad = static_cast<const T*>(p.grad) + row * p.positions;
  const Channel channel(p, n, c);
  Sums s;
  for (int64_t i = begin + int64_t(threadIdx.x) * kPack; i < end; i += kThreads * kPack) {
    const P v = P::load(x + i), g = P::load(grad + i);
#pragma unroll
    for (int k = 0; k < kPack; ++k) s.add<kSilu>(channel, v.get(k), g.get(k));
  }
  s.dz = block_sum<kThreads>(s.dz);
  s.dz_xhat = block_sum<kThreads>(s.dz_xhat);
  s.xhat = block_sum<kThreads>(s.xhat);
  if (threadIdx.x == 0) store_sums(p.partial + ((n * p.parts + part) * p.channels + c) * 3, s);
}

template <typename T, bool kSilu, int kPack>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(Params p) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Sums of_warp[kWarps][kWarp][kPack];
  using P = Pack<T, kPack>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t n = blockIdx.z, part = blockIdx.y, c = (int64_t(blockIdx.x) * kWarp + lane) * kPack;
  Sums s[kPack];
  if (c < p.channels) {
    const int64_t start = n * p.positions * p.channels + c;
    const T* const x = static_cast<const T*>(p.x) + start;
    const T* const grad = static_cast<const T*>(p.grad) + start;
    Channel channel[kPack];
#pragma unroll
    for (int k = 0; k < kPack; ++k) channel[k] = Channel(p, n, c + k);
    const int64_t end = part_begin(p, part + 1);
    for (int64_t i = part_begin(p, part) + warp; i < end; i += kWarps) {
      const P v = P::load(x + i * p.channels), g = P::load(grad + i * p.channels);
#pragma unroll
      for (int k = 0; k < kPack; ++k) s[k].template add<kSilu>(channel[k], v.get(k), g.get(k));
    }
  }
#pragma unroll
  for (int k = 0; k < kPack; ++k) of_warp[warp][lane][k] = s[k];
  __syncthreads();
  if (warp == 0 && c < p.channels) {
    for (int k = 0; k < kPack; ++k) {
      Sums total = of_warp[0][lane][k];
      for (int w = 1; w < kWarps; ++w) {
        total.dz += of_warp[w][lane][k].dz;
        total.dz_xhat += of_warp[w][lane][k].dz_xhat;
        total.xhat += of_warp[w][lane][k].xhat;
      }
      store_sums(p.partial + ((n * p.parts + part) * p.channels + c + k) * 3, total);
    }
  }
}

// One block: a group. Sums of its channels over the parts, then of the group.
static __global__ void __launch_bounds__(kThreads) merge_sums_kernel(Params p) {
  const int64_t group = blockIdx.x, n = group / p.groups, first = group % p.groups * p.per_group();
  float g1 = 0.f, g2 = 0.f;
  for (int64_t i = threadIdx.x; i < p.per_group(); i += kThreads) {
    const int64_t c = first + i;
    Sums s;
    for (int64_t part = 0; part < p.parts; ++part) {
      const float* in = p.partial + ((n * p.parts + part) * p.channels + c) * 3;
      s.dz += in[0];
      s.dz_xhat += in[1];
      s.xhat += in[2];
    }
    store_sums(p.sums + (n * p.channels + c) * 3, s);
    g1 += p.gain(n, c) * s.dz;
    g2 += p.gain(n, c) * s.dz_xhat;
  }
  g1 = block_sum<kThreads>(g1);
  g2 = block_sum<kThreads>(g2);
  if (threadIdx.x == 0) {
    p.group_sums[group * 2] = g1;
    p.group_sums[group * 2 + 1] = g2;
  }
}

// dx = rstd * (gain * dz - G1 / m - xhat * G2 / m) = factor * dz - (a + b * x)
template <typename T, bool kSilu, int kPack, bool kColumns>
__global__ void __launch_bounds__(kThreads) apply_bwd_kernel(Params p) {
  using P = Pack<T, kPack>;
  constexpr int kChannels = kColumns ? kPack : 1;
  const Share<kPack, kColumns> at(p);
  if (at.begin >= at.end) return;
  const float inverse = 1.f / (float(p.per_group()) * float(p.positions));
  float factor[kChannels], term[kChannels], a[kChannels], b[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const Channel channel(p, at.n, at.c + k);
    const float* const sums = p.group_sums + p.group_of(at.n, at.c + k) * 2;
    factor[k] = channel.factor;
    term[k] = channel.term;
    a[k] = channel.rstd * inverse * (sums[0] + channel.centre * sums[1]);
    b[k] = channel.rstd * inverse * channel.rstd * sums[1];
  }
  for (int64_t i = at.begin; i < at.end; i += at.step) {
    const P v = P::load(static_cast<const T*>(p.x) + i);
    P g = P::load(static_cast<const T*>(p.grad) + i);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const int c = k % kChannels;
      const float x = v.get(k), dz = g.get(k) * slope<kSilu>(x * factor[c] + term[c]);
      g.set(k, factor[c] * dz - (a[c] + b[c] * x));
    }
    g.store(static_cast<T*>(p.y) + i);
  }
}

// Gradients of the small tensors, float32: weight and bias [C], add, scale and shift [N, C].
struct SmallGradients {
  float *weight, *bias, *add, *scale, *shift;
};

static __global__ void __launch_bounds__(kThreads)
    small_gradients_kernel(Params p, SmallGradients out) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= p.channels) return;
  const float positions = float(p.positions), inverse = 1.f / (float(p.per_group()) * positions);
  float weight = 0.f, bias = 0.f;
  for (int64_t n = 0; n < p.samples; ++n) {
    const int64_t i = n * p.channels + c, group = n * p.groups + c / p.per_group();
    const float* s = p.sums + i * 3;
    const float factor = 1.f + p.scale.at(n, c, 0.f);
    weight += factor * s[1];
    bias += factor * s[0];
    out.scale[i] = p.weight.at(n, c, 1.f) * s[1] + p.bias.at(n, c, 0.f) * s[0];
    out.shift[i] = s[0];
    const float mean_g1 = p.group_sums[group * 2] * inverse,
                mean_g2 = p.group_sums[group * 2 + 1] * inverse;
    out.add[i] = p.rstd[group] * (p.gain(n, c) * s[0] - positions * mean_g1 - s[2] * mean_g2);
  }
  out.weight[c] = weight;
  out.bias[c] = bias;
}

}  // namespace vitkit::group_norm
