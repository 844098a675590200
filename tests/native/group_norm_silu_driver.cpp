// Runs group_norm_silu's CPU kernels of one instruction set, without PyTorch, against float64.
//
// Compiled together with csrc/cpu/group_norm_silu_kernel.cpp and the same -DVITKIT_ISA and flags.
// Every case checks y, mean, rstd, dx and the sums of each channel by the project's rule, in the
// way the host would call the kernels (whole groups, or parts and a merge). Tensors lie before a
// canary, outputs start as NaN, and the work is done twice, in one piece and item by item
// backwards, which must agree bit by bit.
//
//   group_norm_silu_driver [substring of a case name]      exit code 0: every case passed
#include "driver.h"

#include "group_norm_silu.h"

namespace vitkit::cpu::VITKIT_ISA {
const GroupNormKernels& group_norm_kernels();
}

using namespace vitkit::cpu;
using namespace driver;

namespace {

struct Case {
  std::string name;
  ElementType type = ElementType::f32;
  int64_t samples = 2, channels = 8, positions = 1, groups = 2;
  bool channels_last = false, silu = true, add = false;
  int64_t parts = 0;  // 0: whole groups
  double offset = 0, magnitude = 1;
  int64_t nan_at = -1;
};

struct Truth {
  std::vector<double> y, mean, rstd, dx, sums;  // sums: [samples, channels, 3]
};

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        x_(c.type, elements(), [&] { return c.offset + c.magnitude * normal(); }),
        grad_(c.type, elements(), normal) {
    if (c.nan_at >= 0) x_.set(c.nan_at, NAN);
    for (int64_t i = 0; i < c.samples * c.channels; ++i) {
      add_.push_back(float(normal()));
      gain_.push_back(float(1 + 0.3 * normal()));
      offset_.push_back(float(0.3 * normal()));
    }
    exact_ = compute([](double v) { return v; });
    plain_ = compute([&](double v) { return double(float(v)); });
  }

  bool check() {
    const Result once = run(false), again = run(true);
    bool ok = x_.intact() && grad_.intact() && once.y.intact() && once.dx.intact();
    if (!ok) std::printf("  canary overwritten\n");
    if (!(once.y == again.y && once.dx == again.dx && same(once.mean, again.mean) &&
          same(once.rstd, again.rstd) && same(once.sums, again.sums))) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    const double m = double(c_.channels / c_.groups * c_.positions), eps = kEps[int(c_.type)];
    ok &= compare("y", [&](size_t i) { return once.y.at(int64_t(i)); }, exact_.y, plain_.y, eps, m);
    ok &= compare(
        "dx", [&](size_t i) { return once.dx.at(int64_t(i)); }, exact_.dx, plain_.dx, eps, m);
    const double eps32 = kEps[0];
    // A mean near 0 is a sum that cancels: what counts is the size of its terms.
    const double size = c_.magnitude + std::fabs(c_.offset);
    ok &= compare(
        "mean", [&](size_t i) { return once.mean[i]; }, exact_.mean, plain_.mean, eps32, m, size);
    ok &=
        compare("rstd", [&](size_t i) { return once.rstd[i]; }, exact_.rstd, plain_.rstd, eps32, m);
    for (size_t k = 0; k < 3; ++k) {
      const auto every = [&](const std::vector<double>& v) {
        std::vector<double> of_k;
        for (size_t i = k; i < v.size(); i += 3) of_k.push_back(v[i]);
        return of_k;
      };
      const char* const names[] = {"sum of dz", "sum of dz xhat", "sum of xhat"};
      // They nearly cancel: what counts is the size of their terms.
      Error ours, plain;
      const std::vector<double> e = every(exact_.sums), p = every(plain_.sums);
      for (size_t i = 0; i < e.size(); ++i) {
        ours.add(once.sums[3 * i + k], e[i]);
        plain.add(p[i], e[i]);
      }
      const double terms = double(c_.positions);
      ours.peak += terms;
      ours.norm += terms * terms * double(e.size());
      ok &= report(names[k], ours, plain, eps, terms);
    }
    return ok;
  }

 private:
  struct Result {
    Array y, dx;
    std::vector<float> mean, rstd, sums;
  };

