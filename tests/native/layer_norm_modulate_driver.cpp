// Runs layer_norm_modulate's CPU kernels of one instruction set, without PyTorch, against float64.
//
// Compiled together with csrc/cpu/layer_norm_modulate_kernel.cpp and the same -DVITKIT_ISA and
// flags. Every case checks y, mean, rstd, dx, the gradient of a scale per token and the sums of
// each column by the project's rule. Tensors lie before a canary, outputs start as NaN, and the
// work is done twice, in one piece and item by item backwards, which must agree bit by bit.
//
//   layer_norm_modulate_driver [substring of a case name]      exit code 0: every case passed
#include "driver.h"

#include "layer_norm_modulate.h"

namespace vitkit::cpu::VITKIT_ISA {
const LayerNormKernels& layer_norm_kernels();
}

using namespace vitkit::cpu;
using namespace driver;

namespace {

enum class Modulation { none, sample, token };

struct Case {
  std::string name;
  ElementType type = ElementType::f32, small = ElementType::f32;
  int64_t segments = 1, rows = 5, width = 8, parts = 2;
  bool affine = true;
  Modulation modulation = Modulation::none;
  bool scaled = true, shifted = true;
  double offset = 0, magnitude = 1;
  int64_t nan_at = -1;
};

struct Truth {
  std::vector<double> y, mean, rstd, dx, dscale, sums;
};

NormElement element_of(ElementType t) {
  return t == ElementType::bf16  ? NormElement::bf16
         : t == ElementType::f16 ? NormElement::f16
                                 : NormElement::f32;
}

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        x_(c.type, elements(), [&] { return c.offset + c.magnitude * normal(); }),
        grad_(c.type, elements(), normal),
        weight_(c.small, c.width, [] { return 1 + 0.3 * normal(); }),
        bias_(c.small, c.width, [] { return 0.3 * normal(); }),
        scale_(c.small, modulations() * stride(), [] { return 0.3 * normal(); }),
        shift_(c.small, modulations() * stride(), [] { return 0.3 * normal(); }) {
    if (c.nan_at >= 0) x_.set(c.nan_at, NAN);
    exact_ = compute([](double v) { return v; }, false);
    plain_ = compute([](double v) { return double(float(v)); }, true);
  }

  bool check() {
    const Result once = run(false), again = run(true);
    bool ok = x_.intact() && grad_.intact() && once.y.intact() && once.dx.intact() &&
              once.dscale.intact();
    if (!ok) std::printf("  canary overwritten\n");
    if (!(once.y == again.y && once.dx == again.dx && once.dscale == again.dscale &&
          same(once.stats, again.stats) && same(once.sums, again.sums))) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    const double n = double(c_.width), eps = kEps[int(c_.type)], eps32 = kEps[0];
    const auto element = [](const Array& a) { return [&a](size_t i) { return a.at(int64_t(i)); }; };
    ok &= compare("y", element(once.y), exact_.y, plain_.y, eps, n);
    ok &= compare("dx", element(once.dx), exact_.dx, plain_.dx, eps, n);
    if (c_.modulation == Modulation::token && c_.scaled)
      ok &= compare("dscale", element(once.dscale), exact_.dscale, plain_.dscale,
                    kEps[int(c_.small)], 1);
    // A mean near 0 is a sum that cancels: what counts is the size of its terms.
    const double size = c_.magnitude + std::fabs(c_.offset);
    const size_t total = exact_.mean.size();
    ok &= compare(
        "mean", [&](size_t i) { return once.stats[i]; }, exact_.mean, plain_.mean, eps32, n, size);
    ok &= compare(
        "rstd", [&](size_t i) { return once.stats[total + i]; }, exact_.rstd, plain_.rstd, eps32,
        n);
    // Likewise the sums.
    const double terms = double(c_.rows);
    if (has_sums())
      ok &= compare(
          "sums", [&](size_t i) { return once.sums[i]; }, exact_.sums, plain_.sums, eps, terms,
          std::sqrt(terms));
    return ok;
  }

 private:
  struct Result {
    Array y, dx, dscale;
    std::vector<float> stats, sums;
  };

