// Backward of group_norm_silu: one group at a time where one thread can hold it, in parts
// otherwise.
//
// dz = grad * act'(z);  S1 = sum dz, S2 = sum dz * xhat, S3 = sum xhat over the positions of a
// channel; G1 = sum over the group of gain * S1, G2 of gain * S2; m elements in a group.
// dx = rstd * (gain * dz - G1 / m - xhat * G2 / m)
#pragma once

#include "group_norm_silu.h"
#include "norm/activation.h"
#include "norm/group_norm_parts.h"
#include "norm/statistics.h"
#include "scratch.h"

namespace vitkit::cpu::VITKIT_ISA {

struct Channel {
  Affine z;     // z = x * factor + term
  Affine xhat;  // likewise
};

// Channel i of all samples' channels, in `group` of all samples' groups.
VITKIT_INLINE Channel channel_of(const GroupNormBackward& p, int64_t i, int64_t group) {
  const float rstd = p.rstd[group], factor = rstd * p.gain[i];
  const double centre = (p.add ? double(p.add[i]) : 0.) - double(p.mean[group]);
  return {{factor, float(double(factor) * centre + double(p.offset[i]))},
          {rstd, float(double(rstd) * centre)}};
}

// dx = dz * of_dz + x * of_x + constant
struct InputGradient {
  float of_dz, of_x, constant;
};

// g1 and g2 are G1 / m and G2 / m.
VITKIT_INLINE InputGradient input_gradient(const Channel& channel, double g1, double g2) {
  const double rstd = channel.xhat.factor, slope = -rstd * g2;
  return {channel.z.factor, float(slope * rstd), float(slope * channel.xhat.term - rstd * g1)};
}

struct Sums {
  f32v dz = {}, dz_xhat = {}, xhat = {};
};

template <typename T, bool kSilu>
VITKIT_INLINE f32v activation_gradient(f32v x, f32v grad, f32v factor, f32v term) {
  return grad * activation_slope<T, kSilu>(fma(x, factor, term));
}

// Adds a row's sums to out[0..2]; keeps its dz for the second pass where there is room. The two
// vectors of load2 are kept in their own order, which write_row reads back.
template <typename T, bool kSilu>
VITKIT_INLINE void sum_row(const T* x, const T* grad, int64_t n, Channel channel, float* kept,
                           double* out) {
  const f32v factor = splat(channel.z.factor), term = splat(channel.z.term);
  const f32v xfactor = splat(channel.xhat.factor), xterm = splat(channel.xhat.term);
  const auto xhat_of = [&](f32v v) { return fma(v, xfactor, xterm); };
  const auto add = [&](Sums& sums, f32v v, f32v g, f32v xhat) {
    const f32v dz = activation_gradient<T, kSilu>(v, g, factor, term);
    sums.dz += dz;
    sums.dz_xhat += dz * xhat;
    sums.xhat += xhat;
    return dz;
  };
  for (int64_t start = 0; start < n; start += kStatisticsChunk) {
    const int64_t stop = n - start < kStatisticsChunk ? n : start + kStatisticsChunk;
    Sums sums, more;
    int64_t i = start;
    for (; i + 2 * kLanes <= stop; i += 2 * kLanes) {
      f32v v, w, g, h;
      load2(x + i, v, w);
      load2(grad + i, g, h);
      g = add(sums, v, g, xhat_of(v));
      h = add(more, w, h, xhat_of(w));
      if (kept != nullptr) {
        store(kept + i, g);
        store(kept + i + kLanes, h);
      }
    }
    each_vector(stop - i, [&](int64_t k, auto count) {
      const f32v v = load_partial(x + i + k, count), g = load_partial(grad + i + k, count);
      const f32v dz = add(sums, v, g, keep_lanes(xhat_of(v), count, 0.f));
      if (kept != nullptr) store_partial(kept + i + k, dz, count);
    });
    out[0] += reduce_add(sums.dz + more.dz);
    out[1] += reduce_add(sums.dz_xhat + more.dz_xhat);
    out[2] += reduce_add(sums.xhat + more.xhat);
  }
}

template <typename T, bool kSilu>
VITKIT_INLINE void write_row(const T* x, const T* grad, T* dx, int64_t n, Channel channel,
                             InputGradient w, const float* kept) {
  const f32v factor = splat(channel.z.factor), term = splat(channel.z.term);
  const f32v of_dz = splat(w.of_dz), of_x = splat(w.of_x), constant = splat(w.constant);
  const auto combine = [&](f32v v, f32v dz) { return fma(dz, of_dz, fma(v, of_x, constant)); };
  // The order of `kept` restarts where sum_row's chunks do.
  static_assert(kStatisticsChunk % (2 * kLanes) == 0);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    f32v v, u, g, h;
    load2(x + i, v, u);
    if (kept != nullptr) {
      g = load(kept + i);
      h = load(kept + i + kLanes);
    } else {
      load2(grad + i, g, h);
      g = activation_gradient<T, kSilu>(v, g, factor, term);
      h = activation_gradient<T, kSilu>(u, h, factor, term);
    }
    store2(dx + i, combine(v, g), combine(u, h));
  }
  each_vector(n - i, [&](int64_t k, auto count) {
    const f32v v = load_partial(x + i + k, count);
    const f32v dz = kept != nullptr ? load_partial(kept + i + k, count)
                                    : activation_gradient<T, kSilu>(
                                          v, load_partial(grad + i + k, count), factor, term);
    store_partial(dx + i + k, combine(v, dz), count);
  });
}