  int64_t elements() const { return c_.samples * c_.channels * c_.positions; }
  size_t at(int64_t n, int64_t c, int64_t p) const {
    return size_t(c_.channels_last ? (n * c_.positions + p) * c_.channels + c
                                   : (n * c_.channels + c) * c_.positions + p);
  }
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

  // `round` after every operation.
  template <typename Round>
  Truth compute(const Round& round) const {
    Truth t{std::vector<double>(size_t(elements())),
            {},
            {},
            std::vector<double>(size_t(elements())),
            std::vector<double>(size_t(c_.samples * c_.channels * 3))};
    const int64_t per_group = c_.channels / c_.groups;
    const double m = double(per_group * c_.positions);
    for (int64_t group = 0; group < c_.samples * c_.groups; ++group) {
      const int64_t n = group / c_.groups, first = group % c_.groups * per_group;
      const auto value = [&](int64_t c, int64_t p) {
        return round(x_.at(int64_t(at(n, c, p))) +
                     (c_.add ? add_[size_t(n * c_.channels + c)] : 0));
      };
      const auto each = [&](const auto& f) {
        for (int64_t c = first; c < first + per_group; ++c)
          for (int64_t p = 0; p < c_.positions; ++p) f(c, p);
      };
      double mean = 0, square = 0;
      each([&](int64_t c, int64_t p) { mean += value(c, p) / m; });
      mean = round(mean);
      each([&](int64_t c, int64_t p) { square += std::pow(round(value(c, p) - mean), 2) / m; });
      const double rstd = round(1 / std::sqrt(square + kEpsilon));
      t.mean.push_back(mean);
      t.rstd.push_back(rstd);
      double g1 = 0, g2 = 0;
      // As torch does: one multiply-add with constants of the group.
      const auto xhat = [&](int64_t c, int64_t p) {
        return round(value(c, p) * rstd - round(mean * rstd));
      };
      const auto dz = [&](int64_t c, int64_t p) {
        const size_t i = size_t(n * c_.channels + c);
        const double factor = round(rstd * gain_[i]), term = round(offset_[i] - factor * mean);
        const double z = round(value(c, p) * factor + term);
        const double sigmoid = round(1 / (1 + std::exp(-z)));
        if (c_.silu)
          t.y[at(n, c, p)] = round_to(c_.type, z * sigmoid);
        else
          t.y[at(n, c, p)] = round_to(c_.type, z);
        const double g = grad_.at(int64_t(at(n, c, p)));
        return c_.silu ? round(g * round(sigmoid * (1 + z * (1 - sigmoid)))) : g;
      };
      each([&](int64_t c, int64_t p) {
        const size_t i = size_t(n * c_.channels + c);
        const double d = dz(c, p), h = xhat(c, p);
        t.sums[3 * i] += d;
        t.sums[3 * i + 1] += d * h;
        t.sums[3 * i + 2] += h;
        g1 += gain_[i] * d / m;
        g2 += gain_[i] * d * h / m;
      });
      each([&](int64_t c, int64_t p) {
        const size_t i = size_t(n * c_.channels + c);
        // As torch does: a sum of dz, x and a constant, each with a factor of the channel.
        const double of_x = round(-rstd * rstd * g2), constant = round(-rstd * g1 - of_x * mean);
        const double dx =
            round(round(rstd * gain_[i] * dz(c, p)) + round(value(c, p) * of_x + constant));
        t.dx[at(n, c, p)] = dx;
      });
    }
    // The exact run is not rounded to the element type.
    if (round(1. / 3) == 1. / 3) return unrounded(t);
    for (double& v : t.dx) v = round_to(c_.type, v);
    return t;
  }
  Truth unrounded(Truth t) const {
    const int64_t per_group = c_.channels / c_.groups;
    for (int64_t n = 0; n < c_.samples; ++n)
      for (int64_t c = 0; c < c_.channels; ++c)
        for (int64_t p = 0; p < c_.positions; ++p) {
          const size_t i = size_t(n * c_.channels + c);
          const size_t group = size_t(n * c_.groups + c / per_group);
          const double x = x_.at(int64_t(at(n, c, p))) + (c_.add ? add_[i] : 0);
          const double z = (x - t.mean[group]) * t.rstd[group] * gain_[i] + offset_[i];
          t.y[at(n, c, p)] = c_.silu ? z / (1 + std::exp(-z)) : z;
        }
    return t;
  }

