// Runs window_attention's CPU kernels of one instruction set, forward and gradient, without
// PyTorch, against float64.
//
// Compiled together with csrc/cpu/window_attention*_kernel.cpp and the same -DVITKIT_ISA and flags;
// with -DVITKIT_EMULATE_AMX also where there is no AMX. Every case checks out, lse and all
// gradients by the project's rule, the yardstick being the formula in the element type with a
// rounding after every operation. Tokens of windows, regions and the bias are looked up pair by
// pair, as the formula says. Inputs and outputs lie before a canary, scratch, sums and outputs
// start as NaN, and the work is done twice, in two different splits, which must agree bit by bit.
//
//   window_attention_driver [substring of a case name]      exit code 0: every case passed
#include <algorithm>
#include <memory>
#include <utility>

#include "attention/window_table.h"
#include "driver.h"

namespace vitkit::cpu::VITKIT_ISA {
const WindowForwardKernels& window_forward_kernels();
const WindowBackwardKernels& window_backward_kernels();
}  // namespace vitkit::cpu::VITKIT_ISA

using namespace vitkit::cpu;
using namespace driver;

namespace {

struct Case {
  std::string name;
  ElementType type = ElementType::f32;
  int64_t batch = 1, heads = 2, head_dim = 16;
  WindowGrid grid{8, 8, 4, 4, 0, 0, false};
  bool table = true, cosine = false, pad_value = true;
  double scale = 0;  // 0: 1 / sqrt(head_dim)
  double logit_scale = 2.3;
  int64_t parts = 3;
  bool strided = false;  // heads far apart, as of a permuted tensor
  int64_t nan_token = -1, zero_token = -1;
};

// Everything a case computes, in double.
struct Results {
  std::vector<double> out, lse, dqkv, table, logit_scale, pad_value;
};

// Where the parts of a row of qkv are, of token -1 in pad_value.
struct Row {
  const Array* values;
  int64_t at;
  double operator[](int64_t d) const { return values->at(at + d); }
};

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        qkv_(c.type, tokens() * row_stride() * (c.strided ? 2 : 1), normal),
        grad_(c.type, tokens() * channels(), normal),
        pad_value_(c.type, 3 * channels(), [&] { return c.pad_value ? normal() : 0; }),
        table_(ElementType::f32, table_rows() * c.heads,
               [&] { return c.table ? round_to(c.type, normal()) : 0; }),
        logit_scale_(ElementType::f32, c.heads, [&] { return c.logit_scale + 0.3 * normal(); }) {
    for (int64_t d = 0; d < c.head_dim; ++d) {
      if (c.nan_token >= 0 && d == 3) qkv_.set(row(c.nan_token, 1, 0).at + d, NAN);
      for (int64_t part = 0; c.zero_token >= 0 && part < 2; ++part)
        qkv_.set(row(c.zero_token, part, 0).at + d, 0);
    }
    exact_ = compute(false);
    plain_ = compute(true);
  }

  bool check() {
    const Result a = run(false), b = run(true);
    bool ok = qkv_.intact() && grad_.intact() && pad_value_.intact() && table_.intact();
    for (const Result* r : {&a, &b}) ok &= r->out.intact() && r->lse.intact() && r->dqkv.intact();
    if (!ok) std::printf("  canary overwritten\n");
    if (!(a.out == b.out && a.lse == b.lse && a.dqkv == b.dqkv) || !same(a.table, b.table) ||
        !same(a.logit_scale, b.logit_scale) || !same(a.pad_value, b.pad_value)) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    const double terms = double(c_.grid.places() * c_.head_dim);
    const double windows = double(c_.batch * c_.grid.windows());
    const auto tensor = [](const Array& t) { return [&](size_t i) { return t.at(int64_t(i)); }; };
    const auto sums = [](const std::vector<float>& t) {
      return [&](size_t i) { return double(t[i]); };
    };
    ok &= compare("out", tensor(a.out), &Results::out, terms);
    ok &= compare("lse", tensor(a.lse), &Results::lse, terms);
    ok &= compare("dqkv", tensor(a.dqkv), &Results::dqkv, 3 * terms);
    if (c_.table) ok &= compare("dtable", sums(a.table), &Results::table, 3 * terms * windows);
    if (c_.cosine)
      ok &= compare("dlogit_scale", sums(a.logit_scale), &Results::logit_scale,
                    3 * terms * windows * double(c_.grid.places()));
    if (c_.pad_value && !c_.grid.divides())
      ok &= compare("dpad_value", sums(a.pad_value), &Results::pad_value, 3 * terms * windows);
    return ok;
  }