// What one thread keeps of dz between the two passes: within the second-level cache beside x.
constexpr int64_t kKeptElements = 1 << 16;

template <typename T, bool kSilu>
void backward_groups(const GroupNormBackward& p, int64_t begin, int64_t end) {
  const GroupNormShape& s = p.shape;
  const int64_t per_group = s.channels_per_group(), hw = s.positions;
  const double m = double(s.group_elements());
  float* kept = nullptr;
  if (kSilu && s.group_elements() <= kKeptElements)
    kept = static_cast<float*>(thread_scratch(size_t(s.group_elements()) * sizeof(float)));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * per_group;
    double g1 = 0, g2 = 0;
    for (int64_t c = 0; c < per_group; ++c) {
      const int64_t i = first + c, start = i * hw;
      double sums[3] = {};
      sum_row<T, kSilu>(at<T>(p.x, start), at<T>(p.grad, start), hw, channel_of(p, i, item),
                        kept ? kept + c * hw : nullptr, sums);
      for (int k = 0; k < 3; ++k) p.sums[i * 3 + k] = float(sums[k]);
      g1 += p.gain[i] * sums[0];
      g2 += p.gain[i] * sums[1];
    }
    g1 /= m;
    g2 /= m;
    for (int64_t c = 0; c < per_group; ++c) {
      const int64_t i = first + c, start = i * hw;
      const Channel channel = channel_of(p, i, item);
      write_row<T, kSilu>(at<T>(p.x, start), at<T>(p.grad, start), at<T>(p.dx, start), hw, channel,
                          input_gradient(channel, g1, g2), kept ? kept + c * hw : nullptr);
    }
  }
}

VITKIT_INLINE Channel sample_channel(const GroupNormBackward& p, int64_t n, int64_t c,
                                     int64_t per_group) {
  return channel_of(p, n * p.shape.channels + c, n * p.shape.groups + c / per_group);
}

// Rows of one value per channel: what the channels_last loops need beside the tensors.
struct ChannelRows {
  float *factor, *term, *xfactor, *xterm;

  ChannelRows(float* memory, int64_t channels)
      : factor(memory),
        term(factor + channels),
        xfactor(term + channels),
        xterm(xfactor + channels) {}

