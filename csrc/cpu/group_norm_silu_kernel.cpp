// group_norm_silu for one instruction set. Groups that one thread can hold are read once from
// memory (forward_groups, backward_groups); otherwise the positions of a sample are split into
// parts whose number does not depend on the threads, so that results do not either.
#include "group_norm_silu.h"

#include "norm/activation.h"
#include "norm/group_norm_backward.h"
#include "norm/group_norm_parts.h"
#include "norm/statistics.h"
#include "scratch.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

VITKIT_INLINE Affine affine_of(const GroupNormForward& p, int64_t n, int64_t c, float mean,
                               float rstd) {
  const int64_t i = n * p.shape.channels + c;
  const float factor = rstd * p.gain[i];
  const double centre = (p.add ? double(p.add[i]) : 0.) - double(mean);
  return {factor, float(double(p.offset[i]) + double(factor) * centre)};
}

template <typename T, bool kSilu>
VITKIT_INLINE void apply_row(const T* x, T* y, int64_t n, Affine affine) {
  const f32v factor = splat(affine.factor), term = splat(affine.term);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    f32v a, b;
    load2(x + i, a, b);
    a = activate<T, kSilu>(fma(a, factor, term));
    b = activate<T, kSilu>(fma(b, factor, term));
    store2(y + i, a, b);
  }
  each_vector(n - i, [&](int64_t k, auto count) {
    const f32v z = fma(load_partial(x + i + k, count), factor, term);
    store_partial(y + i + k, activate<T, kSilu>(z), count);
  });
}

VITKIT_INLINE void store_statistics(const GroupNormShape& s, const Moments& m, float* mean,
                                    float* rstd) {
  *mean = float(m.mean);
  *rstd = float(1. / std::sqrt(m.m2 / m.count + double(s.eps)));
}

// ---- forward, one group at a time ----

template <typename T, bool kSilu>
void forward_groups(const GroupNormForward& p, int64_t begin, int64_t end) {
  const GroupNormShape& s = p.shape;
  const int64_t per_group = s.channels_per_group(), hw = s.positions;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / s.groups, first = item % s.groups * per_group;
    const int64_t start = (n * s.channels + first) * hw;
    const T* x = at<T>(p.x, start);
    Moments moments;
    if (p.add == nullptr) {
      add_values(moments, x, per_group * hw);
    } else {
      for (int64_t c = 0; c < per_group; ++c) {
        Moments channel;
        add_values(channel, x + c * hw, hw);
        channel.mean += p.add[n * s.channels + first + c];
        Moments::merge(moments, channel.count, channel.mean, channel.m2);
      }
    }
    store_statistics(s, moments, p.mean + item, p.rstd + item);
    for (int64_t c = 0; c < per_group; ++c) {
      const Affine affine = affine_of(p, n, first + c, p.mean[item], p.rstd[item]);
      apply_row<T, kSilu>(x + c * hw, at<T>(p.y, start + c * hw), hw, affine);
    }
  }
}

// ---- forward in parts: statistics of every channel, merge, apply ----

template <typename T>
void row_statistics(const GroupNormForward& p, int64_t n, Range range, float* out) {
  const GroupNormShape& s = p.shape;
  for (int64_t c = 0; c < s.channels; ++c) {
    Moments moments;
    add_values(moments, at<T>(p.x, (n * s.channels + c) * s.positions + range.begin), range.size());
    out[c] = float(moments.mean);
    out[s.channels + c] = float(moments.m2);
  }
}

