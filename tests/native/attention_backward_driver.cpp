// Runs flash_attention's CPU gradient kernel of one instruction set, without PyTorch, against
// float64.
//
// Compiled together with csrc/cpu/flash_attention_bwd_kernel.cpp and the same -DVITKIT_ISA and
// flags; with -DVITKIT_EMULATE_AMX also where there is no AMX. Every case checks dq, dk, dv and
// dbias by the project's rule, the yardstick being the gradient formula in the element type with a
// rounding after every operation. Inputs and outputs lie before a canary, scratch, sums and outputs
// start as NaN, and the work is done twice, with the lanes of every step in opposite order, which
// must agree bit by bit.
//
//   attention_backward_driver [substring of a case name]      exit code 0: every case passed
#include "driver.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

#include "flash_attention_bwd.h"
#include "structured_bias.h"

namespace vitkit::cpu::VITKIT_ISA {
const FlashBackwardKernels& flash_backward_kernels();
}

using namespace vitkit::cpu;
using namespace driver;

namespace {

enum class Bias { none, dense, over_batch, per_key, per_query, scalar, transposed, mask, row_mask };

struct Case {
  std::string name;
  ElementType type = ElementType::f32;
  int64_t batch = 1, heads = 2, nq = 1, nk = 1, head_dim = 64;
  bool causal = false, fine = false, grad_lse = true, expanded_grad = false;
  double scale = 0;  // 0: 1 / sqrt(head_dim)
  double magnitude = 1;
  Bias bias = Bias::none;
  ElementType bias_type = ElementType::f32;
  Structure structure = Structure::none;
  int64_t width = 1;  // of a decomposed bias
  bool need_dbias = true;
  int64_t nan_row = -1;  // of q, in every head
  std::vector<int64_t> starts_q, starts_k;
};

// One head in double precision, and the same in the element type.
struct Head {
  int64_t nq, nk, d;
  std::vector<double> s, p, lse, out, dp, ds, dq, dk, dv;

