// layer_norm_modulate for one instruction set. A row is read from memory once and three times from
// the first-level cache: sum, squares about the mean, result. Short rows go by blocks, so that the
// end of one row's sum, a chain of dependent instructions, hides behind the work of the others.
#include "layer_norm_modulate.h"

#include "norm/rows.h"
#include "norm/statistics.h"
#include "scratch.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

// Rows of a block, and the bytes of a block that stay in the first-level cache beside its result.
constexpr int kBlock = 4;
constexpr int64_t kBlockBytes = 20 << 10;
// Rows of a block of the gradient: two sums each are all that 16 registers hold.
constexpr int kGradBlock = kLanes == 16 ? 4 : 2;

// ---- statistics ----

// A row longer than a chunk of the first-level cache.
template <typename T>
VITKIT_INLINE void long_statistics(const T* x, int64_t n, float eps, float* mean, float* rstd) {
  Moments moments;
  add_values(moments, x, n);
  *mean = float(moments.mean);
  *rstd = float(1. / __builtin_sqrt(moments.m2 / moments.count + double(eps)));
}

// ---- gain and offset of a segment ----
//
// y = xhat * gain + offset with gain = weight * (1 + scale), offset = bias * (1 + scale) + shift;
// a modulation per token is not in them.

struct Affine {
  float *gain, *offset;
};

template <bool kSplit>
VITKIT_INLINE void fill_affine(const LayerNormShape& s, int64_t segment, Affine to) {
  const int64_t n = s.width;
  copy_row(s.weight, 0, n, 1.f, to.gain);
  copy_row(s.bias, 0, n, 0.f, to.offset);
  if (!s.per_token && s.scale.data != nullptr)
    each_of_row(s.scale, segment, n, [&](int64_t i, f32v scale, auto count) {
      store_partial(to.gain + i, load_partial(to.gain + i, count) * (1.f + scale), count);
      store_partial(to.offset + i, load_partial(to.offset + i, count) * (1.f + scale), count);
    });
  if (!s.per_token && s.shift.data != nullptr)
    each_of_row(s.shift, segment, n, [&](int64_t i, f32v shift, auto count) {
      store_partial(to.offset + i, load_partial(to.offset + i, count) + shift, count);
    });
  if constexpr (kSplit) {
    split_pairs(to.gain, n);
    split_pairs(to.offset, n);
  }
}

VITKIT_INLINE bool has_affine(const LayerNormShape& s) {
  return s.weight.data != nullptr || s.bias.data != nullptr || s.scale.data != nullptr ||
         s.shift.data != nullptr;
}

VITKIT_INLINE Affine affine_scratch(int64_t width) {
  float* memory = static_cast<float*>(thread_scratch(size_t(width) * 2 * sizeof(float)));
  return {memory, memory + width};
}

// ---- forward ----

// The modulation of one token; null pointers where absent.
template <typename M>
struct Token {
  const M *shift, *scale;

  VITKIT_INLINE Token of(const LayerNormShape& s, int64_t row) {
    return {s.shift.data ? at<M>(s.shift.data, row * s.shift.stride) : nullptr,
            s.scale.data ? at<M>(s.scale.data, row * s.scale.stride) : nullptr};
  }
};

// xhat = x * factor + term. bfloat16 values far from 0 lie apart accordingly: what the product's
// rounding costs is far below theirs, so that xhat may be one multiply-add. Others are centred
// first.
template <typename T>
VITKIT_INLINE f32v normalised(f32v x, f32v mean, f32v rstd, f32v term) {
  if constexpr (std::is_same_v<T, bf16>) return fma(x, rstd, term);
  return (x - mean) * rstd;
}