 private:
  struct Result {
    Array out, lse, dqkv;
    std::vector<float> table, logit_scale, pad_value;  // pad_value: [heads, 2, D]
  };

  int64_t tokens() const { return c_.batch * c_.grid.height * c_.grid.width; }
  int64_t channels() const { return c_.heads * c_.head_dim; }
  int64_t row_stride() const { return 3 * channels(); }
  int64_t table_rows() const { return (2 * c_.grid.wh - 1) * (2 * c_.grid.ww - 1); }
  double scale() const {
    return c_.cosine ? 1 : float(c_.scale == 0 ? 1 / std::sqrt(double(c_.head_dim)) : c_.scale);
  }

  // Strided: [B, heads, 3, H, W, D] with every other row unused; otherwise [B, H, W, 3, heads, D].
  int64_t head_stride() const { return c_.strided ? 3 * part_stride() : c_.head_dim; }
  int64_t part_stride() const {
    return c_.strided ? c_.grid.height * c_.grid.width * 2 * c_.head_dim : channels();
  }
  int64_t token_stride() const { return c_.strided ? 2 * c_.head_dim : row_stride(); }
  int64_t batch_stride() const {
    return c_.strided ? c_.heads * head_stride() : c_.grid.height * c_.grid.width * row_stride();
  }

  Row row(int64_t token, int64_t part, int64_t h) const {
    if (token < 0) return {&pad_value_, part * channels() + h * c_.head_dim};
    const int64_t map = c_.grid.height * c_.grid.width;
    return {&qkv_, token / map * batch_stride() + token % map * token_stride() +
                       part * part_stride() + h * head_stride()};
  }

  // Token of place (y, x) of the shifted grid of batch element b.
  int64_t token(int64_t b, int64_t y, int64_t x) const {
    const WindowGrid& g = c_.grid;
    const int64_t hp = g.rows() * g.wh, wp = g.columns() * g.ww;
    int64_t from_y = (y + g.sh) % hp, from_x = (x + g.sw) % wp;
    if (g.roll_first) {
      if (y >= g.height || x >= g.width) return -1;
      from_y = (y + g.sh) % g.height;
      from_x = (x + g.sw) % g.width;
    }
    if (from_y >= g.height || from_x >= g.width) return -1;
    return (b * g.height + from_y) * g.width + from_x;
  }
  static int64_t region(int64_t y, int64_t padded, int64_t window, int64_t shift) {
    return shift == 0 ? 0 : (y >= padded - window) + (y >= padded - shift);
  }

