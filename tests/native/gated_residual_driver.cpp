// Runs gated_residual's CPU kernels of one instruction set, without PyTorch, against float64.
//
// Compiled together with csrc/cpu/gated_residual_kernel.cpp and the same -DVITKIT_ISA and flags.
// Every case checks out, dy and the gradient of the gates by the project's rule; tensors lie before
// a canary, outputs start as NaN, and two splits of the work must agree bit by bit.
//
//   gated_residual_driver [substring of a case name]      exit code 0: every case passed
#include "driver.h"

#include "gated_residual.h"

namespace vitkit::cpu::VITKIT_ISA {
const GatedKernels& gated_residual_kernels();
}

using namespace vitkit::cpu;
using namespace driver;

namespace {

struct Case {
  std::string name;
  ElementType type = ElementType::f32, gate = ElementType::f32;
  int64_t segments = 2, rows = 5, width = 8, parts = 2;
  bool per_token = false;
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
        x_(c.type, elements(), normal),
        y_(c.type, elements(), normal),
        grad_(c.type, elements(), normal),
        gate_(c.gate, gates() * stride(), normal) {}

  bool check() {
    const Result once = run(false), again = run(true);
    bool ok = once.out.intact() && once.dy.intact() && once.dgate.intact();
    if (!ok) std::printf("  canary overwritten\n");
    if (!(once.out == again.out && once.dy == again.dy && once.dgate == again.dgate)) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    Error out[2], dy[2], dgate[2];
    std::vector<double> sums(size_t(c_.segments * c_.width));
    for (int64_t i = 0; i < elements(); ++i) {
      const int64_t row = i / c_.width, e = i % c_.width, segment = row / c_.rows;
      const double gate = gate_.at((c_.per_token ? row : segment) * stride() + e);
      const auto add = [&](Error* error, ElementType type, double got, double exact) {
        error[0].add(got, exact);
        error[1].add(round_to(type, exact), exact);
      };
      add(out, c_.type, once.out.at(i), x_.at(i) + gate * y_.at(i));
      add(dy, c_.type, once.dy.at(i), gate * grad_.at(i));
      if (c_.per_token) add(dgate, c_.gate, once.dgate.at(i), grad_.at(i) * y_.at(i));
      sums[size_t(segment * c_.width + e)] += grad_.at(i) * y_.at(i);
    }
    for (int64_t i = 0; !c_.per_token && i < c_.segments * c_.width; ++i) {
      double got = 0;
      for (int64_t part = 0; part < c_.parts; ++part)
        got += once.dgate.at((i / c_.width * c_.parts + part) * c_.width + i % c_.width);
      dgate[0].add(got, sums[size_t(i)]);
    }
    const double eps = kEps[int(c_.type)];
    ok &= report("out", out[0], out[1], eps, 1);
    ok &= report("dy", dy[0], dy[1], eps, 1);
    ok &= report("dgate", dgate[0], dgate[1], kEps[int(c_.gate)], double(c_.rows));
    return ok;
  }

 private:
  struct Result {
    Array out, dy, dgate;
  };

  int64_t elements() const { return c_.segments * c_.rows * c_.width; }
  int64_t stride() const { return c_.width + 3; }
  int64_t gates() const { return c_.per_token ? c_.segments * c_.rows : c_.segments; }

  Result run(bool piecewise) {
    const auto nan = [] { return double(NAN); };
    const int64_t partial = c_.segments * c_.parts * c_.width;
    Result r{
        Array(c_.type, elements(), nan), Array(c_.type, elements(), nan),
        c_.per_token ? Array(c_.gate, elements(), nan) : Array(ElementType::f32, partial, nan)};
    const auto items = [&](int64_t count, auto&& f, const auto& params) {
      if (!piecewise) return f(params, 0, count);
      for (int64_t i = count; i-- > 0;) f(params, i, i + 1);
    };
    const GatedShape shape{element_of(c_.type),
                           c_.segments,
                           c_.rows,
                           c_.width,
                           Rows{gate_.data(), element_of(c_.gate), stride()},
                           c_.per_token};
    const GatedForward f{shape, x_.data(), y_.data(), r.out.data()};
    const GatedKernels& kernels = isa::gated_residual_kernels();
    items(c_.segments * c_.rows, kernels.forward, f);
    const GatedBackward b{shape,
                          grad_.data(),
                          y_.data(),
                          r.dy.data(),
                          c_.per_token ? r.dgate.data() : nullptr,
                          c_.per_token ? nullptr : reinterpret_cast<float*>(r.dgate.data()),
                          c_.parts};
    items(c_.segments * c_.parts, kernels.backward, b);
    return r;
  }

  Case c_;
  Array x_, y_, grad_, gate_;
};

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  for (const ElementType gate : {type, ElementType::f32})
    for (const bool per_token : {false, true})
      for (int64_t n : {1, 7, 16, 33, 64, 100}) {
        Case c;
        c.name = std::string(kTypeNames[int(type)]) + "/" + (per_token ? "token_" : "sample_") +
                 std::to_string(n) + "_gate_" + kTypeNames[int(gate)];
        c.type = type;
        c.gate = gate;
        c.per_token = per_token;
        c.width = n;
        c.rows = n == 33 ? 11 : 5;
        c.parts = n == 7 ? 7 : 2;
        all.push_back(c);
      }
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