// R rows side by side, so that gain and offset are read once for all of them.
template <typename T, typename M, bool kToken, bool kAffine, int R>
VITKIT_INLINE void write_block(const LayerNormForward& p, int64_t row, Affine affine) {
  constexpr bool kSplit = kIsSplit<T, M>;
  const int64_t n = p.shape.width;
  const T* x = at<T>(p.x, row * n);
  T* y = at<T>(p.y, row * n);
  f32v mean[R], rstd[R], term[R];
  Token<M> token[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = splat(p.mean[row + r]);
    rstd[r] = splat(p.rstd[row + r]);
    term[r] = -mean[r] * rstd[r];
    if constexpr (kToken) token[r] = token[r].of(p.shape, row + r);
  }
  each_pair(
      n,
      [&](int64_t i) {
        f32v gain = {}, hain = {}, offset = {}, pffset = {};
        if constexpr (kAffine) {
          gain = load(affine.gain + i);
          hain = load(affine.gain + i + kLanes);
          offset = load(affine.offset + i);
          pffset = load(affine.offset + i + kLanes);
        }
        for (int r = 0; r < R; ++r) {
          f32v u, v;
          load_pair<kSplit>(x + r * n + i, u, v);
          u = normalised<T>(u, mean[r], rstd[r], term[r]);
          v = normalised<T>(v, mean[r], rstd[r], term[r]);
          if constexpr (kAffine) {
            u = fma(u, gain, offset);
            v = fma(v, hain, pffset);
          }
          if constexpr (kToken) {
            f32v s, t;
            if (token[r].scale != nullptr) {
              load_pair<kSplit>(token[r].scale + i, s, t);
              u = fma(u, s, u);
              v = fma(v, t, v);
            }
            if (token[r].shift != nullptr) {
              load_pair<kSplit>(token[r].shift + i, s, t);
              u += s;
              v += t;
            }
          }
          store_pair<kSplit>(y + r * n + i, u, v);
        }
      },
      [&](int64_t i, auto count) {
        for (int r = 0; r < R; ++r) {
          f32v u = normalised<T>(load_partial(x + r * n + i, count), mean[r], rstd[r], term[r]);
          if constexpr (kAffine)
            u = fma(u, load_partial(affine.gain + i, count),
                    load_partial(affine.offset + i, count));
          if constexpr (kToken) {
            if (token[r].scale != nullptr) u = fma(u, load_partial(token[r].scale + i, count), u);
            if (token[r].shift != nullptr) u += load_partial(token[r].shift + i, count);
          }
          store_partial(y + r * n + i, u, count);
        }
      });
}

template <typename T, typename M, bool kToken, bool kAffine>
void forward_rows(const LayerNormForward& p, int64_t begin, int64_t end) {
  const LayerNormShape& s = p.shape;
  const int64_t n = s.width;
  const bool by_blocks = n * int64_t(sizeof(T)) * kBlock <= kBlockBytes;
  const Affine affine = affine_scratch(n);
  for (int64_t row = begin, prepared = -1; row < end;) {
    const int64_t segment = row / s.rows, stop = (segment + 1) * s.rows;
    if (kAffine && segment != prepared) fill_affine<kIsSplit<T, M>>(s, segment, affine);
    prepared = segment;
    const int64_t left = (stop < end ? stop : end) - row;
    const T* x = at<T>(p.x, row * n);
    float *mean = p.mean + row, *rstd = p.rstd + row;
    if (by_blocks && left >= kBlock) {
      block_statistics<T, kBlock>(x, n, n, p.eps, mean, rstd);
      write_block<T, M, kToken, kAffine, kBlock>(p, row, affine);
      row += kBlock;
      continue;
    }
    if (n <= kStatisticsChunk) {
      block_statistics<T, 1>(x, n, n, p.eps, mean, rstd);
    } else {
      long_statistics(x, n, p.eps, mean, rstd);
    }
    write_block<T, M, kToken, kAffine, 1>(p, row++, affine);
  }
}

// ---- backward ----
//
// dz = grad * (1 + scale of the token), h = dz * gain, c1 and c2 the means of h and h * xhat over
// the row:  dx = rstd * (h - c1 - xhat * c2)

struct Sums {
  float *dz, *dz_xhat;
};