  Result run(bool piecewise) {
    const auto nan = [] { return double(NAN); };
    const auto rows = size_t(c_.samples * c_.groups), all = size_t(c_.samples * c_.channels);
    Result r{Array(c_.type, elements(), nan), Array(c_.type, elements(), nan),
             std::vector<float>(rows, NAN), std::vector<float>(rows, NAN),
             std::vector<float>(3 * all, c_.parts ? NAN : 0.f)};
    const GroupNormShape shape{element(), c_.samples,       c_.channels, c_.positions,
                               c_.groups, c_.channels_last, c_.silu,     float(kEpsilon)};
    std::vector<float> partial(size_t(c_.parts) * all * 3, NAN);
    const float* add = c_.add ? add_.data() : nullptr;
    const GroupNormForward f{shape,          x_.data(),      r.y.data(),    add,
                             gain_.data(),   offset_.data(), r.mean.data(), r.rstd.data(),
                             partial.data(), c_.parts};
    const GroupNormKernels& kernels = isa::group_norm_kernels();
    const auto items = [&](int64_t count, auto* kernel, const auto& params) {
      if (!piecewise) return kernel(params, 0, count);
      for (int64_t i = count; i-- > 0;) kernel(params, i, i + 1);
    };
    const int64_t groups = c_.samples * c_.groups, parts = c_.samples * c_.parts;
    if (c_.parts) {
      items(parts, kernels.forward_statistics, f);
      items(c_.samples, kernels.forward_merge, f);
      items(parts, kernels.forward_apply, f);
    } else {
      items(groups, kernels.forward_groups, f);
    }
    partial.assign(partial.size(), NAN);
    const GroupNormBackward b{shape,         x_.data(),     grad_.data(),   r.dx.data(),
                              add,           gain_.data(),  offset_.data(), r.mean.data(),
                              r.rstd.data(), r.sums.data(), partial.data(), c_.parts};
    if (c_.parts) {
      items(parts, kernels.backward_sums, b);
      items(c_.samples, kernels.backward_merge, b);
      items(parts, kernels.backward_apply, b);
    } else {
      items(groups, kernels.backward_groups, b);
    }
    return r;
  }

  NormElement element() const {
    switch (c_.type) {
      case ElementType::bf16:
        return NormElement::bf16;
      case ElementType::f16:
        return NormElement::f16;
      default:
        return NormElement::f32;
    }
  }

  static constexpr double kEpsilon = 1e-5;
  Case c_;
  Array x_, grad_;
  std::vector<float> add_, gain_, offset_;
  Truth exact_, plain_;
};

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, int64_t channels, int64_t positions,
                       int64_t groups) -> Case& {
    Case c;
    c.name = std::string(kTypeNames[int(type)]) + "/" + name;
    c.type = type;
    c.channels = channels;
    c.positions = positions;
    c.groups = groups;
    all.push_back(c);
    return all.back();
  };
  for (int64_t p : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 1000})
    add("positions_" + std::to_string(p), p < 8 ? 24 : 6, p, 3).add = p % 2;
  for (int64_t c : {1, 3, 8, 15, 16, 17, 31, 33, 64, 100}) {
    Case& last = add("channels_last_" + std::to_string(c), c, 37, 1);
    last.channels_last = true;
    last.parts = 1 + c % 4;
    last.add = c % 2;
  }
  Case& groups = add("channels_last_groups", 48, 50, 4);
  groups.channels_last = groups.add = true;
  groups.parts = 7;
  Case& parts = add("parts_of_rows", 10, 333, 2);
  parts.parts = 5;
  parts.add = true;
  add("many_parts", 4, 9, 1).parts = 9;
  add("linear", 6, 130, 2).silu = false;
  Case& linear = add("linear_channels_last", 24, 33, 2);
  linear.silu = false;
  linear.channels_last = true;
  linear.parts = 2;
  add("large_offset", 4, 200, 2).offset = 10;
  add("large_values", 4, 200, 2).magnitude = 50;
  Case& far = add("large_offset_parts", 4, 300, 2);
  far.offset = 10;
  far.parts = 3;
  add("nan", 4, 70, 2).nan_at = 5;
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
