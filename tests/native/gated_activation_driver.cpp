// Runs the CPU kernels of swiglu, geglu and gelu of one instruction set, without PyTorch, against
// float64.
//
// Compiled together with csrc/cpu/gated_activation_kernel.cpp and the same -DVITKIT_ISA and flags.
// Rows lie at a distance longer than themselves, as halves of a packed tensor do, and what lies
// between them must stay. Outputs start as NaN, and the work is done twice, in one piece and item
// by item backwards, which must agree bit by bit.
//
//   gated_activation_driver [substring of a case name]      exit code 0: every case passed
#include "driver.h"

#include "gated_activation.h"

namespace vitkit::cpu::VITKIT_ISA {
const GatedKernels& gated_kernels();
}

using vitkit::Activation;
using namespace vitkit::cpu;
using namespace driver;

namespace {

struct Case {
  std::string name;
  ElementType type = ElementType::f32;
  Activation activation = Activation::silu;
  bool gated = true;
  int64_t rows = 3, columns = 1, chunk = 64, gap = 5;
  double magnitude = 3;
  bool special = false;
};

// (activation(z) / z, its derivative's part beside it), rounded as PyTorch's kernels round.
template <typename Round>
void activate(Activation kind, double z, const Round& r, double& y, double& slope) {
  if (kind == Activation::silu) {
    const double s = r(1 / r(1 + r(std::exp(-z))));
    y = r(z * s);
    slope = r(s * r(1 + r(z * r(1 - s))));
  } else if (kind == Activation::gelu) {
    const double cdf = r(0.5 * r(1 + r(std::erf(r(z * std::sqrt(0.5))))));
    const double pdf = r(std::exp(r(-0.5 * r(z * z))) * 0.3989422804014327);
    y = r(z * cdf);
    slope = r(cdf + r(z * pdf));
  } else {
    const double k = std::sqrt(2 / std::acos(-1.)), c = 0.044715;
    const double t = r(std::tanh(r(k * r(z + r(c * z * z * z)))));
    y = r(r(0.5 * z) * r(1 + t));
    slope = r(r(0.5 * r(1 + t)) + r(r(0.5 * z) * r(r(1 - r(t * t)) * r(k * r(1 + 3 * c * z * z)))));
  }
}

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        stride_(c.columns + c.gap),
        value_(c.type, c.rows * stride_, normal),
        gate_(c.type, c.rows * stride_, [&] { return c.magnitude * normal(); }),
        grad_(c.type, c.rows * stride_, normal) {
    const double special[] = {0., 1e-30, 50., -50., 200., -200., 3e4, -3e4, NAN};
    if (c.special)
      for (int64_t i = 0; i < c.columns; ++i) gate_.set(i, special[i % 9]);
  }

  bool check() {
    const Result once = run(false), again = run(true);
    bool ok = once.y.intact() && once.dgate.intact() && once.dvalue.intact();
    ok &= untouched(once.y) && untouched(once.dgate) && untouched(once.dvalue);
    if (!ok) std::printf("  written outside the rows\n");
    if (!(once.y == again.y && once.dgate == again.dgate && once.dvalue == again.dvalue)) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    const auto exactly = [](double v) { return v; };
    const auto rounded = [](double v) { return double(float(v)); };
    Error y[2], dgate[2], dvalue[2];
    for (int64_t row = 0; row < c_.rows; ++row)
      for (int64_t column = 0; column < c_.columns; ++column) {
        const int64_t i = row * stride_ + column;
        double truth[3], plain[3];
        compute(i, exactly, truth);
        compute(i, rounded, plain);
        for (double& v : plain) v = round_to(c_.type, v);
        const auto add = [&](Error* e, const Array& got, int k) {
          e[0].add(got.at(i), truth[k]);
          e[1].add(plain[k], truth[k]);
        };
        add(y, once.y, 0);
        add(dgate, once.dgate, 1);
        if (c_.gated) add(dvalue, once.dvalue, 2);
      }
    const double eps = kEps[int(c_.type)];
    ok &= report("y", y[0], y[1], eps, 1);
    ok &= report("dgate", dgate[0], dgate[1], eps, 1);
    if (c_.gated) ok &= report("dvalue", dvalue[0], dvalue[1], eps, 1);
    return ok;
  }

 private:
  struct Result {
    Array y, dgate, dvalue;
  };

  template <typename Round>
  void compute(int64_t i, const Round& r, double* out) const {
    const double z = gate_.at(i), v = c_.gated ? value_.at(i) : 1, g = grad_.at(i);
    double y, slope;
    activate(c_.activation, z, r, y, slope);
    out[0] = r(y * v);
    out[1] = r(r(g * v) * slope);
    out[2] = r(g * y);
  }

  // Bytes between the rows are as they were.
  bool untouched(const Array& a) const {
    for (int64_t row = 0; row < c_.rows; ++row)
      for (int64_t i = c_.columns; i < stride_; ++i)
        if (!std::isnan(a.at(row * stride_ + i))) return false;
    return true;
  }

  Result run(bool piecewise) {
    const auto nan = [] { return double(NAN); };
    const int64_t n = c_.rows * stride_;
    Result r{Array(c_.type, n, nan), Array(c_.type, n, nan), Array(c_.type, n, nan)};
    const auto rows = [&](Array& a) { return ActivationRows{a.data(), stride_}; };
    const ActivationRows none{nullptr, 0};
    const GatedForward f{c_.type,     c_.activation, c_.rows,
                         c_.columns,  c_.chunk,      c_.gated ? rows(value_) : none,
                         rows(gate_), rows(r.y)};
    const GatedBackward b{c_.type,
                          c_.activation,
                          c_.rows,
                          c_.columns,
                          c_.chunk,
                          rows(grad_),
                          c_.gated ? rows(value_) : none,
                          rows(gate_),
                          c_.gated ? rows(r.dvalue) : none,
                          rows(r.dgate)};
    const GatedKernels& kernels = isa::gated_kernels();
    const auto items = [&](const auto& params, auto* kernel) {
      if (!piecewise) return kernel(params, 0, params.items());
      for (int64_t i = params.items(); i-- > 0;) kernel(params, i, i + 1);
    };
    items(f, kernels.forward);
    items(b, kernels.backward);
    return r;
  }

  Case c_;
  int64_t stride_;
  Array value_, gate_, grad_;
};

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  const char* const names[] = {"silu", "gelu", "gelu_tanh"};
  for (int k = 0; k < 3; ++k)
    for (bool gated : {true, false}) {
      const auto add = [&](const std::string& name, int64_t columns) -> Case& {
        Case c;
        c.name =
            std::string(kTypeNames[int(type)]) + "/" + names[k] + (gated ? "/gated/" : "/") + name;
        c.type = type;
        c.activation = Activation(k);
        c.gated = gated;
        c.columns = columns;
        all.push_back(c);
        return all.back();
      };
      for (int64_t columns : {1, 7, 8, 15, 16, 31, 32, 33, 64, 65, 100, 300})
        add("columns_" + std::to_string(columns), columns);
      add("dense_rows", 40).gap = 0;
      add("wide_range", 2000).magnitude = 12;
      add("tiny", 100).magnitude = 1e-3;
      add("one_chunk", 300).chunk = 4096;
      // One row, where plain float32 overflows in the cube of tanh.
      Case& special = add("special", 36);
      special.special = true;
      special.rows = 1;
    }
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