// Positions are rows of channels here: blocks of rows that fit the first-level cache are summed,
// then summed about their means, and merged into the running statistics of every channel.
template <typename T>
void column_statistics(const GroupNormForward& p, int64_t n, Range range, float* out) {
  const int64_t channels = p.shape.channels;
  float *mean = out, *m2 = out + channels;
  const int64_t rows_per_block = 1 + 4096 / channels;
  int64_t done = 0;
  for (int64_t row = range.begin; row < range.end; row += rows_per_block) {
    const int64_t left = range.end - row, rows = left < rows_per_block ? left : rows_per_block;
    const T* x = at<T>(p.x, (n * p.shape.positions + row) * channels);
    const float inverse = 1.f / float(rows), share = float(rows) / float(done + rows);
    const float weight = float(done) * share;
    each_vector(channels, [&](int64_t c, auto count) {
      f32v sum = {}, squares = {};
      for (int64_t r = 0; r < rows; ++r) {
        sum += load_partial(x + r * channels + c, count);
        // The next block: no hardware foresees steps this wide.
        __builtin_prefetch(x + (rows + r) * channels + c, 0, 2);
      }
      const f32v block_mean = sum * inverse;
      for (int64_t r = 0; r < rows; ++r) {
        const f32v d = load_partial(x + r * channels + c, count) - block_mean;
        squares += d * d;
      }
      if (done == 0) {
        store_partial(mean + c, block_mean, count);
        store_partial(m2 + c, squares, count);
      } else {
        const f32v old = load_partial(mean + c, count), delta = block_mean - old;
        store_partial(mean + c, fma(delta, splat(share), old), count);
        store_partial(m2 + c, load_partial(m2 + c, count) + squares + delta * delta * weight,
                      count);
      }
    });
    done += rows;
  }
}

template <typename T>
void forward_statistics(const GroupNormForward& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / p.parts;
    const Range range = part_of(p.shape.positions, item % p.parts, p.parts);
    float* out = p.partial + item * 2 * p.shape.channels;
    if (p.shape.channels_last) {
      column_statistics<T>(p, n, range, out);
    } else {
      row_statistics<T>(p, n, range, out);
    }
  }
}

// Mean and M2 of every channel of a sample from those of its parts.
void merge_channels(const GroupNormShape& s, const float* partial, int64_t parts, float* mean,
                    float* m2) {
  const int64_t channels = s.channels;
  // f(vector, its mean and M2 in part k, share of the positions) for all parts
  const auto each_part = [&](const auto& f) {
    for (int64_t k = 0; k < parts; ++k) {
      const float* part = partial + k * 2 * channels;
      const float size = float(part_of(s.positions, k, parts).size());
      each_vector(channels, [&](int64_t c, auto count) {
        // Deviations from the first part's mean keep the weighted sum free of cancellation.
        const f32v d = load_partial(part + c, count) - load_partial(partial + c, count);
        f(c, count, d, load_partial(part + channels + c, count), size);
      });
    }
  };
  std::memset(mean, 0, size_t(channels) * sizeof(float));
  std::memset(m2, 0, size_t(channels) * sizeof(float));
  each_part([&](int64_t c, auto count, f32v d, f32v, float size) {
    const f32v sum = load_partial(mean + c, count);
    store_partial(mean + c, fma(d, splat(size / float(s.positions)), sum), count);
  });
  each_part([&](int64_t c, auto count, f32v d, f32v squares, float size) {
    d -= load_partial(mean + c, count);
    store_partial(m2 + c, load_partial(m2 + c, count) + fma(d * d, splat(size), squares), count);
  });
  for (int64_t c = 0; c < channels; ++c) mean[c] += partial[c];
}

// The channels of a group, which all have as many positions, in double.
void forward_merge(const GroupNormForward& p, int64_t begin, int64_t end) {
  const GroupNormShape& s = p.shape;
  const int64_t channels = s.channels, per_group = s.channels_per_group();
  float* mean = static_cast<float*>(thread_scratch(size_t(channels) * 2 * sizeof(float)));
  float* m2 = mean + channels;
  for (int64_t n = begin; n < end; ++n) {
    merge_channels(s, p.partial + n * p.parts * 2 * channels, p.parts, mean, m2);
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t first = g * per_group;
      const auto mean_of = [&](int64_t c) {
        return double(mean[c]) + (p.add ? double(p.add[n * channels + c]) : 0.);
      };
      const double base = mean_of(first);
      Moments moments{double(s.group_elements()), 0, 0};
      for (int64_t c = first; c < first + per_group; ++c) moments.mean += mean_of(c) - base;
      moments.mean = base + moments.mean / double(per_group);
      for (int64_t c = first; c < first + per_group; ++c) {
        const double d = mean_of(c) - moments.mean;
        moments.m2 += double(m2[c]) + double(s.positions) * d * d;
      }
      store_statistics(s, moments, p.mean + n * s.groups + g, p.rstd + n * s.groups + g);
    }
  }
}

