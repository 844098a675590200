// Device code of rope_2d and its launch. No torch header: the emulator compiles this very file.
//
// A thread turns the same pairs of up to four heads of one token by angles that it reads once,
// where heads share them. q and k go in one launch: blocks of q come first.
#pragma once

#include <initializer_list>

#include "launch_kernel.cuh"
#include "tiling.cuh"

namespace vitkit::rope {

// Heads a thread takes: their loads hide each other's latency, and a bfloat16 pair's four angles
// are 16 bytes beside 4 of its own.
constexpr int kHeads = 4;

// [B, N, H, D], elements of a head dense.
struct Heads {
  const void* x;
  void* y;  // contiguous
  int64_t batch_stride, token_stride, head_stride;
  int heads;
  int steps;      // threads that share the heads of a token, every steps-th each
  Tiling tiling;  // of B, N, and steps times groups of pairs
};

// [B, N', H, D] float32, elements of a head dense; a stride is 0 where the table is shared.
struct Table {
  const float* data;
  int64_t batch_stride, token_stride, head_stride;
};

struct Params {
  Heads q, k;  // k without heads: none
  Table cos, sin;
  int64_t batch, tokens, prefix;  // the first tokens have no angles and stay as they are
  int head_dim;
  bool inverse;
};

// kPairs pairs (a, b) of a row of D elements, from pair j on.
template <int kPairs, bool kInterleaved, typename T>
__device__ __forceinline__ void load_pairs(const T* row, int half, int j, float (&a)[kPairs],
                                           float (&b)[kPairs]) {
  if constexpr (kInterleaved && kPairs > 1) {
    // Angles are wider than packs.
    constexpr int kPack = 2 * kPairs < kFullPack<T> ? 2 * kPairs : kFullPack<T>;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; i += kPack) {
      const auto v = Pack<T, kPack>::load(row + 2 * j + i);
#pragma unroll
      for (int k = 0; k < kPack; k += 2) {
        a[(i + k) / 2] = v.get(k);
        b[(i + k) / 2] = v.get(k + 1);
      }
    }
  } else if constexpr (kInterleaved) {
    a[0] = to_float(row[2 * j]);
    b[0] = to_float(row[2 * j + 1]);
  } else {
    constexpr int kPack = kPairs < kFullPack<T> ? kPairs : kFullPack<T>;
#pragma unroll
    for (int i = 0; i < kPairs; i += kPack) {
      const auto first = Pack<T, kPack>::load(row + j + i);
      const auto second = Pack<T, kPack>::load(row + half + j + i);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        a[i + k] = first.get(k);
        b[i + k] = second.get(k);
      }
    }
  }
}

template <int kPairs, bool kInterleaved, typename T>
__device__ __forceinline__ void store_pairs(T* row, int half, int j, const float (&a)[kPairs],
                                            const float (&b)[kPairs]) {
  if constexpr (kInterleaved && kPairs > 1) {
    Pack<T, 2 * kPairs> v;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      v.set(2 * k, a[k]);
      v.set(2 * k + 1, b[k]);
    }
    v.store(row + 2 * j);
  } else if constexpr (kInterleaved) {
    from_float(a[0], row + 2 * j);
    from_float(b[0], row + 2 * j + 1);
  } else {
    Pack<T, kPairs> first, second;
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      first.set(k, a[k]);
      second.set(k, b[k]);
    }
    first.store(row + j);
    second.store(row + half + j);
  }
}

// cos and sin of kPairs pairs, those of their first and second elements.
template <int kPairs>
struct Angles {
  float cos[2][kPairs], sin[2][kPairs];

  template <bool kInterleaved>
  __device__ __forceinline__ void load(const Params& p, int64_t b, int64_t n, int64_t h, int j) {
    const int half = p.head_dim / 2;
    const auto row = [&](const Table& t) {
      return t.data + b * t.batch_stride + (n - p.prefix) * t.token_stride + h * t.head_stride;
    };
    load_pairs<kPairs, kInterleaved>(row(p.cos), half, j, cos[0], cos[1]);
    load_pairs<kPairs, kInterleaved>(row(p.sin), half, j, sin[0], sin[1]);
    // The transposed rotation: -sin of the first is sin of the second, and the other way round.
    if (!p.inverse) return;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float first = sin[0][i];
      sin[0][i] = -sin[1][i];
      sin[1][i] = -first;
    }
  }
};

