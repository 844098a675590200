// Runs the CPU kernel of linear of one instruction set, without PyTorch, against float64.
//
// Compiled together with csrc/cpu/linear_kernel.cpp and the same -DVITKIT_ISA and flags. Rows of x
// and of the weight lie at a distance longer than themselves but for the last, behind which memory
// ends; the output starts as NaN, and is computed twice: in one piece, and cut into groups of a
// panel and ranges of the fewest rows, item by item backwards, which must agree bit by bit.
//
//   linear_driver [substring of a case name]      exit code 0: every case passed
#include "linear.h"

#include "driver.h"

namespace vitkit::cpu::VITKIT_ISA {
const LinearKernels& linear_kernels();
}

using namespace vitkit::cpu;
using namespace driver;

namespace {

struct Case {
  std::string name;
  ElementType type = ElementType::f32;
  LinearActivation activation = LinearActivation::none;
  int64_t rows = 1, depth = 1, columns = 1, gap = 3;
  bool bias = true, special = false;
};

template <typename Round>
double activate(LinearActivation kind, double z, const Round& r) {
  if (kind == LinearActivation::none) return z;
  if (kind == LinearActivation::gelu)
    return r(z * r(0.5 * r(1 + r(std::erf(r(z * std::sqrt(0.5)))))));
  const double k = std::sqrt(2 / std::acos(-1.));
  return r(r(0.5 * z) * r(1 + r(std::tanh(r(k * r(z + r(0.044715 * z * z * z)))))));
}

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        stride_(c.depth + c.gap),
        x_(c.type, (c.rows - 1) * stride_ + c.depth, normal),
        weight_(c.type, (c.columns - 1) * stride_ + c.depth, normal),
        bias_(size_t(c.columns + kLinearPadding), 0.f) {
    for (int64_t j = 0; j < c.columns; ++j) bias_[size_t(j)] = float(normal());
    if (c.special) {
      x_.set(0, NAN);
      x_.set(2 * stride_, kInf);
      x_.set((c.rows - 1) * stride_, 3e3);
    }
  }

  bool check() {
    const Array once = run(false), again = run(true);
    bool ok = once.intact() && again.intact();
    if (!ok) std::printf("  written behind the end\n");
    if (!(once == again)) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    Error ours, plain;
    for (int64_t row = 0; row < c_.rows; ++row)
      for (int64_t j = 0; j < c_.columns; ++j) {
        double exact = 0;
        float sum = 0;
        for (int64_t k = 0; k < c_.depth; ++k) {
          const double a = x_.at(row * stride_ + k), b = weight_.at(j * stride_ + k);
          exact += a * b;
          sum += float(a) * float(b);
        }
        exact += c_.bias ? double(bias_[size_t(j)]) : 0;
        sum += c_.bias ? bias_[size_t(j)] : 0;
        exact = activate(c_.activation, exact, [](double v) { return v; });
        const double rounded =
            activate(c_.activation, double(sum), [](double v) { return double(float(v)); });
        ours.add(once.at(row * c_.columns + j), exact);
        plain.add(round_to(c_.type, rounded), exact);
      }
    return ok & report("y", ours, plain, kEps[int(c_.type)], double(c_.depth));
  }

 private:
  Array run(bool piecewise) {
    const LinearKernels& kernels = isa::linear_kernels();
    Array y(c_.type, c_.rows * c_.columns, [] { return double(NAN); });
    const int64_t panels = (c_.columns + kernels.panel - 1) / kernels.panel;
    const int64_t group = piecewise ? 1 : panels;
    const LinearForward p{
        c_.type,
        c_.activation,
        c_.rows,
        c_.depth,
        c_.columns,
        x_.data(),
        stride_,
        weight_.data(),
        stride_,
        c_.bias ? bias_.data() : nullptr,
        y.data(),
        group,
        piecewise ? kernels.row_step
                  : (c_.rows + kernels.row_step - 1) / kernels.row_step * kernels.row_step};
    const int64_t items = (panels + group - 1) / group * p.ranges();
    const Poisoned scratch(kernels.scratch_bytes(p));
    if (!piecewise)
      kernels.forward(p, 0, items, scratch.get());
    else
      for (int64_t i = items; i-- > 0;) kernels.forward(p, i, i + 1, scratch.get());
    return y;
  }

  Case c_;
  int64_t stride_;
  Array x_, weight_;
  std::vector<float> bias_;
};

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  const char* const names[] = {"none", "gelu", "gelu_tanh"};
  for (int k = 0; k < 3; ++k) {
    const auto add = [&](const std::string& name, int64_t rows, int64_t depth,
                         int64_t columns) -> Case& {
      Case c;
      c.name = std::string(kTypeNames[int(type)]) + "/" + names[k] + "/" + name;
      c.type = type;
      c.activation = LinearActivation(k);
      c.rows = rows;
      c.depth = depth;
      c.columns = columns;
      all.push_back(c);
      return all.back();
    };
    for (int64_t rows : {1, 2, 3, 5, 6, 7, 13, 14, 15, 47, 48, 49, 97})
      add("rows_" + std::to_string(rows), rows, 40, 24);
    for (int64_t depth : {1, 7, 8, 9, 15, 31, 100})
      add("depth_" + std::to_string(depth), 5, depth, 9);
    for (int64_t columns : {1, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 70})
      add("columns_" + std::to_string(columns), 7, 24, columns);
    add("no_bias", 9, 24, 20).bias = false;
    add("dense_rows", 9, 24, 20).gap = 0;
    add("special", 9, 24, 40).special = true;
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
