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
  // Channels, and channels of a group times parts, fit 32 bits. A part has part_length positions,
  // which full packs divide; the last has what is left.
  int64_t samples, channels, positions, groups, parts, part_length;
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

// Division without a subroutine for its rare cases: a sigmoid below 2^-126 may become 0.
template <bool kSilu>
__device__ __forceinline__ float activate(float z) {
  return kSilu ? __fdividef(z, 1.f + __expf(-z)) : z;
}

template <bool kSilu>
__device__ __forceinline__ float slope(float z) {
  if (!kSilu) return 1.f;
  const float s = __fdividef(1.f, 1.f + __expf(-z));
  return s * (1.f + z * (1.f - s));
}

__device__ __forceinline__ int64_t part_end(const Params& p, int64_t part) {
  return min((part + 1) * p.part_length, p.positions);
}

// A group, its sample and its first channel: a block has one.
struct Group {
  int64_t index, n, first;

  __device__ __forceinline__ explicit Group(const Params& p)
      : index(blockIdx.x),
        n(blockIdx.x / unsigned(p.groups)),
        first(blockIdx.x % unsigned(p.groups) * p.per_group()) {}
};

// A thread's elements begin, begin + step, ... below end, of one part of the positions. Rows: a
// block has a part of one channel's row. Columns: kWarp packs of channels, warps take positions in
// turns. Either way a thread's channels, from c on, stay the same.
template <int kPack, bool kColumns>
struct Share {
  int64_t n, part, c, begin, end, step;

  __device__ __forceinline__ explicit Share(const Params& p) : part(blockIdx.y) {
    const int64_t first = part * p.part_length;
    if constexpr (kColumns) {
      n = blockIdx.z;
      c = (int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp) * kPack;
      const int64_t start = n * p.positions * p.channels + c;
      begin = start + (first + threadIdx.x / kWarp) * p.channels;
      end = c < p.channels ? start + part_end(p, part) * p.channels : begin;
      step = kThreads / kWarp * p.channels;
    } else {
      n = blockIdx.x / unsigned(p.channels);
      c = blockIdx.x % unsigned(p.channels);
      const int64_t start = int64_t(blockIdx.x) * p.positions;
      begin = start + first + int64_t(threadIdx.x) * kPack;
      end = start + part_end(p, part);
      step = kThreads * kPack;
    }
  }
};

// ---- [N, C, positions], a group per block ----