// R rows: their c1 and c2, their share of the column sums, and dscale of their tokens.
template <typename T, typename M, bool kToken, bool kSums, int R>
VITKIT_INLINE void sum_block(const LayerNormBackward& p, int64_t row, Affine affine, Sums sums,
                             float* c1, float* c2) {
  constexpr bool kSplit = kIsSplit<T, M>;
  const LayerNormShape& s = p.shape;
  const int64_t n = s.width;
  const T *x = at<T>(p.x, row * n), *grad = at<T>(p.grad, row * n);
  f32v mean[R], rstd[R], a[2 * R] = {}, *const b = a + R;
  Token<M> token[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = splat(p.mean[row + r]);
    rstd[r] = splat(p.rstd[row + r]);
    if constexpr (kToken) token[r] = token[r].of(s, row + r);
  }
  M* const dscale = kToken && p.dscale != nullptr ? at<M>(p.dscale, row * n) : nullptr;
  // One vector of row r: adds to the sums of the row, returns dz and dz * xhat.
  const auto add = [&](int r, f32v v, f32v dz, f32v gain, f32v& dz_xhat) {
    const f32v xhat = (v - mean[r]) * rstd[r];
    dz_xhat = dz * xhat;
    a[r] = fma(dz, gain, a[r]);
    b[r] = fma(dz_xhat, gain, b[r]);
  };
  each_pair(
      n,
      [&](int64_t i) {
        f32v s1 = {}, t1 = {}, s2 = {}, t2 = {}, gain = splat(1.f), hain = gain;
        if constexpr (kSums || kToken) {
          gain = load(affine.gain + i);
          hain = load(affine.gain + i + kLanes);
        }
        if constexpr (kSums) {
          s1 = load(sums.dz + i);
          t1 = load(sums.dz + i + kLanes);
          s2 = load(sums.dz_xhat + i);
          t2 = load(sums.dz_xhat + i + kLanes);
        }
        for (int r = 0; r < R; ++r) {
          f32v v, w, g, h, vx, wx;
          load_pair<kSplit>(x + r * n + i, v, w);
          load_pair<kSplit>(grad + r * n + i, g, h);
          if constexpr (kToken) {
            if (token[r].scale != nullptr) {
              f32v q, u;
              if (dscale != nullptr) {
                q = fma((v - mean[r]) * rstd[r], gain, load(affine.offset + i));
                u = fma((w - mean[r]) * rstd[r], hain, load(affine.offset + i + kLanes));
                store_pair<kSplit>(dscale + r * n + i, g * q, h * u);
              }
              load_pair<kSplit>(token[r].scale + i, q, u);
              g = fma(g, q, g);
              h = fma(h, u, h);
            }
          }
          add(r, v, g, gain, vx);
          add(r, w, h, hain, wx);
          s1 += g;
          t1 += h;
          s2 += vx;
          t2 += wx;
        }
        if constexpr (kSums) {
          store(sums.dz + i, s1);
          store(sums.dz + i + kLanes, t1);
          store(sums.dz_xhat + i, s2);
          store(sums.dz_xhat + i + kLanes, t2);
        }
      },
      [&](int64_t i, auto count) {
        const f32v gain = kSums || kToken ? load_partial(affine.gain + i, count) : splat(1.f);
        for (int r = 0; r < R; ++r) {
          const f32v v = load_partial(x + r * n + i, count);
          f32v g = load_partial(grad + r * n + i, count), vx;
          if constexpr (kToken) {
            if (token[r].scale != nullptr) {
              const f32v z =
                  fma((v - mean[r]) * rstd[r], gain, load_partial(affine.offset + i, count));
              if (dscale != nullptr) store_partial(dscale + r * n + i, g * z, count);
              g = fma(g, load_partial(token[r].scale + i, count), g);
            }
          }
          add(r, v, g, gain, vx);
          if constexpr (kSums) {
            store_partial(sums.dz + i, load_partial(sums.dz + i, count) + g, count);
            store_partial(sums.dz_xhat + i, load_partial(sums.dz_xhat + i, count) + vx, count);
          }
        }
      });
  float means[2 * R];
  reduce_rows<2 * R>(a, means);
  for (int r = 0; r < R; ++r) {
    c1[r] = means[r] / float(n);
    c2[r] = means[R + r] / float(n);
  }
}

template <typename T, typename M, bool kToken, bool kSums>
VITKIT_INLINE void write_gradient(const LayerNormBackward& p, int64_t row, Affine affine, float c1,
                                  float c2) {
  constexpr bool kSplit = kIsSplit<T, M>;
  const int64_t n = p.shape.width;
  const T *x = at<T>(p.x, row * n), *grad = at<T>(p.grad, row * n);
  T* dx = at<T>(p.dx, row * n);
  const f32v mean = splat(p.mean[row]), rstd = splat(p.rstd[row]);
  const f32v v1 = splat(c1), v2 = splat(c2);
  Token<M> token{};
  if constexpr (kToken) token = token.of(p.shape, row);
  const auto combine = [&](f32v v, f32v h) { return (h - v1 - (v - mean) * rstd * v2) * rstd; };
  each_pair(
      n,
      [&](int64_t i) {
        f32v v, w, g, h;
        load_pair<kSplit>(x + i, v, w);
        load_pair<kSplit>(grad + i, g, h);
        if constexpr (kToken) {
          if (token.scale != nullptr) {
            f32v q, u;
            load_pair<kSplit>(token.scale + i, q, u);
            g = fma(g, q, g);
            h = fma(h, u, h);
          }
        }
        if constexpr (kSums || kToken) {
          g *= load(affine.gain + i);
          h *= load(affine.gain + i + kLanes);
        }
        store_pair<kSplit>(dx + i, combine(v, g), combine(w, h));
      },
      [&](int64_t i, auto count) {
        const f32v v = load_partial(x + i, count);
        f32v g = load_partial(grad + i, count);
        if constexpr (kToken) {
          if (token.scale != nullptr) g = fma(g, load_partial(token.scale + i, count), g);
        }
        if constexpr (kSums || kToken) g *= load_partial(affine.gain + i, count);
        store_partial(dx + i, combine(v, g), count);
      });
}

