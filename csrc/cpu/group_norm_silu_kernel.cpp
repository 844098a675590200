// group_norm_silu for one instruction set. Groups that one thread can hold are read once from
// memory (forward_groups, backward_groups); otherwise the positions of a sample are split into
// parts whose number does not depend on the threads, so that results do not either.
#include "group_norm_silu.h"

#include "norm/activation.h"
#include "norm/statistics.h"
#include "scratch.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

VITKIT_INLINE Range part_of(int64_t positions, int64_t part, int64_t parts) {
  return {positions * part / parts, positions * (part + 1) / parts};
}

template <typename T>
VITKIT_INLINE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

template <typename T>
VITKIT_INLINE T* at(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}

// z = x * factor + term. The term is rounded once: it cancels against x * factor where a group lies
// far from 0.
struct Affine {
  float factor, term;
};

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
      for (int64_t r = 0; r < rows; ++r) sum += load_partial(x + r * channels + c, count);
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

// Parts of a channel in vectors over channels, then the channels of a group in double.
void forward_merge(const GroupNormForward& p, int64_t begin, int64_t end) {
  const GroupNormShape& s = p.shape;
  const int64_t channels = s.channels, per_group = s.channels_per_group();
  float* mean = static_cast<float*>(thread_scratch(size_t(channels) * 2 * sizeof(float)));
  float* m2 = mean + channels;
  for (int64_t n = begin; n < end; ++n) {
    const float* parts = p.partial + n * p.parts * 2 * channels;
    each_vector(channels, [&](int64_t c, auto count) {
      // Deviations from the first part's mean keep the weighted sum free of cancellation.
      const f32v base = load_partial(parts + c, count);
      f32v shift = {}, squares = {};
      for (int64_t k = 0; k < p.parts; ++k) {
        const float weight = float(part_of(s.positions, k, p.parts).size()) / float(s.positions);
        shift += (load_partial(parts + k * 2 * channels + c, count) - base) * weight;
      }
      for (int64_t k = 0; k < p.parts; ++k) {
        const float* part = parts + k * 2 * channels;
        const f32v d = load_partial(part + c, count) - base - shift;
        const float size = float(part_of(s.positions, k, p.parts).size());
        squares += fma(d * d, splat(size), load_partial(part + channels + c, count));
      }
      store_partial(mean + c, base + shift, count);
      store_partial(m2 + c, squares, count);
    });
    for (int64_t g = 0; g < s.groups; ++g) {
      Moments moments;
      for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
        const double add = p.add ? p.add[n * channels + c] : 0.;
        Moments::merge(moments, double(s.positions), mean[c] + add, m2[c]);
      }
      store_statistics(s, moments, p.mean + n * s.groups + g, p.rstd + n * s.groups + g);
    }
  }
}

// Factor and term of every channel of sample n.
VITKIT_INLINE void affine_rows(const GroupNormForward& p, int64_t n, float* factor, float* term) {
  const GroupNormShape& s = p.shape;
  const int64_t per_group = s.channels_per_group();
  for (int64_t c = 0; c < s.channels; ++c) {
    const int64_t group = n * s.groups + c / per_group;
    const Affine affine = affine_of(p, n, c, p.mean[group], p.rstd[group]);
    factor[c] = affine.factor;
    term[c] = affine.term;
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

// ---- backward ----
//
// dz = grad * act'(z);  S1 = sum dz, S2 = sum dz * xhat, S3 = sum xhat over the positions of a
// channel; G1 = sum over the group of gain * S1, G2 of gain * S2; m elements in a group.
// dx = rstd * (gain * dz - G1 / m - xhat * G2 / m)

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

template <typename T, bool kSilu>
void column_sums(const GroupNormBackward& p, int64_t n, Range range, const ChannelRows& rows,
                 float* out) {
  const int64_t channels = p.shape.channels;
  each_vector(channels, [&](int64_t c, auto count) {
    const f32v factor = load_partial(rows.factor + c, count),
               term = load_partial(rows.term + c, count);
    const f32v xfactor = load_partial(rows.xfactor + c, count);
    const f32v xterm = load_partial(rows.xterm + c, count);
    Sums sums;
    for (int64_t row = range.begin; row < range.end; ++row) {
      const int64_t start = (n * p.shape.positions + row) * channels + c;
      const f32v v = load_partial(at<T>(p.x, start), count), xhat = fma(v, xfactor, xterm);
      const f32v dz =
          activation_gradient<T, kSilu>(v, load_partial(at<T>(p.grad, start), count), factor, term);
      sums.dz += dz;
      sums.dz_xhat += dz * xhat;
      sums.xhat += xhat;
    }
    store_partial(out + c, sums.dz, count);
    store_partial(out + channels + c, sums.dz_xhat, count);
    store_partial(out + 2 * channels + c, sums.xhat, count);
  });
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

void backward_merge(const GroupNormBackward& p, int64_t begin, int64_t end) {
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
        const f32v dz = activation_gradient<T, kSilu>(
            v, load_partial(at<T>(p.grad, start + c), count), load_partial(rows.factor + c, count),
            load_partial(rows.term + c, count));
        const f32v dx =
            fma(dz, load_partial(of_dz + c, count),
                fma(v, load_partial(of_x + c, count), load_partial(constant + c, count)));
        store_partial(at<T>(p.dx, start + c), dx, count);
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