  int64_t elements() const { return c_.segments * c_.rows * c_.width; }
  // Rows of a modulation lie further apart than they are long, as the parts of a chunk do.
  int64_t stride() const { return c_.width + 3; }
  int64_t modulations() const {
    return c_.modulation == Modulation::token ? c_.segments * c_.rows : c_.segments;
  }
  bool has_sums() const { return c_.affine || c_.modulation == Modulation::sample; }
  bool has(Modulation m) const { return c_.modulation == m; }

  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }

  template <typename Get>
  static bool compare(const char* name, const Get& get, const std::vector<double>& exact,
                      const std::vector<double>& plain, double eps, double terms, double size = 0) {
    Error ours, theirs;
    ours.peak = size;
    ours.norm = size * size * double(exact.size());
    for (size_t i = 0; i < exact.size(); ++i) {
      ours.add(get(i), exact[i]);
      theirs.add(plain[i], exact[i]);
    }
    return report(name, ours, theirs, eps, terms);
  }

  // `round` after every operation, results in the element type if `rounded`.
  template <typename Round>
  Truth compute(const Round& round, bool rounded) const {
    const auto result = [&](ElementType t, double v) { return rounded ? round_to(t, v) : v; };
    Truth t;
    t.sums.assign(size_t(c_.segments * 2 * c_.width), 0.);
    const int64_t n = c_.width;
    for (int64_t row = 0; row < c_.segments * c_.rows; ++row) {
      const int64_t segment = row / c_.rows;
      const int64_t m = (has(Modulation::token) ? row : segment) * stride();
      const auto at = [&](int64_t e) { return x_.at(row * n + e); };
      double mean = 0, square = 0;
      for (int64_t e = 0; e < n; ++e) mean += at(e) / double(n);
      mean = round(mean);
      for (int64_t e = 0; e < n; ++e) square += std::pow(round(at(e) - mean), 2) / double(n);
      const double rstd = round(1 / std::sqrt(square + kEpsilon));
      t.mean.push_back(mean);
      t.rstd.push_back(rstd);
      double c1 = 0, c2 = 0;
      std::vector<double> h, xhat;
      for (int64_t e = 0; e < n; ++e) {
        const double weight = c_.affine ? weight_.at(e) : 1, bias = c_.affine ? bias_.at(e) : 0;
        const bool modulated = !has(Modulation::none);
        const double scale = modulated && c_.scaled ? scale_.at(m + e) : 0;
        const double shift = modulated && c_.shifted ? shift_.at(m + e) : 0;
        const double xh = round(round(at(e) - mean) * rstd), z = round(xh * weight + bias);
        t.y.push_back(result(c_.type, round(round(z * (1 + scale)) + shift)));
        const double g = grad_.at(row * n + e);
        t.dscale.push_back(result(c_.small, round(g * z)));
        const double dz = has(Modulation::token) ? round(g * (1 + scale)) : g;
        t.sums[size_t(segment * 2 * n + e)] += dz;
        t.sums[size_t((segment * 2 + 1) * n + e)] += dz * xh;
        h.push_back(round(g * (1 + scale) * weight));
        xhat.push_back(xh);
        c1 += h.back() / double(n);
        c2 += h.back() * xh / double(n);
      }
      for (size_t e = 0; e < size_t(n); ++e)
        t.dx.push_back(result(c_.type, round(round(h[e] - c1 - round(xhat[e] * c2)) * rstd)));
    }
    return t;
  }

  Result run(bool piecewise) {
    const auto nan = [] { return double(NAN); };
    const int64_t total = c_.segments * c_.rows;
    Result r{Array(c_.type, elements(), nan), Array(c_.type, elements(), nan),
             Array(c_.small, elements(), nan), std::vector<float>(size_t(2 * total), NAN),
             std::vector<float>(size_t(c_.segments * 2 * c_.width), NAN)};
    const auto rows = [&](bool there, Array& a, int64_t stride) {
      return there ? Rows{a.data(), element_of(c_.small), stride} : Rows{};
    };
    const bool modulated = !has(Modulation::none);
    const LayerNormShape shape{element_of(c_.type),
                               c_.segments,
                               c_.rows,
                               c_.width,
                               rows(c_.affine, weight_, 0),
                               rows(c_.affine, bias_, 0),
                               rows(modulated && c_.shifted, shift_, stride()),
                               rows(modulated && c_.scaled, scale_, stride()),
                               has(Modulation::token)};
    const auto items = [&](int64_t count, auto&& f, const auto& params) {
      if (!piecewise) return f(params, 0, count);
      for (int64_t i = count; i-- > 0;) f(params, i, i + 1);
    };
    float* stats = r.stats.data();
    const LayerNormForward f{shape, float(kEpsilon), x_.data(), r.y.data(), stats, stats + total};
    const LayerNormKernels& kernels = isa::layer_norm_kernels();
    items(total, kernels.forward, f);
    std::vector<float> partial(size_t(c_.segments * c_.parts * 2 * c_.width), NAN);
    const LayerNormBackward b{shape,
                              x_.data(),
                              grad_.data(),
                              r.dx.data(),
                              has(Modulation::token) && c_.scaled ? r.dscale.data() : nullptr,
                              stats,
                              stats + total,
                              has_sums() ? partial.data() : nullptr,
                              has_sums() ? r.sums.data() : nullptr,
                              c_.parts};
    items(c_.segments * c_.parts, kernels.backward, b);
    if (has_sums()) items(c_.segments, kernels.merge, b);
    return r;
  }

  static constexpr double kEpsilon = 1e-6;
  Case c_;
  Array x_, grad_, weight_, bias_, scale_, shift_;
  Truth exact_, plain_;
};

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, int64_t width) -> Case& {
    Case c;
    c.name = std::string(kTypeNames[int(type)]) + "/" + name;
    c.type = c.small = type;
    c.width = width;
    all.push_back(c);
    return all.back();
  };
  for (int64_t n : {3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100, 197})
    add("width_" + std::to_string(n), n).affine = n % 3;
  add("blocks_and_rest", 48).rows = 11;
  Case& wide = add("wider_than_a_block", 3000);
  wide.rows = 5;
  add("wider_than_a_chunk", 4099).rows = 2;
  Case& float_affine = add("float32_affine", 70);
  float_affine.small = ElementType::f32;
  for (const bool token : {false, true}) {
    const std::string kind = token ? "token" : "sample";
    for (int64_t n : {33, 64}) {
      Case& c = add(kind + "_" + std::to_string(n), n);
      c.modulation = token ? Modulation::token : Modulation::sample;
      c.segments = 3;
      c.rows = 6;
      c.affine = n == 33;
      Case mixed = c;
      mixed.name += "_float32";
      mixed.small = ElementType::f32;
      Case shift = c, scale = c;
      shift.name += "_shift_only";
      shift.scaled = false;
      scale.name += "_scale_only";
      scale.shifted = false;
      all.insert(all.end(), {mixed, shift, scale});
    }
  }
  Case& parts = add("parts", 40);
  parts.rows = 37;
  parts.parts = 5;
  add("more_parts_than_rows", 40).parts = 9;
  add("large_offset", 200).offset = 10;
  add("large_values", 200).magnitude = 50;
  add("nan", 70).nan_at = 5;
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