  Head(int64_t nq, int64_t nk, int64_t d)
      : nq(nq),
        nk(nk),
        d(d),
        s(size_t(nq * nk)),
        p(s),
        lse(size_t(nq)),
        out(size_t(nq * d)),
        dp(s),
        ds(s),
        dq(out),
        dk(size_t(nk * d)),
        dv(dk) {}
};

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        q_(c.type, rows(c.nq), [&] { return c.magnitude * normal(); }),
        k_(c.type, rows(c.nk), [&] { return c.magnitude * normal(); }),
        v_(c.type, rows(c.nk), normal),
        grad_(c.type, c.expanded_grad ? 1 : rows(c.nq), normal),
        out_(c.type, rows(c.nq)),
        bias_(bias_type(), bias_elements(), [&] { return bias_value(); }),
        structured_(c.structure, c.bias_type, c.batch, c.heads, c.nq, c.nk, c.width),
        lse_(size_t(dense_batch() * c.heads * c.nq), NAN),
        grad_lse_(lse_.size()) {
    for (float& x : grad_lse_) x = float(normal());
    if (c.nan_row >= 0)
      for (int64_t b = 0; b < dense_batch(); ++b)
        for (int64_t h = 0; h < c.heads; ++h) q_.set(index(b, h, c.nan_row, c.nq) + 3, NAN);
    if (c.bias == Bias::row_mask)
      for (int64_t j = 0; j < c.nk; ++j)
        bias_.set(c.nk * (c.nq / 2) + j, 0);  // one row attends nothing
    dbias_exact_.assign(size_t(bias_elements()), 0);
    dbias_plain_ = dbias_exact_;
    for (int part = 0; part < 2 && structured_.exists(); ++part) {
      sums_exact_[part].assign(size_t(c.batch * c.heads * c.nq * structured_.sums(part)), 0);
      sums_plain_[part] = sums_exact_[part];
    }
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h) {
        exact_.push_back(head(b, h, false));
        plain_.push_back(head(b, h, true));
        save(b, h, exact_.back());
      }
  }

  bool check() {
    const Result a = run(false), b = run(true);
    bool ok = q_.intact() && k_.intact() && v_.intact() && grad_.intact() && out_.intact() &&
              bias_.intact() && structured_.intact();
    for (const Result* r : {&a, &b})
      ok &= r->dq.intact() && r->dk.intact() && r->dv.intact() && r->dbias.intact();
    if (!ok) std::printf("  canary overwritten\n");
    if (!(a.dq == b.dq && a.dk == b.dk && a.dv == b.dv && a.dbias == b.dbias &&
          a.sums[0] == b.sums[0] && a.sums[1] == b.sums[1])) {
      std::printf("  another order of the lanes gives another result\n");
      ok = false;
    }
    ok &= compare("dq", a.dq, c_.nq, &Head::dq);
    ok &= compare("dk", a.dk, c_.nk, &Head::dk);
    ok &= compare("dv", a.dv, c_.nk, &Head::dv);
    if (structured_.exists() && c_.need_dbias) ok &= compare_sums(a);
    return (!wants_dbias() || compare_dbias(a.dbias)) && ok;
  }

 private:
  struct Result {
    Array dq, dk, dv, dbias;
    std::vector<float> sums[2];  // of the gradient of a structured bias
  };

  bool packed() const { return !c_.starts_q.empty(); }
  int64_t dense_batch() const { return packed() ? 1 : c_.batch; }
  int64_t rows(int64_t n) const { return dense_batch() * n * c_.heads * c_.head_dim; }
  int64_t first(int64_t b, const std::vector<int64_t>& starts) const {
    return packed() ? starts[size_t(b)] : 0;
  }
  int64_t count(int64_t b, const std::vector<int64_t>& starts, int64_t n) const {
    return packed() ? starts[size_t(b) + 1] - starts[size_t(b)] : n;
  }
  int64_t queries(int64_t b) const { return count(b, c_.starts_q, c_.nq); }
  int64_t keys(int64_t b) const { return count(b, c_.starts_k, c_.nk); }
  // Of token i of problem b, in a tensor of n tokens.
  int64_t index(int64_t b, int64_t h, int64_t i, int64_t n) const {
    return (((packed() ? 0 : b * n) + i) * c_.heads + h) * c_.head_dim;
  }
  int64_t lse_index(int64_t b, int64_t h, int64_t i) const {
    return packed() ? h * c_.nq + c_.starts_q[size_t(b)] + i : (b * c_.heads + h) * c_.nq + i;
  }
  double scale() const {
    return float(c_.scale == 0 ? 1 / std::sqrt(double(c_.head_dim)) : c_.scale);
  }

  bool is_mask() const { return c_.bias == Bias::mask || c_.bias == Bias::row_mask; }
  bool wants_dbias() const { return c_.bias != Bias::none && !is_mask() && c_.need_dbias; }
  ElementType bias_type() const { return is_mask() ? ElementType::boolean : c_.bias_type; }
  double bias_value() const {
    return is_mask() ? uniform() - 0.3 : (uniform() < 0.1 ? -kInf : normal());
  }

  // Sizes of the bias, [batch, heads, nq, nk] or 1.
  std::array<int64_t, 4> bias_sizes() const {
    switch (c_.bias) {
      case Bias::none:
      case Bias::scalar:
        return {1, 1, 1, 1};
      case Bias::over_batch:
        return {1, c_.heads, c_.nq, c_.nk};
      case Bias::per_key:
        return {c_.batch, 1, 1, c_.nk};
      case Bias::per_query:
        return {1, 1, c_.nq, 1};
      case Bias::row_mask:
        return {1, 1, c_.nq, c_.nk};
      default:
        return {c_.batch, c_.heads, c_.nq, c_.nk};
    }
  }
  int64_t bias_elements() const {
    const auto n = bias_sizes();
    return n[0] * n[1] * n[2] * n[3];
  }
  BiasView bias_view() {
    if (c_.bias == Bias::none) return {};
    const auto n = bias_sizes();
    const bool turned = c_.bias == Bias::transposed;
    const int64_t square = n[2] * n[3];
    return {bias_.data(),
            bias_type(),
            n[0] > 1 ? n[1] * square : 0,
            n[1] > 1 ? square : 0,
            n[2] > 1 ? (turned ? 1 : n[3]) : 0,
            n[3] > 1 ? (turned ? n[2] : 1) : 0};
  }
  int64_t bias_index(int64_t b, int64_t h, int64_t i, int64_t j) {
    const BiasView v = bias_view();
    return b * v.batch_stride + h * v.head_stride + i * v.query_stride + j * v.key_stride;
  }

  // The formula in double; or with sums in float, rounded to the element type after every
  // operation.
  Head head(int64_t b, int64_t h, bool plain) {
    Head r(queries(b), keys(b), c_.head_dim);
    const auto add = [&](double& sum, double x) {
      sum = plain ? double(float(sum) + float(x)) : sum + x;
    };
    const auto rounded = [&](double x) { return plain ? round_to(c_.type, x) : x; };
    const int64_t q0 = index(b, h, first(b, c_.starts_q), c_.nq),
                  k0 = index(b, h, first(b, c_.starts_k), c_.nk);
    const int64_t step = c_.heads * c_.head_dim, d = c_.head_dim;
    const auto grad = [&](int64_t at) { return grad_.at(c_.expanded_grad ? 0 : at); };
    for (int64_t i = 0; i < r.nq; ++i) {
      const int64_t n = c_.causal ? std::min(r.nk, i + 1) : r.nk, qi = q0 + i * step;
      double* s = r.s.data() + i * r.nk;
      double* p = r.p.data() + i * r.nk;
      double* dp = r.dp.data() + i * r.nk;
      double top = -kInf, total = 0, delta = 0;
      for (int64_t j = 0; j < n; ++j) {
        const int64_t kj = k0 + j * step;
        for (int64_t e = 0; e < d; ++e) {
          add(s[j], rounded(q_.at(qi + e) * scale()) * k_.at(kj + e));
          add(dp[j], grad(qi + e) * v_.at(kj + e));
        }
        s[j] = rounded(s[j]);
        dp[j] = rounded(dp[j]);
        if (c_.bias != Bias::none) {
          const double x = bias_.at(bias_index(b, h, i, j));
          s[j] = is_mask() ? (x > 0 ? s[j] : -kInf) : rounded(s[j] + rounded(x));
        }
        if (structured_.exists()) s[j] = rounded(s[j] + rounded(structured_.at(b, h, i, j)));
        top = std::isnan(s[j]) ? s[j] : std::fmax(top, s[j]);
      }
      if (c_.nan_row == i) top = NAN;
      for (int64_t j = 0; j < n; ++j) add(total, p[j] = std::exp(s[j] - (top == -kInf ? 0 : top)));
      r.lse[size_t(i)] = total == 0 ? -kInf : top + std::log(total);
      for (int64_t j = 0; j < n && total != 0; ++j) {
        p[j] = rounded(p[j] / total);
        add(delta, p[j] * dp[j]);
      }
      if (c_.grad_lse) delta -= grad_lse_[size_t(lse_index(b, h, i))];
      differentiate(b, h, i, n, delta, plain, r);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t kj = k0 + j * step;
        const double ds = r.ds[size_t(i * r.nk + j)];
        for (int64_t e = 0; e < d; ++e) {
          add(r.out[size_t(i * d + e)], p[j] * v_.at(kj + e));
          add(r.dq[size_t(i * d + e)], ds * k_.at(kj + e));
          add(r.dk[size_t(j * d + e)], ds * rounded(q_.at(qi + e) * scale()));
          add(r.dv[size_t(j * d + e)], p[j] * grad(qi + e));
        }
      }
      for (int64_t e = 0; e < d; ++e)
        r.dq[size_t(i * d + e)] = rounded(rounded(r.dq[size_t(i * d + e)]) * scale());
    }
    for (double& x : r.dk) x = rounded(x);
    for (double& x : r.dv) x = rounded(x);
    return r;
  }

  void differentiate(int64_t b, int64_t h, int64_t i, int64_t n, double delta, bool plain,
                     Head& r) {
    for (int64_t j = 0; j < n; ++j) {
      const size_t at = size_t(i * r.nk + j);
      r.ds[at] = r.lse[size_t(i)] == -kInf ? 0 : r.p[at] * (r.dp[at] - delta);
      if (plain) r.ds[at] = round_to(c_.type, r.ds[at]);
      if (wants_dbias())
        (plain ? dbias_plain_ : dbias_exact_)[size_t(bias_index(b, h, i, j))] += r.ds[at];
      if (structured_.exists())
        structured_.reduce(b, h, i, j, r.ds[at], plain ? sums_plain_ : sums_exact_);
    }
  }

  // What the forward pass hands on.
  void save(int64_t b, int64_t h, const Head& r) {
    const int64_t at = index(b, h, first(b, c_.starts_q), c_.nq);
    for (int64_t i = 0; i < r.nq; ++i) {
      lse_[size_t(lse_index(b, h, i))] = float(r.lse[size_t(i)]);
      for (int64_t e = 0; e < r.d; ++e)
        out_.set(at + i * c_.heads * r.d + e, r.out[size_t(i * r.d + e)]);
    }
  }

  RowsView view(Array& t, int64_t n) const {
    const int64_t row = c_.heads * c_.head_dim;
    return {t.data(), packed() ? 0 : n * row, row, c_.head_dim};
  }

  FlashBackward parameters(Result* to) {
    FlashBackward p{};
    p.in = {c_.type,
            view(q_, c_.nq),
            view(k_, c_.nk),
            view(v_, c_.nk),
            bias_view(),
            c_.batch,
            c_.heads,
            c_.nq,
            c_.nk,
            c_.head_dim,
            packed() ? c_.starts_q.data() : nullptr,
            packed() ? c_.starts_k.data() : nullptr,
            float(scale()),
            c_.causal};
    structured_.give_to(&p.in);
    p.out = view(out_, c_.nq);
    p.grad = c_.expanded_grad ? RowsView{grad_.data(), 0, 0, 0} : view(grad_, c_.nq);
    p.grad_dim_stride = c_.expanded_grad ? 0 : 1;
    p.dq = view(to->dq, c_.nq);
    p.dk = view(to->dk, c_.nk);
    p.dv = view(to->dv, c_.nk);
    p.lse = lse_.data();
    p.lse_batch_stride = packed() ? 0 : c_.heads * c_.nq;
    p.lse_head_stride = c_.nq;
    if (c_.grad_lse) p.grad_lse = grad_lse_.data();
    p.grad_lse_batch_stride = p.lse_batch_stride;
    p.grad_lse_head_stride = p.lse_head_stride;
    p.grad_lse_query_stride = 1;
    p.fine = c_.fine;
    for (int64_t b = 0; b < c_.batch; ++b) {
      p.max_nq = std::max(p.max_nq, queries(b));
      p.max_nk = std::max(p.max_nk, keys(b));
    }
    return p;
  }

  // As the host: elements of one score each are written, others summed in float32 (a scalar per
  // key, until the end).
  BiasGradView dbias_view(char* to, std::vector<float>* sums) {
    const auto n = bias_sizes();
    const int64_t keys = c_.bias == Bias::scalar ? c_.nk : n[3], square = n[2] * keys;
    const bool written = c_.bias == Bias::dense || c_.bias == Bias::transposed;
    if (!written) {
      sums->assign(size_t(n[0] * n[1] * square), 0.f);
      to = reinterpret_cast<char*>(sums->data());
    }
    return {to,
            written ? bias_type() : ElementType::f32,
            !written,
            0,
            n[0] > 1 ? n[1] * square : 0,
            n[1] > 1 ? square : 0,
            n[2] > 1 ? keys : 0,
            keys > 1 ? 1 : 0};
  }

  Result run(bool reversed) {
    const auto nan = [] { return double(NAN); };
    Result r{Array(c_.type, rows(c_.nq), nan),
             Array(c_.type, rows(c_.nk), nan),
             Array(c_.type, rows(c_.nk), nan),
             Array(bias_type(), bias_elements(), [] { return 0.; }),
             {}};
    FlashBackward p = parameters(&r);
    std::vector<float> bias_sums;
    if (wants_dbias()) p.dbias = dbias_view(r.dbias.data(), &bias_sums);
    if (structured_.exists() && c_.need_dbias) p.dstructured = sums_view(&r);
    const FlashBackwardKernels& kernels = isa::flash_backward_kernels();
    const Poisoned scratch(size_t(kernels.scratch_bytes(p))),
        sums(size_t(kernels.sums_floats(p)) * sizeof(float));
    for (int64_t b = 0; b < c_.batch; ++b) {
      const BackwardGrid g = kernels.grid(p, queries(b), keys(b));
      for (int64_t h = 0; h < c_.heads; ++h)
        for (int64_t step = 0; step < g.steps(); ++step)
          for (int64_t lane = 0; lane < g.lanes(); ++lane)
            kernels.cell(p, {b, h, reinterpret_cast<float*>(sums.get()), 0}, step,
                         reversed ? g.lanes() - 1 - lane : lane, scratch.get());
    }
    if (!bias_sums.empty()) {
      const int64_t count = bias_elements(), each = int64_t(bias_sums.size()) / count;
      kernels.reduce_bias(bias_sums.data(), 1, 0, each, count, bias_type(), r.dbias.data());
    }
    return r;
  }

  bool compare(const char* name, const Array& got, int64_t n, std::vector<double> Head::* member) {
    Error ours, plain;
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t h = 0; h < c_.heads; ++h) {
        const Head& e = exact_[size_t(b * c_.heads + h)];
        const Head& y = plain_[size_t(b * c_.heads + h)];
        const int64_t at =
            index(b, h, first(b, n == c_.nq && member == &Head::dq ? c_.starts_q : c_.starts_k), n);
        for (size_t i = 0; i < (e.*member).size(); ++i) {
          const int64_t row = int64_t(i) / c_.head_dim, column = int64_t(i) % c_.head_dim;
          ours.add(got.at(at + row * c_.heads * c_.head_dim + column), (e.*member)[i]);
          plain.add((y.*member)[i], (e.*member)[i]);
        }
      }
    // Each of the summed gradients of scores has three sums over the head in it.
    return report(name, ours, plain, c_.type, 3. * double(std::max(c_.nq, c_.nk) * c_.head_dim));
  }

  StructuredGradView sums_view(Result* to) {
    for (int part = 0; part < 2; ++part) to->sums[part].assign(sums_exact_[part].size(), 0.f);
    if (c_.structure == Structure::distance) return {nullptr, nullptr, to->sums[0].data()};
    return {to->sums[0].data(), to->sums[1].data(), nullptr};
  }

  bool compare_sums(const Result& got) {
    bool ok = true;
    for (int part = 0; part < (c_.structure == Structure::distance ? 1 : 2); ++part) {
      Error ours, plain;
      for (size_t i = 0; i < sums_exact_[part].size(); ++i) {
        ours.add(got.sums[part][i], sums_exact_[part][i]);
        plain.add(round_to(c_.type, sums_plain_[part][i]), sums_exact_[part][i]);
      }
      const double terms = double(c_.nk) / double(structured_.sums(part)) * double(c_.head_dim);
      ok &= report(part ? "drel_w" : "drel_h or dslopes", ours, plain, c_.type, 3. * terms);
    }
    return ok;
  }

  bool compare_dbias(const Array& got) {
    Error ours, plain;
    for (size_t i = 0; i < dbias_exact_.size(); ++i) {
      // Gradients are stored row by row, whatever the layout of the bias.
      const size_t at = c_.bias == Bias::transposed ? turned(i) : i;
      ours.add(got.at(int64_t(at)), dbias_exact_[i]);
      plain.add(round_to(bias_type(), dbias_plain_[i]), dbias_exact_[i]);
    }
    const double terms = double(c_.batch * c_.heads * c_.nq * c_.nk) / double(bias_elements());
    return report("dbias", ours, plain, bias_type(), 3. * terms * double(c_.head_dim));
  }
  size_t turned(size_t i) const {
    const size_t nq = size_t(c_.nq), nk = size_t(c_.nk), square = nq * nk, in = i % square;
    return i - in + in % nq * nk + in / nq;
  }

  bool report(const char* name, const Error& ours, const Error& plain, ElementType type,
              double terms) const {
    return driver::report(name, ours, plain, std::max(kEps[int(type)], kEps[int(c_.type)]), terms);
  }

  Case c_;
  Array q_, k_, v_, grad_, out_, bias_;
  StructuredBias structured_;
  std::vector<float> lse_, grad_lse_;
  std::vector<double> dbias_exact_, dbias_plain_;
  std::vector<double> sums_exact_[2], sums_plain_[2];
  std::vector<Head> exact_, plain_;
};