  void fill(const GroupNormBackward& p, int64_t n) const {
    const int64_t per_group = p.shape.channels_per_group();
    for (int64_t c = 0; c < p.shape.channels; ++c) set(c, sample_channel(p, n, c, per_group));
  }
  void set(int64_t c, const Channel& channel) const {
    factor[c] = channel.z.factor;
    term[c] = channel.z.term;
    xfactor[c] = channel.xhat.factor;
    xterm[c] = channel.xhat.term;
  }
};

// float32 maps up to this size are still in the last-level cache when they are read again: dz is
// kept in dx meanwhile, which is cheaper than its exponential.
constexpr int64_t kKeptMapBytes = int64_t(4) << 20;

template <typename T, bool kSilu>
bool keeps_dz(const GroupNormBackward& p) {
  const GroupNormShape& s = p.shape;
  return kSilu && std::is_same_v<T, float> && s.channels_last &&
         s.samples * s.channels * s.positions * int64_t(sizeof(T)) <= kKeptMapBytes;
}

// Adds `count` rows that follow each other in memory to the sums of their channels; dz goes to
// `keep` unless it is null.
template <typename T, bool kSilu>
void add_rows(const T* x, const T* grad, T* keep, int64_t count, int64_t channels,
              const ChannelRows& rows, float* out) {
  each_vector(channels, [&](int64_t c, auto lanes) {
    const f32v factor = load_partial(rows.factor + c, lanes),
               term = load_partial(rows.term + c, lanes);
    const f32v xfactor = load_partial(rows.xfactor + c, lanes);
    const f32v xterm = load_partial(rows.xterm + c, lanes);
    Sums sums;
    for (int64_t at = c; at < count * channels; at += channels) {
      const f32v v = load_partial(x + at, lanes), xhat = fma(v, xfactor, xterm);
      // The next rows: no hardware foresees steps this wide.
      __builtin_prefetch(x + at + count * channels);
      __builtin_prefetch(grad + at + count * channels);
      const f32v dz =
          activation_gradient<T, kSilu>(v, load_partial(grad + at, lanes), factor, term);
      if (keep != nullptr) store_partial(keep + at, dz, lanes);
      sums.dz += dz;
      sums.dz_xhat += dz * xhat;
      sums.xhat += xhat;
    }
    const auto add = [&](float* to, f32v sum) {
      store_partial(to, load_partial(to, lanes) + sum, lanes);
    };
    add(out + c, sums.dz);
    add(out + channels + c, sums.dz_xhat);
    add(out + 2 * channels + c, sums.xhat);
  });
}

// Few rows at a time: going down a whole column would take half a cache line from a new page at
// every step.
template <typename T, bool kSilu>
void column_sums(const GroupNormBackward& p, int64_t n, Range range, const ChannelRows& rows,
                 float* out) {
  constexpr int64_t kRows = 4;
  const int64_t channels = p.shape.channels;
  T* const keep = keeps_dz<T, kSilu>(p) ? at<T>(p.dx, 0) : nullptr;
  std::memset(out, 0, size_t(3 * channels) * sizeof(float));
  for (int64_t row = range.begin; row < range.end; row += kRows) {
    const int64_t start = (n * p.shape.positions + row) * channels, left = range.end - row;
    add_rows<T, kSilu>(at<T>(p.x, start), at<T>(p.grad, start), keep ? keep + start : nullptr,
                       left < kRows ? left : kRows, channels, rows, out);
  }
}