template <typename T, typename M, bool kToken, bool kSums>
void backward_parts(const LayerNormBackward& p, int64_t begin, int64_t end) {
  const LayerNormShape& s = p.shape;
  const int64_t n = s.width;
  const Affine affine = affine_scratch(n);
  for (int64_t item = begin, prepared = -1; item < end; ++item) {
    const int64_t segment = item / p.parts, part = item % p.parts;
    if ((kSums || kToken) && segment != prepared) fill_affine<kIsSplit<T, M>>(s, segment, affine);
    prepared = segment;
    Sums sums{};
    if constexpr (kSums) {
      sums = {p.partial + item * 2 * n, p.partial + (item * 2 + 1) * n};
      fill(sums.dz, 2 * n, 0.f);
    }
    const int64_t first = segment * s.rows;
    int64_t row = first + s.rows * part / p.parts;
    const int64_t stop = first + s.rows * (part + 1) / p.parts;
    while (row < stop) {
      float c1[kGradBlock], c2[kGradBlock];
      int count = 1;
      if (stop - row >= kGradBlock) {
        count = kGradBlock;
        sum_block<T, M, kToken, kSums, kGradBlock>(p, row, affine, sums, c1, c2);
      } else {
        sum_block<T, M, kToken, kSums, 1>(p, row, affine, sums, c1, c2);
      }
      for (int r = 0; r < count; ++r, ++row)
        write_gradient<T, M, kToken, kSums>(p, row, affine, c1[r], c2[r]);
    }
    if constexpr (kSums && kIsSplit<T, M>) {
      join_pairs(sums.dz, n);
      join_pairs(sums.dz_xhat, n);
    }
  }
}

void merge_parts(const LayerNormBackward& p, int64_t begin, int64_t end) {
  const int64_t n = 2 * p.shape.width;
  for (int64_t segment = begin; segment < end; ++segment) {
    float* to = p.sums + segment * n;
    fill(to, n, 0.f);
    for (int64_t part = 0; part < p.parts; ++part) {
      const float* from = p.partial + (segment * p.parts + part) * n;
      for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    }
  }
}

// ---- dispatch ----

// f(element, element of the modulation per token, whether there is one)
template <typename F>
void dispatch(const LayerNormShape& s, const F& f) {
  const NormElement token = s.scale.data != nullptr ? s.scale.element : s.shift.element;
  with_elements(s.element, s.per_token ? token : s.element, [&](auto x, auto m) {
    if (s.per_token) return f(x, m, std::true_type{});
    if constexpr (std::is_same_v<decltype(x), decltype(m)>) f(x, m, std::false_type{});
  });
}

void forward(const LayerNormForward& p, int64_t begin, int64_t end) {
  dispatch(p.shape, [&](auto x, auto m, auto token) {
    using T = decltype(x);
    using Token = decltype(token);
    if (Token::value || has_affine(p.shape)) {
      forward_rows<T, decltype(m), Token::value, true>(p, begin, end);
    } else {
      forward_rows<T, decltype(m), Token::value, Token::value>(p, begin, end);
    }
  });
}

void backward(const LayerNormBackward& p, int64_t begin, int64_t end) {
  dispatch(p.shape, [&](auto x, auto m, auto token) {
    using T = decltype(x);
    using Token = decltype(token);
    if (p.partial != nullptr) {
      backward_parts<T, decltype(m), Token::value, true>(p, begin, end);
    } else {
      backward_parts<T, decltype(m), Token::value, false>(p, begin, end);
    }
  });
}

}  // namespace

const LayerNormKernels& layer_norm_kernels() {
  static constexpr LayerNormKernels kernels{forward, backward, merge_parts};
  return kernels;
}

}  // namespace vitkit::cpu::VITKIT_ISA