template <typename Add>
void add_structured(ElementType type, const Add& add) {
  for (int64_t width : {2, 14, 16, 33, 64}) {
    Case& c = add("decomposed_width_" + std::to_string(width), 21, 6 * width, 16);
    c.structure = Structure::decomposed;
    c.width = width;
    c.bias_type = type;
    c.batch = 2;
  }
  for (Structure structure : {Structure::decomposed, Structure::distance})
    for (bool causal : {false, true}) {
      const std::string kind = structure == Structure::distance ? "distance" : "decomposed";
      Case& c = add(kind + (causal ? "_ranges_causal" : "_ranges"), 290, 300, 8);
      c.structure = structure;
      c.width = 12;
      c.causal = causal;
      c.fine = true;
    }
  Case& distance = add("distance_batch", 37, 51, 24);
  distance.structure = Structure::distance;
  distance.batch = 2;
  Case& fixed = add("distance_without_gradient", 20, 30, 8);
  fixed.structure = Structure::distance;
  fixed.need_dbias = false;
}

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, int64_t nq, int64_t nk, int64_t head_dim) -> Case& {
    Case c;
    c.name = std::string(kTypeNames[int(type)]) + "/" + name;
    c.type = type;
    c.nq = nq;
    c.nk = nk;
    c.head_dim = head_dim;
    all.push_back(c);
    return all.back();
  };
  for (int64_t d : {8, 24, 40, 56, 64, 72, 80, 96, 136, 256})
    add("head_dim_" + std::to_string(d), 19, 35, d);
  for (int64_t n : {1, 2, 15, 16, 17, 31, 33, 48, 49, 64, 65, 97})
    add("tokens_" + std::to_string(n), n, n, 32);
  add("no_keys", 5, 0, 16);
  add("no_queries", 0, 5, 16);
  add("no_grad_lse", 21, 22, 16).grad_lse = false;
  add("expanded_grad", 40, 30, 24).expanded_grad = true;
  add("one_query_many_keys", 1, 197, 64);
  add("cross_attention", 70, 77, 40).batch = 2;
  add("several_key_ranges", 37, 1100, 16);
  add("several_query_ranges", 1100, 37, 16);
  add("square_of_ranges", 300, 300, 8).fine = true;
  add("more_query_ranges", 700, 290, 8).fine = true;
  add("square_of_ranges_causal", 390, 390, 8).fine = all.back().causal = true;
  add("causal", 67, 67, 24).causal = true;
  add("causal_more_keys", 20, 90, 24).causal = true;
  add("causal_more_queries", 90, 20, 24).causal = true;
  add("negative_scale", 33, 40, 32).scale = -0.7;
  add("large_scores", 33, 40, 64).magnitude = 3;
  add("nan_row", 40, 45, 32).nan_row = 17;
  const std::pair<const char*, Bias> biases[] = {
      {"bias", Bias::dense},         {"bias_over_batch", Bias::over_batch},
      {"bias_keys", Bias::per_key},  {"bias_queries", Bias::per_query},
      {"bias_scalar", Bias::scalar}, {"bias_transposed", Bias::transposed},
      {"mask", Bias::mask},          {"row_without_keys", Bias::row_mask}};
  for (const auto& [name, bias] : biases) {
    Case& c = add(name, 35, 51, 24);
    c.batch = 2;
    c.bias = bias;
    c.bias_type = type;
  }
  for (ElementType t : {ElementType::f32, ElementType::bf16, ElementType::f16}) {
    Case& c = add(std::string("bias_of_") + kTypeNames[int(t)], 18, 33, 16);
    c.bias = Bias::over_batch;
    c.bias_type = t;
  }
  Case& fixed = add("bias_without_gradient", 35, 51, 24);
  fixed.bias = Bias::dense;
  fixed.need_dbias = false;
  Case& ranges = add("bias_causal_several_ranges", 270, 270, 8);
  ranges.bias = Bias::dense;
  ranges.bias_type = type;
  ranges.causal = ranges.fine = true;
  add_structured(type, add);
  Case& packed = add("packed", 120, 130, 40);
  packed.batch = 5;
  packed.starts_q = {0, 17, 17, 60, 61, 120};
  packed.starts_k = {0, 33, 40, 40, 77, 130};
  Case& packed_causal = add("packed_causal_ranges", 500, 500, 8);
  packed_causal.batch = 3;
  packed_causal.causal = packed_causal.fine = true;
  packed_causal.starts_q = packed_causal.starts_k = {0, 20, 420, 500};
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