  Results compute(bool plain) const {
    Results r;
    r.out.assign(size_t(tokens() * channels()), 0);
    r.lse.assign(size_t(tokens() * c_.heads), 0);
    r.dqkv.assign(size_t(tokens() * row_stride()), 0);
    r.table.assign(size_t(table_rows() * c_.heads), 0);
    r.logit_scale.assign(size_t(c_.heads), 0);
    r.pad_value.assign(size_t(2 * channels()), 0);
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t wy = 0; wy < c_.grid.rows(); ++wy)
        for (int64_t wx = 0; wx < c_.grid.columns(); ++wx)
          for (int64_t h = 0; h < c_.heads; ++h) window(b, wy, wx, h, plain, r);
    return r;
  }

  // One head of a window; plain: sums in float, rounded to the element type after every operation.
  void window(int64_t b, int64_t wy, int64_t wx, int64_t h, bool plain, Results& r) const {
    const WindowGrid& g = c_.grid;
    const int64_t n = g.places(), d = c_.head_dim;
    const auto rounded = [&](double x) { return plain ? round_to(c_.type, x) : x; };
    const auto add = [&](double& sum, double x) {
      sum = plain ? double(float(sum) + float(x)) : sum + x;
    };
    std::vector<int64_t> at(static_cast<size_t>(n)), area(at);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t y = wy * g.wh + j / g.ww, x = wx * g.ww + j % g.ww;
      at[size_t(j)] = token(b, y, x);
      area[size_t(j)] =
          3 * region(y, g.rows() * g.wh, g.wh, g.sh) + region(x, g.columns() * g.ww, g.ww, g.sw);
    }
    // Rows that are multiplied: of V2 the directions, with their lengths.
    std::vector<double> q(size_t(n * d)), k(q), v(q), q_length(size_t(n), 1), k_length(q_length);
    for (int64_t j = 0; j < n; ++j) {
      double squares[2] = {};
      for (int64_t e = 0; e < d; ++e) {
        q[size_t(j * d + e)] = row(at[size_t(j)], 0, h)[e];
        k[size_t(j * d + e)] = row(at[size_t(j)], 1, h)[e];
        v[size_t(j * d + e)] = row(at[size_t(j)], 2, h)[e];
        squares[0] += q[size_t(j * d + e)] * q[size_t(j * d + e)];
        squares[1] += k[size_t(j * d + e)] * k[size_t(j * d + e)];
      }
      if (!c_.cosine) continue;
      q_length[size_t(j)] = std::max(std::sqrt(squares[0]), 1e-12);
      k_length[size_t(j)] = std::max(std::sqrt(squares[1]), 1e-12);
      for (int64_t e = 0; e < d; ++e) {
        q[size_t(j * d + e)] = rounded(q[size_t(j * d + e)] / q_length[size_t(j)]);
        k[size_t(j * d + e)] = rounded(k[size_t(j * d + e)] / k_length[size_t(j)]);
      }
    }
    const double logit = logit_scale_.at(h), most = std::log(100.);
    const double gain = c_.cosine ? rounded(std::exp(std::min(logit, most))) : scale();
    std::vector<double> dq(size_t(n * d)), dk(dq), dv(dq), p(static_cast<size_t>(n)), raw(p), dp(p);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = at[size_t(i)];
      if (t < 0) continue;
      double top = -kInf, total = 0, delta = 0;
      std::fill(dp.begin(), dp.end(), 0);
      for (int64_t j = 0; j < n; ++j) {
        double& s = raw[size_t(j)] = 0;
        for (int64_t e = 0; e < d; ++e) {
          add(s, q[size_t(i * d + e)] * k[size_t(j * d + e)]);
          add(dp[size_t(j)], grad_.at(t * channels() + h * d + e) * v[size_t(j * d + e)]);
        }
        s = rounded(s);
        dp[size_t(j)] = rounded(dp[size_t(j)]);
        const double bias = table_.at(table_row(i, j) * c_.heads + h);
        p[size_t(j)] = rounded(rounded(s * gain) + bias);
        if (area[size_t(i)] != area[size_t(j)]) p[size_t(j)] = rounded(p[size_t(j)] - 100);
        top = std::isnan(p[size_t(j)]) ? p[size_t(j)] : std::fmax(top, p[size_t(j)]);
      }
      for (double& x : p) add(total, x = std::exp(x - top));
      r.lse[size_t(t * c_.heads + h)] = top + std::log(total);
      for (int64_t j = 0; j < n; ++j) {
        p[size_t(j)] = rounded(p[size_t(j)] / total);
        add(delta, p[size_t(j)] * dp[size_t(j)]);
      }
      for (int64_t j = 0; j < n; ++j) {
        const double ds = rounded(p[size_t(j)] * (dp[size_t(j)] - delta));
        r.table[size_t(table_row(i, j) * c_.heads + h)] += ds;
        if (c_.cosine && logit <= most) r.logit_scale[size_t(h)] += ds * gain * raw[size_t(j)];
        const double scaled = rounded(ds * gain);
        for (int64_t e = 0; e < d; ++e) {
          add(r.out[size_t(t * channels() + h * d + e)], p[size_t(j)] * v[size_t(j * d + e)]);
          add(dq[size_t(i * d + e)], scaled * k[size_t(j * d + e)]);
          add(dk[size_t(j * d + e)], scaled * q[size_t(i * d + e)]);
          add(dv[size_t(j * d + e)], p[size_t(j)] * grad_.at(t * channels() + h * d + e));
        }
      }
      for (int64_t e = 0; e < d; ++e) {
        double& x = r.out[size_t(t * channels() + h * d + e)];
        x = rounded(x);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      if (c_.cosine) {
        project(q.data() + j * d, q_length[size_t(j)], dq.data() + j * d);
        project(k.data() + j * d, k_length[size_t(j)], dk.data() + j * d);
      }
      for (int64_t e = 0; e < d; ++e) {
        const size_t x = size_t(j * d + e);
        if (const int64_t t = at[size_t(j)]; t >= 0) {
          r.dqkv[size_t(t * row_stride() + h * d + e)] = rounded(dq[x]);
          r.dqkv[size_t(t * row_stride() + channels() + h * d + e)] = rounded(dk[x]);
          r.dqkv[size_t(t * row_stride() + 2 * channels() + h * d + e)] = rounded(dv[x]);
        } else {
          r.pad_value[size_t(2 * h * d + e)] += rounded(dk[x]);
          r.pad_value[size_t((2 * h + 1) * d + e)] += rounded(dv[x]);
        }
      }
    }
  }

  int64_t table_row(int64_t i, int64_t j) const {
    const WindowGrid& g = c_.grid;
    const int64_t dy = i / g.ww - j / g.ww, dx = i % g.ww - j % g.ww;
    return (dy + g.wh - 1) * (2 * g.ww - 1) + dx + g.ww - 1;
  }

  void project(const double* direction, double length, double* dx) const {
    double along = 0;
    for (int64_t e = 0; e < c_.head_dim; ++e) along += direction[e] * dx[e];
    if (length <= 1e-12) along = 0;
    for (int64_t e = 0; e < c_.head_dim; ++e) dx[e] = (dx[e] - direction[e] * along) / length;
  }

  WindowInputs inputs(const std::vector<float>& bias) {
    return {c_.type,
            c_.grid,
            c_.batch,
            c_.heads,
            c_.head_dim,
            qkv_.data(),
            batch_stride(),
            c_.grid.width * token_stride(),
            token_stride(),
            part_stride(),
            head_stride(),
            c_.pad_value ? pad_value_.data() : nullptr,
            bias.data(),
            unfolded_stride(c_.grid),
            c_.cosine ? reinterpret_cast<const float*>(logit_scale_.data()) : nullptr,
            float(scale())};
  }

  // All items in one call, or one by one from the last to the first.
  template <typename Kernels, typename Parameters>
  static void run_items(const Kernels& kernels, const Parameters& p, int64_t items,
                        bool piecewise) {
    const Poisoned scratch(size_t(kernels.scratch_bytes(p)));
    if (!piecewise) kernels.run(p, 0, items, scratch.get());
    for (int64_t i = items; piecewise && i-- > 0;) kernels.run(p, i, i + 1, scratch.get());
  }

  Result run(bool piecewise) {
    const auto nan = [] { return double(NAN); };
    Result r{Array(c_.type, tokens() * channels(), nan),
             Array(ElementType::f32, tokens() * c_.heads, nan),
             Array(c_.type, tokens() * row_stride(), nan),
             {},
             {},
             {}};
    const int64_t stride = unfolded_stride(c_.grid);
    std::vector<float> bias(size_t(c_.heads * stride));
    for (int64_t h = 0; h < c_.heads; ++h)
      unfold_table(c_.grid, reinterpret_cast<const float*>(table_.data()) + h, c_.heads,
                   isa::kLog2e, bias.data() + h * stride);
    const WindowInputs in = inputs(bias);
    auto* lse = reinterpret_cast<float*>(r.lse.data());
    const int64_t windows = c_.batch * c_.grid.windows();
    run_items(isa::window_forward_kernels(), WindowForward{in, r.out.data(), lse},
              windows * c_.heads, piecewise);
    const int64_t parts = std::min(c_.parts, windows);
    std::vector<float> tables(size_t(parts * c_.heads * stride), NAN),
        logits(size_t(parts * c_.heads), NAN), pads(size_t(parts * 2 * channels()), NAN);
    const WindowSums sums{c_.table ? tables.data() : nullptr, c_.cosine ? logits.data() : nullptr,
                          c_.pad_value ? pads.data() : nullptr};
    run_items(isa::window_backward_kernels(),
              WindowBackward{in, r.out.data(), grad_.data(), lse, r.dqkv.data(), parts, sums},
              parts * c_.heads, piecewise);
    const std::vector<float> table = over_parts(tables, parts);
    r.table.assign(size_t(table_rows() * c_.heads), 0);
    for (int64_t h = 0; h < c_.heads; ++h)
      fold_table(c_.grid, table.data() + h * stride, c_.heads, r.table.data() + h);
    r.logit_scale = over_parts(logits, parts);
    r.pad_value = over_parts(pads, parts);
    return r;
  }

  static std::vector<float> over_parts(const std::vector<float>& sums, int64_t parts) {
    const size_t n = sums.size() / size_t(parts);
    std::vector<float> total(n, 0.f);
    for (size_t i = 0; i < sums.size(); ++i) total[i % n] += sums[i];
    return total;
  }
  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }

  template <typename Get>
  bool compare(const char* name, const Get& got, std::vector<double> Results::* member,
               double terms) const {
    Error ours, plain;
    for (size_t i = 0; i < (exact_.*member).size(); ++i) {
      ours.add(got(i), (exact_.*member)[i]);
      plain.add((plain_.*member)[i], (exact_.*member)[i]);
    }
    return report(name, ours, plain, kEps[int(c_.type)], terms);
  }

  Case c_;
  Array qkv_, grad_, pad_value_, table_, logit_scale_;
  Results exact_, plain_;
};

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, WindowGrid grid) -> Case& {
    Case c;
    c.name = std::string(kTypeNames[int(type)]) + "/" + name;
    c.type = type;
    c.grid = grid;
    all.push_back(c);
    return all.back();
  };
  for (const bool roll_first : {false, true}) {
    const std::string order = roll_first ? "_roll_first" : "";
    add("divisible" + order, {14, 14, 7, 7, 3, 3, roll_first}).batch = 2;
    add("ragged" + order, {10, 13, 7, 7, 3, 3, roll_first});
    add("ragged_v2" + order, {10, 13, 7, 7, 3, 2, roll_first}).cosine = true;
    add("window_larger_than_map" + order, {5, 4, 7, 7, 2, 5, roll_first});
    add("rectangular" + order, {9, 20, 6, 10, 5, 1, roll_first});
    add("one_axis" + order, {9, 9, 4, 4, 0, 2, roll_first}).heads = 5;
  }
  for (const int64_t window : {1, 3, 5, 8, 12}) {
    Case& c = add("window_" + std::to_string(window),
                  {window, window, window, window, window / 2, window / 2, false});
    c.cosine = window % 2;
    c.table = window > 1;  // one key has no gradient of a score: what is left is rounding
    c.cosine &= c.table;
  }
  for (const int64_t d : {8, 24, 32, 40, 64, 72, 96, 256})
    add("head_dim_" + std::to_string(d), {4, 8, 4, 4, 1, 2, false}).head_dim = d;
  add("v2", {8, 8, 4, 4, 2, 2, false}).cosine = true;
  add("v2_clamped", {8, 8, 4, 4, 2, 2, false}).logit_scale = 4.6;
  all.back().cosine = true;
  add("many_heads", {8, 4, 4, 4, 2, 2, false}).heads = 19;
  add("no_table", {8, 8, 4, 4, 2, 2, false}).table = false;
  add("zeros_as_pads", {6, 6, 4, 4, 2, 2, false}).pad_value = false;
  add("zeros_as_pads_v2", {6, 6, 4, 4, 2, 2, false}).pad_value = false;
  all.back().cosine = true;
  add("negative_scale", {8, 8, 4, 4, 2, 2, false}).scale = -0.7;
  add("strided", {7, 9, 4, 4, 2, 2, false}).strided = true;
  add("nan_token", {8, 8, 4, 4, 2, 2, false}).nan_token = 9;
  add("several_chunks", {27, 27, 27, 27, 5, 0, false}).head_dim = 8;
  if (type != ElementType::f16) {  // 1e12 is no number of float16
    add("zero_token_v2", {8, 8, 4, 4, 2, 2, false}).zero_token = 9;
    all.back().cosine = true;
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