// Of less than 2^31 elements. Keeps the group in shared memory (as T) between its three readings
// where `cached`, else rereads it.
template <typename T, bool kSilu, int kPack>
__global__ void __launch_bounds__(kThreads) group_norm_silu_fwd_kernel(Params p, bool cached) {
  VITKIT_DYNAMIC_SHARED(shared_bytes);
  T* const kept = reinterpret_cast<T*>(shared_bytes);
  const Group group(p);
  const int64_t n = group.n, first = group.first;
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
    p.mean[group.index] = mean;
    p.rstd[group.index] = rstd;
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

template <typename S>
__device__ __forceinline__ void store_moments(const Params& p, const S& at, int k,
                                              const Moments& m) {
  float* out = p.partial + ((at.n * p.parts + at.part) * p.channels + at.c + k) * 2;
  out[0] = m.mean;
  out[1] = m.m2;
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) row_statistics_kernel(Params p) {
  const Share<kPack, false> at(p);
  Moments m;
  for (int64_t i = at.begin; i < at.end; i += at.step)
    add_pack(m, Pack<T, kPack>::load(static_cast<const T*>(p.x) + i));
  m = block_moments<kThreads>(m);
  if (threadIdx.x == 0) store_moments(p, at, 0, m);
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) column_statistics_kernel(Params p) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Moments of_warp[kWarps][kWarp][kPack];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Share<kPack, true> at(p);
  float count = 0.f, mean[kPack] = {}, m2[kPack] = {};
  for (int64_t i = at.begin; i < at.end; i += at.step) {
    const auto v = Pack<T, kPack>::load(static_cast<const T*>(p.x) + i);
    count += 1.f;
    const float share = __fdividef(1.f, count);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {  // Welford's
      const float delta = v.get(k) - mean[k];
      mean[k] += delta * share;
      m2[k] += delta * (v.get(k) - mean[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kPack; ++k) of_warp[warp][lane][k] = {count, mean[k], m2[k]};
  __syncthreads();
  if (warp == 0 && at.c < p.channels) {
    for (int k = 0; k < kPack; ++k) {
      Moments total = of_warp[0][lane][k];
      for (int w = 1; w < kWarps; ++w) total.merge(of_warp[w][lane][k]);
      store_moments(p, at, k, total);
    }
  }
}

// One block: a group. Channels of a part, then parts, each thread a fixed share.
static __global__ void __launch_bounds__(kThreads) merge_statistics_kernel(Params p) {
  const Group group(p);
  const unsigned count = p.per_group() * unsigned(p.parts);
  Moments m;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) {
    const int64_t c = group.first + i % p.per_group(), part = i / p.per_group();
    const float* in = p.partial + ((group.n * p.parts + part) * p.channels + c) * 2;
    m.merge({float(part_end(p, part) - part * p.part_length), in[0] + p.add.at(group.n, c, 0.f),
             in[1]});
  }
  m = block_moments<kThreads>(m);
  if (threadIdx.x == 0) {
    p.mean[group.index] = m.mean;
    p.rstd[group.index] = rsqrtf(m.m2 / m.count + p.eps);
  }
}

// ---- elementwise passes ----

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

template <typename S>
__device__ __forceinline__ void store_sums(const Params& p, const S& at, int k, const Sums& s) {
  store_sums(p.partial + ((at.n * p.parts + at.part) * p.channels + at.c + k) * 3, s);
}

template <typename T, bool kSilu, int kPack>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(Params p) {
  using P = Pack<T, kPack>;
  const Share<kPack, false> at(p);
  const Channel channel(p, at.n, at.c);
  Sums s;
  for (int64_t i = at.begin; i < at.end; i += at.step) {
    const P v = P::load(static_cast<const T*>(p.x) + i);
    const P g = P::load(static_cast<const T*>(p.grad) + i);
#pragma unroll
    for (int k = 0; k < kPack; ++k) s.add<kSilu>(channel, v.get(k), g.get(k));
  }
  s.dz = block_sum<kThreads>(s.dz);
  s.dz_xhat = block_sum<kThreads>(s.dz_xhat);
  s.xhat = block_sum<kThreads>(s.xhat);
  if (threadIdx.x == 0) store_sums(p, at, 0, s);
}

template <typename T, bool kSilu, int kPack>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(Params p) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Sums of_warp[kWarps][kWarp][kPack];
  using P = Pack<T, kPack>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Share<kPack, true> at(p);
  Sums s[kPack];
  if (at.begin < at.end) {
    Channel channel[kPack];
#pragma unroll
    for (int k = 0; k < kPack; ++k) channel[k] = Channel(p, at.n, at.c + k);
    for (int64_t i = at.begin; i < at.end; i += at.step) {
      const P v = P::load(static_cast<const T*>(p.x) + i);
      const P g = P::load(static_cast<const T*>(p.grad) + i);
#pragma unroll
      for (int k = 0; k < kPack; ++k) s[k].template add<kSilu>(channel[k], v.get(k), g.get(k));
    }
  }
#pragma unroll
  for (int k = 0; k < kPack; ++k) of_warp[warp][lane][k] = s[k];
  __syncthreads();
  if (warp == 0 && at.c < p.channels) {
    for (int k = 0; k < kPack; ++k) {
      Sums total = of_warp[0][lane][k];
      for (int w = 1; w < kWarps; ++w) {
        total.dz += of_warp[w][lane][k].dz;
        total.dz_xhat += of_warp[w][lane][k].dz_xhat;
        total.xhat += of_warp[w][lane][k].xhat;
      }
      store_sums(p, at, k, total);
    }
  }
}

// One block: a group. Sums of its channels over the parts, then of the group.
static __global__ void __launch_bounds__(kThreads) merge_sums_kernel(Params p) {
  const Group group(p);
  const int64_t n = group.n;
  float g1 = 0.f, g2 = 0.f;
  for (unsigned i = threadIdx.x; i < p.per_group(); i += kThreads) {
    const int64_t c = group.first + i;
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
    p.group_sums[group.index * 2] = g1;
    p.group_sums[group.index * 2 + 1] = g2;
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
    const int64_t i = n * p.channels + c, group = p.group_of(n, c);
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
