// Score term of window attention: relative position bias, shift mask, and for Swin V2 the factors
// that make a product of rows a scaled cosine.
#pragma once

#include "attention/window_map.h"

namespace vitkit::cpu::VITKIT_ISA {

constexpr float kMinNorm = 1e-12f;
constexpr float kMaxLogitScale = 4.60517018598809136804f;  // ln 100

template <typename T>
VITKIT_INLINE float dot(const T* a, const T* b, int64_t n) {
  f32v sum = {};
  each_vector(n, [&](int64_t d, auto count) {
    sum = fma(load_partial(a + d, count), load_partial(b + d, count), sum);
  });
  return reduce_add(sum);
}

template <typename T>
VITKIT_INLINE float length(const T* row, int64_t n) {
  return __builtin_sqrtf(dot(row, row, n));
}

VITKIT_INLINE float cosine_gain(float logit_scale) {
  return __builtin_expf(logit_scale > kMaxLogitScale ? kMaxLogitScale : logit_scale);
}

// Of one head of a window: gain / |q_i| of its queries and 1 / |k_j| of its keys, zero behind them.
struct CosineFactors {
  float *q = nullptr, *k = nullptr;

  CosineFactors() = default;
  CosineFactors(Arena& arena, int64_t places)
      : q(arena.take<float>(places)), k(arena.take<float>(round_up(places, kPanel) + kPanel)) {}

  template <typename Map>
  void set(const Map& map, float logit_scale, int64_t head_dim) const {
    const float gain = cosine_gain(logit_scale);
    const auto inverse = [&](float x) { return 1.f / (x < kMinNorm ? kMinNorm : x); };
    for (int64_t i = 0; i < map.nq; ++i) q[i] = gain * inverse(length(map.q_row(i), head_dim));
    for (int64_t j = 0; j < map.nk; ++j) k[j] = inverse(length(map.k_row(j), head_dim));
    for (int64_t j = map.nk; j < round_up(map.nk, kPanel); ++j) k[j] = 0.f;
  }
};

struct WindowTerm {
  static constexpr bool kNone = false;
  const Window* window;
  const float* bias;  // unfolded table of the head
  CosineFactors cosine;

  template <typename Body>
  void row(int64_t i, int64_t j0, int64_t, const Body& body) const {
    const WindowQuery& query = window->query[i];
    const float* b = bias + query.bias + j0;
    const float* m = query.mask ? query.mask + j0 : nullptr;
    if (cosine.q) {
      const f32v factor = splat(cosine.q[i]);
      const float* k = cosine.k + j0;
      if (m)
        body([=](f32v x, int64_t j, int) {
          return fma(x * factor, load(k + j), load(b + j) + load(m + j));
        });
      else
        body([=](f32v x, int64_t j, int) { return fma(x * factor, load(k + j), load(b + j)); });
    } else if (m) {
      body([=](f32v x, int64_t j, int) { return x + (load(b + j) + load(m + j)); });
    } else {
      body([=](f32v x, int64_t j, int) { return x + load(b + j); });
    }
  }
};

// Adds a row of gradients to that of the unfolded table. Rows are zero behind their n elements, up
// to a whole vector.
struct WindowSink {
  static constexpr bool kNone = false, kExactDelta = false, kChanges = false;
  const Window* window;
  float* bias;  // null: no gradient

  void add(int64_t i, int64_t j0, int64_t n, const float* ds) const {
    if (!bias) return;
    float* to = bias + window->query[i].bias + j0;
    for (int64_t j = 0; j < n; j += kLanes) store(to + j, load(to + j) + load(ds + j));
  }
};

// The same, then the gradient of the product of rows. Scores reach 100 and more here: an error of
// delta, multiplied by them, would be most of what is summed into the gradient of logit_scale.
struct CosineSink : WindowSink {
  static constexpr bool kExactDelta = true, kChanges = true;
  CosineFactors cosine;

  void add(int64_t i, int64_t j0, int64_t n, float* ds) const {
    WindowSink::add(i, j0, n, ds);
    const f32v factor = splat(cosine.q[i]);
    for (int64_t j = 0; j < n; j += kLanes)
      store(ds + j, load(ds + j) * factor * load(cosine.k + j0 + j));
  }
};

}  // namespace vitkit::cpu::VITKIT_ISA
