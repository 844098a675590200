// Runs rope_2d's CPU kernel of one instruction set, without PyTorch, against float64.
//
// Compiled together with csrc/cpu/rope_2d_kernel.cpp and the same -DVITKIT_ISA and flags. Inputs
// are strided views, tables are shared or not, outputs start as NaN before a canary, and the work
// is done twice, in one piece and item by item backwards, which must agree bit by bit.
//
//   rope_2d_driver [substring of a case name]      exit code 0: every case passed
#include "driver.h"

#include "rope_2d.h"

namespace vitkit::cpu::VITKIT_ISA {
const RopeKernels& rope_kernels();
}

using namespace vitkit::cpu;
using namespace driver;

namespace {

struct Case {
  std::string name;
  ElementType type = ElementType::f32;
  bool interleaved = false, inverse = false;
  int64_t batch = 2, tokens = 3, prefix = 1, heads = 2, head_dim = 8;
  bool of_sample = false, of_head = false;
  int64_t gap = 3;  // elements between heads
};

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        pitch_(c.head_dim + c.gap),
        x_(c.type, c.batch * c.tokens * c.heads * pitch_, normal),
        angles_{table(), table()} {}

  bool check() {
    const Array once = run(false), again = run(true);
    bool ok = once.intact() && x_.intact();
    if (!ok) std::printf("  canary overwritten\n");
    if (!(once == again)) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    Error ours, plain;
    for (int64_t row = 0; row < c_.batch * c_.tokens * c_.heads; ++row)
      for (int64_t j = 0; j < c_.head_dim; ++j) {
        const double exact = turned(row, j, [](double v) { return v; });
        ours.add(once.at(row * c_.head_dim + j), exact);
        const double rounded = turned(row, j, [](double v) { return double(float(v)); });
        plain.add(round_to(c_.type, rounded), exact);
      }
    return ok & report("y", ours, plain, kEps[int(c_.type)], 2);
  }

 private:
  std::vector<float> table() const {
    std::vector<float> t;
    const int64_t samples = c_.of_sample ? c_.batch : 1, heads = c_.of_head ? c_.heads : 1;
    for (int64_t i = 0; i < samples * (c_.tokens - c_.prefix) * heads * c_.head_dim; ++i)
      t.push_back(float(normal()));
    return t;
  }
  int64_t head_stride() const { return c_.of_head ? c_.head_dim : 0; }
  int64_t token_stride() const { return (c_.of_head ? c_.heads : 1) * c_.head_dim; }
  int64_t batch_stride() const {
    return c_.of_sample ? (c_.tokens - c_.prefix) * token_stride() : 0;
  }

  template <typename Round>
  double turned(int64_t row, int64_t j, const Round& r) const {
    const int64_t h = row % c_.heads, n = row / c_.heads % c_.tokens;
    const int64_t b = row / c_.heads / c_.tokens, half = c_.head_dim / 2;
    const double x = x_.at(row * pitch_ + j);
    if (n < c_.prefix) return x;
    const bool first = c_.interleaved ? j % 2 == 0 : j < half;
    const int64_t partner = c_.interleaved ? (j ^ 1) : first ? j + half : j - half;
    const double other = x_.at(row * pitch_ + partner);
    const int64_t at = b * batch_stride() + (n - c_.prefix) * token_stride() + h * head_stride();
    const double cos = angles_[0][size_t(at + j)];
    const double sin = angles_[1][size_t(at + (c_.inverse ? partner : j))];
    const double sign = first == c_.inverse ? 1 : -1;
    return r(r(x * cos) + sign * r(other * sin));
  }

  Array run(bool piecewise) {
    Array y(c_.type, c_.batch * c_.tokens * c_.heads * c_.head_dim, [] { return double(NAN); });
    const auto rows = [&](Array& a, int64_t pitch) {
      return RowsView{a.data(), c_.tokens * c_.heads * pitch, c_.heads * pitch, pitch};
    };
    const auto angles = [&](int k) {
      return AngleTable{angles_[k].data(), batch_stride(), token_stride(), head_stride()};
    };
    const Rope p{
        c_.type,     c_.interleaved,   c_.inverse,           c_.tokens, c_.prefix, c_.heads,
        c_.head_dim, rows(x_, pitch_), rows(y, c_.head_dim), angles(0), angles(1)};
    const RopeKernels& kernels = isa::rope_kernels();
    const int64_t items = c_.batch * c_.tokens;
    if (!piecewise) {
      kernels.rotate(p, 0, items);
    } else {
      for (int64_t i = items; i-- > 0;) kernels.rotate(p, i, i + 1);
    }
    return y;
  }

  Case c_;
  int64_t pitch_;
  Array x_;
  std::vector<float> angles_[2];
};

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  for (bool interleaved : {false, true})
    for (bool inverse : {false, true}) {
      const auto add = [&](const std::string& name, int64_t head_dim) -> Case& {
        Case c;
        c.name = std::string(kTypeNames[int(type)]) + (interleaved ? "/interleaved" : "/half") +
                 (inverse ? "/back/" : "/") + name;
        c.type = type;
        c.interleaved = interleaved;
        c.inverse = inverse;
        c.head_dim = head_dim;
        all.push_back(c);
        return all.back();
      };
      for (int64_t d : {2, 4, 8, 16, 18, 30, 32, 34, 64, 72, 100, 128})
        add("head_dim_" + std::to_string(d), d);
      add("no_prefix", 24).prefix = 0;
      add("only_prefix", 24).prefix = 3;
      add("of_sample", 24).of_sample = true;
      add("of_head", 24).of_head = true;
      Case& both = add("of_sample_and_head", 40);
      both.of_sample = both.of_head = true;
      add("dense", 40).gap = 0;
    }
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