// Factor and term of every channel of sample n.
VITKIT_INLINE void affine_rows(const GroupNormForward& p, int64_t n, float* factor, float* term) {
  const GroupNormShape& s = p.shape;
  for (int64_t g = 0, c = 0; g < s.groups; ++g) {
    const int64_t group = n * s.groups + g;
    for (const int64_t stop = c + s.channels_per_group(); c < stop; ++c) {
      const Affine affine = affine_of(p, n, c, p.mean[group], p.rstd[group]);
      factor[c] = affine.factor;
      term[c] = affine.term;
    }
  }
}

template <typename T, bool kSilu>
void forward_apply(const GroupNormForward& p, int64_t begin, int64_t end) {
  const GroupNormShape& s = p.shape;
  const int64_t channels = s.channels;
  float* factor = static_cast<float*>(thread_scratch(size_t(channels) * 2 * sizeof(float)));
  float* term = factor + channels;
  for (int64_t item = begin, prepared = -1; item < end; ++item) {
    const int64_t n = item / p.parts;
    if (n != prepared) affine_rows(p, n, factor, term);
    prepared = n;
    const Range range = part_of(s.positions, item % p.parts, p.parts);
    if (!s.channels_last) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t start = (n * channels + c) * s.positions + range.begin;
        apply_row<T, kSilu>(at<T>(p.x, start), at<T>(p.y, start), range.size(),
                            {factor[c], term[c]});
      }
      continue;
    }
    for (int64_t row = range.begin; row < range.end; ++row) {
      const int64_t start = (n * s.positions + row) * channels;
      const T* x = at<T>(p.x, start);
      T* y = at<T>(p.y, start);
      each_vector(channels, [&](int64_t c, auto count) {
        const f32v z = fma(load_partial(x + c, count), load_partial(factor + c, count),
                           load_partial(term + c, count));
        store_partial(y + c, activate<T, kSilu>(z), count);
      });
    }
  }
}

// ---- dispatch on element type and activation ----

template <typename Params, typename F>
void dispatch(const Params& p, F&& f) {
  const auto with_activation = [&](auto element) {
    if (p.shape.silu) {
      f(element, std::true_type{});
    } else {
      f(element, std::false_type{});
    }
  };
  switch (p.shape.element) {
    case NormElement::f32:
      return with_activation(float{});
    case NormElement::bf16:
      return with_activation(bf16{});
    case NormElement::f16:
      return with_activation(f16{});
  }
}

}  // namespace

#define VITKIT_DISPATCHED(function, Params)                              \
  [](const Params& p, int64_t begin, int64_t end) {                      \
    dispatch(p, [&](auto element, auto silu) {                           \
      function<decltype(element), decltype(silu)::value>(p, begin, end); \
    });                                                                  \
  }

const GroupNormKernels& group_norm_kernels() {
  static constexpr GroupNormKernels kernels{
      VITKIT_DISPATCHED(forward_groups, GroupNormForward),
      VITKIT_DISPATCHED(backward_groups, GroupNormBackward),
      [](const GroupNormForward& p, int64_t begin, int64_t end) {
        dispatch(p,
                 [&](auto element, auto) { forward_statistics<decltype(element)>(p, begin, end); });
      },
      forward_merge,
      VITKIT_DISPATCHED(forward_apply, GroupNormForward),
      VITKIT_DISPATCHED(backward_sums, GroupNormBackward),
      backward_merge,
      VITKIT_DISPATCHED(backward_apply, GroupNormBackward),
  };
  return kernels;
}

}  // namespace vitkit::cpu::VITKIT_ISA