template <typename T, bool kSilu>
void backward_sums(const GroupNormBackward& p, int64_t begin, int64_t end) {
  const GroupNormShape& s = p.shape;
  const int64_t channels = s.channels, per_group = s.channels_per_group();
  const ChannelRows rows(static_cast<float*>(thread_scratch(size_t(channels) * 4 * sizeof(float))),
                         channels);
  for (int64_t item = begin, prepared = -1; item < end; ++item) {
    const int64_t n = item / p.parts;
    const Range range = part_of(s.positions, item % p.parts, p.parts);
    float* out = p.partial + item * 3 * channels;
    if (s.channels_last) {
      if (n != prepared) rows.fill(p, n);
      prepared = n;
      column_sums<T, kSilu>(p, n, range, rows, out);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t start = (n * channels + c) * s.positions + range.begin;
      double sums[3] = {};
      sum_row<T, kSilu>(at<T>(p.x, start), at<T>(p.grad, start), range.size(),
                        sample_channel(p, n, c, per_group), nullptr, sums);
      for (int k = 0; k < 3; ++k) out[k * channels + c] = float(sums[k]);
    }
  }
}

inline void backward_merge(const GroupNormBackward& p, int64_t begin, int64_t end) {
  const int64_t channels = p.shape.channels;
  for (int64_t n = begin; n < end; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < 3; ++k) {
        double sum = 0;
        for (int64_t part = 0; part < p.parts; ++part)
          sum += p.partial[((n * p.parts + part) * 3 + k) * channels + c];
        p.sums[(n * channels + c) * 3 + k] = float(sum);
      }
}

template <typename T, bool kSilu>
void backward_apply(const GroupNormBackward& p, int64_t begin, int64_t end) {
  const GroupNormShape& s = p.shape;
  const int64_t channels = s.channels, per_group = s.channels_per_group();
  const double m = double(s.group_elements());
  float* memory = static_cast<float*>(thread_scratch(size_t(channels) * 7 * sizeof(float)));
  const ChannelRows rows(memory, channels);
  float *of_dz = memory + 4 * channels, *of_x = of_dz + channels, *constant = of_x + channels;
  const bool kept = keeps_dz<T, kSilu>(p);
  for (int64_t item = begin, prepared = -1; item < end; ++item) {
    const int64_t n = item / p.parts;
    if (n != prepared) {
      for (int64_t g = 0; g < s.groups; ++g) {
        double g1 = 0, g2 = 0;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
          const int64_t i = n * channels + c;
          g1 += double(p.gain[i]) * p.sums[i * 3];
          g2 += double(p.gain[i]) * p.sums[i * 3 + 1];
        }
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
          const Channel channel = channel_of(p, n * channels + c, n * s.groups + g);
          const InputGradient w = input_gradient(channel, g1 / m, g2 / m);
          rows.set(c, channel);
          of_dz[c] = w.of_dz;
          of_x[c] = w.of_x;
          constant[c] = w.constant;
        }
      }
      prepared = n;
    }
    const Range range = part_of(s.positions, item % p.parts, p.parts);
    if (!s.channels_last) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t start = (n * channels + c) * s.positions + range.begin;
        write_row<T, kSilu>(at<T>(p.x, start), at<T>(p.grad, start), at<T>(p.dx, start),
                            range.size(), sample_channel(p, n, c, per_group),
                            {of_dz[c], of_x[c], constant[c]}, nullptr);
      }
      continue;
    }
    for (int64_t row = range.begin; row < range.end; ++row) {
      const int64_t start = (n * s.positions + row) * channels;
      each_vector(channels, [&](int64_t c, auto count) {
        const f32v v = load_partial(at<T>(p.x, start + c), count);
        const f32v dz =
            kept ? load_partial(at<T>(p.dx, start + c), count)
                 : activation_gradient<T, kSilu>(v, load_partial(at<T>(p.grad, start + c), count),
                                                 load_partial(rows.factor + c, count),
                                                 load_partial(rows.term + c, count));
        const f32v dx =
            fma(dz, load_partial(of_dz + c, count),
                fma(v, load_partial(of_x + c, count), load_partial(constant + c, count)));
        store_partial(at<T>(p.dx, start + c), dx, count);
      });
    }
  }
}

}  // namespace vitkit::cpu::VITKIT_ISA