template <typename T, int kPairs, bool kInterleaved>
__global__ void __launch_bounds__(kTileThreads) rope_2d_kernel(const __grid_constant__ Params p) {
  const unsigned of_q = p.q.tiling.unit_blocks * p.q.tiling.row_blocks * unsigned(p.batch);
  const bool is_k = blockIdx.x >= of_q;
  const Heads& t = is_k ? p.k : p.q;
  const Tiling::Place at = t.tiling.place(is_k ? blockIdx.x - of_q : blockIdx.x);
  if (!at.exists) return;
  const int half = p.head_dim / 2, groups = half / kPairs;
  const int step = int(at.unit) / groups, j = int(at.unit) % groups * kPairs;
  const int64_t b = at.segment, n = at.row;
  const bool turned = n >= p.prefix, shared = p.cos.head_stride == 0 && p.sin.head_stride == 0;
  const T* const x = static_cast<const T*>(t.x) + b * t.batch_stride + n * t.token_stride;
  T* const y = static_cast<T*>(t.y) + (b * p.tokens + n) * t.heads * p.head_dim;
  Angles<kPairs> angles;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int h = i * t.steps + step;
    if (h >= t.heads) break;
    float a[kPairs], c[kPairs];
    load_pairs<kPairs, kInterleaved>(x + h * t.head_stride, half, j, a, c);
    if (turned) {
      if (i == 0 || !shared) angles.template load<kInterleaved>(p, b, n, h, j);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        const float first = a[k];
        a[k] = first * angles.cos[0][k] - c[k] * angles.sin[0][k];
        c[k] = c[k] * angles.cos[1][k] + first * angles.sin[1][k];
      }
    }
    store_pairs<kPairs, kInterleaved>(y + int64_t(h) * p.head_dim, half, j, a, c);
  }
}

// ---- launch ----

inline bool packs_fit(const Params& p, Element element, bool interleaved) {
  const auto fits = [](const void* data, int bytes, std::initializer_list<int64_t> strides) {
    bool fit = aligned(data);
    for (const int64_t stride : strides) fit = fit && stride * bytes % 16 == 0;
    return fit;
  };
  const int bytes = bytes_of(element);
  // A pack is one run of a head: of a half, or of neighbours.
  bool fit = int64_t(interleaved ? p.head_dim : p.head_dim / 2) * bytes % 16 == 0;
  for (const Heads* t : {&p.q, &p.k}) {
    if (t->heads == 0) continue;
    fit = fit && aligned(t->y) &&
          fits(t->x, bytes, {t->batch_stride, t->token_stride, t->head_stride});
  }
  for (const Table* t : {&p.cos, &p.sin})
    fit = fit && fits(t->data, 4, {t->batch_stride, t->token_stride, t->head_stride});
  return fit;
}

// One of q and k may be empty.
inline const char* rope_2d(Params p, Element element, bool interleaved, Stream stream) {
  return with_pack(element, packs_fit(p, element, interleaved), [&](auto* type, auto pack) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = decltype(pack)::value;
    const auto launch = [&](auto layout) -> const char* {
      constexpr bool kInterleaved = decltype(layout)::value;
      constexpr int kPairs = kInterleaved && kPack > 1 ? kPack / 2 : kPack;
      int64_t blocks = 0;
      for (Heads* t : {&p.q, &p.k}) {
        t->tiling = {};
        t->steps = (t->heads + kHeads - 1) / kHeads;
        if (t->heads == 0) continue;
        const int64_t units = int64_t(t->steps) * (p.head_dim / 2 / kPairs);
        const char* error = make_tiling(t->tiling, p.batch, p.tokens, units);
        if (error) return error;
        blocks += blocks_of(t->tiling);
      }
      if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
      return launch_kernel(&rope_2d_kernel<T, kPairs, kInterleaved>, unsigned(blocks), kTileThreads,
                           0, stream, p);
    };
    return interleaved ? launch(std::true_type{}) : launch(std::false_type{});
  });
}

}  // namespace vitkit::rope
