// Runs dilated_attention's CPU kernels of one instruction set, without PyTorch, against float64.
//
// Compiled together with csrc/cpu/dilated_attention_kernel.cpp, dilated_attention_bwd_kernel.cpp
// and the same -DVITKIT_ISA and flags; with -DVITKIT_EMULATE_AMX also where there is no AMX. Every
// case checks out, lse, the results of the branches, dq, dk and dv by the project's rule, the
// yardstick being the same computation in the element type. Inputs and outputs lie before a canary,
// scratch and outputs start as NaN, and the work is done twice, in two splits, which must agree bit
// by bit.
//
//   dilated_attention_driver [substring of a case name]      exit code 0: every case passed
#include "driver.h"

#include <algorithm>

#include "dilated_attention.h"

namespace vitkit::cpu::VITKIT_ISA {
const DilatedForwardKernels& dilated_forward_kernels();
const DilatedBackwardKernels& dilated_backward_kernels();
}  // namespace vitkit::cpu::VITKIT_ISA

using namespace vitkit::cpu;
using namespace driver;

namespace {

struct Case {
  std::string name;
  ElementType type = ElementType::f32;
  int64_t batch = 1, heads = 3, tokens = 37, head_dim = 16;
  std::vector<int64_t> lengths{64}, ratios{1};
  bool causal = false, torchscale = false, fine = false, grad_lse = true, expanded_grad = false;
  double scale = 0;        // 0: 1 / sqrt(head_dim)
  int64_t far_from = -1;   // tokens from here on: all scores far below zero
  int64_t nan_token = -1;  // of q, in every head; no gradients are checked then
};

// One query slot: its keys, -1 for zeros, and what becomes of it.
struct Query {
  int64_t token, out_token, row;  // token is -1 for a zero
  std::vector<int64_t> keys;
  std::vector<double> scores, out;
  double lse;
};

struct Results {
  std::vector<double> out, lse, rows, dq, dk, dv;
};

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        q_(c.type, elements(c.tokens), normal),
        k_(c.type, elements(c.tokens), normal),
        v_(c.type, elements(c.tokens), normal),
        grad_(c.type, c.expanded_grad ? 1 : elements(c.tokens), normal),
        grad_lse_(size_t(c.batch * c.heads * c.tokens)) {
    for (float& x : grad_lse_) x = float(normal());
    for (size_t i = 0; i < c.lengths.size(); ++i) add_branch(c.lengths[i], c.ratios[i]);
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h) {
        if (c.nan_token >= 0) q_.set(index(b, h, c.nan_token, c.tokens), NAN);
        for (int64_t t = c.far_from; c.far_from >= 0 && t < c.tokens; ++t)
          for (int64_t e = 0; e < c.head_dim; ++e) {
            q_.set(index(b, h, t, c.tokens) + e, 5);
            k_.set(index(b, h, t, c.tokens) + e, -5);
          }
      }
    exact_ = results(false);
    plain_ = results(true);
  }

  bool check() {
    const Forward a = forward(false), b = forward(true), in_flight = forward_by_head();
    bool ok = q_.intact() && k_.intact() && v_.intact() && a.out.intact() && a.rows.intact();
    if (!ok) std::printf("  canary overwritten\n");
    if (!(a.out == b.out && a.rows == b.rows && same(a.lse, b.lse) && a.out == in_flight.out &&
          same(a.lse, in_flight.lse))) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    const double keys = double(branches_.size()) * double(c_.tokens);
    ok &= compare("out", a.out, &Results::out, keys);
    ok &= compare("branches", a.rows, &Results::rows, keys);
    ok &= compare("lse", a.lse, &Results::lse, double(c_.head_dim));
    if (c_.nan_token >= 0) return ok;
    const Backward x = backward(false), y = backward(true);
    if (!(same(x.dq, y.dq) && same(x.dk, y.dk) && same(x.dv, y.dv))) {
      std::printf("  another order of the lanes gives another gradient\n");
      ok = false;
    }
    // Each of the summed gradients of scores has three sums over the head in it.
    const double terms = 3 * keys * double(c_.head_dim);
    ok &= compare("dq", x.dq, &Results::dq, terms);
    ok &= compare("dk", x.dk, &Results::dk, terms);
    return compare("dv", x.dv, &Results::dv, terms) && rounds(x.dq) && ok;
  }

 private:
  struct Forward {
    Array out, rows;
    std::vector<float> lse;
  };
  struct Backward {
    std::vector<float> dq, dk, dv;
  };

  int64_t elements(int64_t rows) const { return c_.batch * rows * c_.heads * c_.head_dim; }
  int64_t index(int64_t b, int64_t h, int64_t row, int64_t rows) const {
    return ((b * rows + row) * c_.heads + h) * c_.head_dim;
  }
  int64_t lse_index(int64_t b, int64_t h, int64_t token) const {
    return (b * c_.heads + h) * c_.tokens + token;
  }
  double scale() const {
    return float(c_.scale == 0 ? 1 / std::sqrt(double(c_.head_dim)) : c_.scale);
  }
  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }

  void add_branch(int64_t length, int64_t ratio) {
    DilatedBranch b{};
    b.length = std::min(length, c_.tokens);
    b.ratio = ratio;
    b.segments = (c_.tokens + b.length - 1) / b.length;
    b.slots = (b.length + ratio - 1) / ratio;
    b.pitch = c_.torchscale ? b.slots * ratio : b.length;
    b.heads_per_phase = (c_.heads + ratio - 1) / ratio;
    b.first_row = rows_;
    for (int64_t s = 0; s < b.segments; ++s)
      for (int64_t i = 0; i < b.slots; ++i)
        if (s * b.pitch + i * ratio < c_.tokens) b.rows = s * b.slots + i + 1;
    rows_ += b.rows;
    branches_.push_back(b);
  }

  // ---- the specification, slot by slot ----

  // In double; or with sums in float, rounded to the element type after every operation.
  Results results(bool plain) {
    Results r;
    r.out.assign(size_t(elements(c_.tokens)), 0);
    r.rows.assign(size_t(elements(rows_)), 0);
    r.lse.assign(size_t(c_.batch * c_.heads * c_.tokens), -kInf);
    r.dq = r.dk = r.dv = r.out;
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t h = 0; h < c_.heads; ++h) {
        std::vector<Query> queries;
        for (const DilatedBranch& branch : branches_)
          for (int64_t s = 0; s < branch.segments; ++s)
            add_queries(branch, s, b, h, plain, &queries);
        mix(queries, b, h, plain, &r);
        for (const Query& q : queries) differentiate(q, b, h, plain, &r);
      }
    if (plain)
      for (std::vector<double>* t : {&r.out, &r.dq, &r.dk, &r.dv})
        for (double& x : *t) x = round_to(c_.type, x);
    return r;
  }

  static void add(double& sum, double x, bool plain) {
    sum = plain ? double(float(sum) + float(x)) : sum + x;
  }
  double rounded(double x, bool plain) const { return plain ? round_to(c_.type, x) : x; }

  void add_queries(const DilatedBranch& branch, int64_t s, int64_t b, int64_t h, bool plain,
                   std::vector<Query>* queries) {
    const int64_t phase = h / branch.heads_per_phase;
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < branch.slots; ++i) {
      const int64_t place = phase + i * branch.ratio, token = s * branch.length + place;
      slots.push_back(place < branch.length && token < c_.tokens ? token : -1);
    }
    for (int64_t i = 0; i < branch.slots; ++i) {
      Query q{slots[size_t(i)],
              s * branch.pitch + phase + i * branch.ratio,
              branch.first_row + s * branch.slots + i,
              slots,
              {},
              {},
              0};
      if (q.out_token >= c_.tokens || (!c_.torchscale && q.token < 0)) continue;
      if (c_.causal) q.keys.resize(size_t(i) + 1);
      attend(b, h, plain, &q);
      queries->push_back(q);
    }
  }

  void attend(int64_t b, int64_t h, bool plain, Query* q) {
    double top = -kInf, total = 0;
    for (int64_t key : q->keys) {
      double s = 0;
      if (key >= 0 && q->token >= 0)
        for (int64_t e = 0; e < c_.head_dim; ++e)
          add(s, rounded(q_.at(at(b, h, q->token) + e) * scale(), plain) * k_.at(at(b, h, key) + e),
              plain);
      q->scores.push_back(rounded(s, plain));
      top = std::isnan(s) ? s : std::fmax(top, q->scores.back());
    }
    for (double s : q->scores) add(total, std::exp(s - top), plain);
    q->lse = top + std::log(total);
    q->out.assign(size_t(c_.head_dim), 0);
    for (size_t j = 0; j < q->keys.size(); ++j) {
      const double p = rounded(std::exp(q->scores[j] - top) / total, plain);
      for (int64_t e = 0; e < c_.head_dim; ++e)
        add(q->out[size_t(e)], p * (q->keys[j] < 0 ? 0 : v_.at(at(b, h, q->keys[j]) + e)), plain);
    }
    for (double& x : q->out) x = rounded(x, plain);
  }
  int64_t at(int64_t b, int64_t h, int64_t token) const { return index(b, h, token, c_.tokens); }

  void mix(const std::vector<Query>& queries, int64_t b, int64_t h, bool plain, Results* r) {
    for (int64_t t = 0; t < c_.tokens; ++t) {
      double top = -kInf, total = 0;
      for (const Query& q : queries)
        if (q.out_token == t) top = std::isnan(q.lse) ? q.lse : std::fmax(top, q.lse);
      for (const Query& q : queries)
        if (q.out_token == t) add(total, std::exp(q.lse - top), plain);
      if (total == 0) continue;
      r->lse[size_t(lse_index(b, h, t))] = top + std::log(total);
      for (const Query& q : queries) {
        if (q.out_token != t) continue;
        const double a = rounded(std::exp(q.lse - top) / total, plain);
        for (int64_t e = 0; e < c_.head_dim; ++e) {
          add(r->out[size_t(at(b, h, t) + e)], a * q.out[size_t(e)], plain);
          r->rows[size_t(index(b, h, q.row, rows_) + e)] = q.out[size_t(e)];
        }
      }
    }
  }

  void differentiate(const Query& q, int64_t b, int64_t h, bool plain, Results* r) {
    const auto grad = [&](int64_t e) {
      return grad_.at(c_.expanded_grad ? 0 : at(b, h, q.out_token) + e);
    };
    double delta = 0;
    for (int64_t e = 0; e < c_.head_dim; ++e) add(delta, grad(e) * q.out[size_t(e)], plain);
    if (c_.grad_lse) delta -= grad_lse_[size_t(lse_index(b, h, q.out_token))];
    const double lse = r->lse[size_t(lse_index(b, h, q.out_token))];
    for (size_t j = 0; j < q.keys.size(); ++j) {
      if (q.keys[j] < 0) continue;
      const int64_t key = at(b, h, q.keys[j]);
      const double p = rounded(std::exp(q.scores[j] - lse), plain);
      double dp = 0;
      for (int64_t e = 0; e < c_.head_dim; ++e) add(dp, grad(e) * v_.at(key + e), plain);
      const double ds = rounded(p * (rounded(dp, plain) - delta), plain) * scale();
      for (int64_t e = 0; e < c_.head_dim; ++e) {
        add(r->dv[size_t(key + e)], p * grad(e), plain);
        if (q.token < 0) continue;
        add(r->dk[size_t(key + e)], ds * q_.at(at(b, h, q.token) + e), plain);
        add(r->dq[size_t(at(b, h, q.token) + e)], ds * k_.at(key + e), plain);
      }
    }
  }

  // ---- the kernels ----

  RowsView view(Array& t, int64_t rows) const {
    const int64_t row = c_.heads * c_.head_dim;
    return {t.data(), rows * row, row, c_.head_dim};
  }

  AttentionInputs inputs() {
    return {c_.type,
            view(q_, c_.tokens),
            view(k_, c_.tokens),
            view(v_, c_.tokens),
            {},
            c_.batch,
            c_.heads,
            c_.tokens,
            c_.tokens,
            c_.head_dim,
            nullptr,
            nullptr,
            float(scale()),
            c_.causal};
  }

  static double nan() { return NAN; }

  Forward new_forward(DilatedForward* p, std::vector<float>* row_lse) {
    Forward r{Array(c_.type, elements(c_.tokens), nan), Array(c_.type, elements(rows_), nan),
              std::vector<float>(exact_.lse.size(), NAN)};
    row_lse->assign(size_t(c_.batch * c_.heads * rows_), NAN);
    *p = DilatedForward{};
    p->in = inputs();
    p->branches = branches_.data();
    p->branch_count = int64_t(branches_.size());
    p->row_count = rows_;
    p->row_lse = row_lse->data();
    return r;
  }

  // Whole branches; or every part of a segment on its own, from last to first.
  Forward forward(bool apart) {
    DilatedForward p;
    std::vector<float> row_lse;
    Forward r = new_forward(&p, &row_lse);
    p.out = view(r.out, c_.tokens);
    p.rows = view(r.rows, rows_);
    p.lse = r.lse.data();
    p.keep_rows = true;
    const DilatedForwardKernels& kernels = isa::dilated_forward_kernels();
    const Poisoned scratch(size_t(kernels.scratch_bytes(p)));
    std::vector<DilatedUnit> units;
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t h = 0; h < c_.heads; ++h)
        for (int64_t i = 0; i < p.branch_count; ++i) {
          const DilatedBranch& branch = branches_[size_t(i)];
          if (!apart) units.push_back({i, b, h, 0, branch.segments, 0, 1});
          const int64_t parts = kernels.blocks(p, branch.slots, branch.slots) + 1;
          for (int64_t s = 0; apart && s < branch.segments; ++s)
            for (int64_t part = 0; part < parts; ++part)
              units.push_back({i, b, h, s, 1, part, parts});
        }
    if (apart) std::reverse(units.begin(), units.end());
    for (const DilatedUnit& u : units) kernels.attend(p, u, scratch.get());
    const int64_t step = apart ? 7 : c_.tokens;
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t t = 0; t < c_.tokens; t += step)
        kernels.mix(p, b, 0, c_.heads, t, std::min(t + step, c_.tokens), scratch.get());
    return r;
  }

  // As the host without need of the branches: one head in flight, its results together.
  Forward forward_by_head() {
    DilatedForward p;
    std::vector<float> row_lse;
    Forward r = new_forward(&p, &row_lse);
    p.out = view(r.out, c_.tokens);
    p.lse = r.lse.data();
    Array rows(c_.type, rows_ * c_.head_dim, nan);
    const int64_t head = rows_ * c_.head_dim;
    p.rows = {rows.data(), c_.heads * head, c_.head_dim, head};
    const DilatedForwardKernels& kernels = isa::dilated_forward_kernels();
    const Poisoned scratch(size_t(kernels.scratch_bytes(p)));
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t h = 0; h < c_.heads; ++h) {
        p.first_head = b * c_.heads + h;
        for (int64_t i = 0; i < p.branch_count; ++i)
          kernels.attend(p, {i, b, h, 0, branches_[size_t(i)].segments, 0, 1}, scratch.get());
        kernels.mix(p, b, h, 1, 0, c_.tokens, scratch.get());
      }
    if (!rows.intact()) r.out.set(0, NAN);
    return r;
  }

  Backward backward(bool reversed) {
    Array rows(c_.type, elements(rows_), nan);
    for (size_t i = 0; i < exact_.rows.size(); ++i) rows.set(int64_t(i), exact_.rows[i]);
    std::vector<float> lse(exact_.lse.begin(), exact_.lse.end());
    const std::vector<float> zeros(exact_.dq.size());
    Backward r{zeros, zeros, zeros};
    DilatedBackward p{};
    p.in = inputs();
    p.branches = branches_.data();
    p.branch_count = int64_t(branches_.size());
    p.rows = view(rows, rows_);
    p.grad = c_.expanded_grad ? RowsView{grad_.data(), 0, 0, 0} : view(grad_, c_.tokens);
    p.grad_dim_stride = c_.expanded_grad ? 0 : 1;
    p.lse = {lse.data(), c_.heads * c_.tokens, c_.tokens, 1};
    p.grad_lse = {c_.grad_lse ? grad_lse_.data() : nullptr, c_.heads * c_.tokens, c_.tokens, 1};
    const int64_t row = c_.heads * c_.head_dim;
    p.dq = {reinterpret_cast<char*>(r.dq.data()), c_.tokens * row, row, c_.head_dim};
    p.dk = p.dv = p.dq;
    p.dk.data = reinterpret_cast<char*>(r.dk.data());
    p.dv.data = reinterpret_cast<char*>(r.dv.data());
    const DilatedBackwardKernels& kernels = isa::dilated_backward_kernels();
    const Poisoned scratch(size_t(kernels.scratch_bytes(p)));
    for (int64_t i = 0; i < p.branch_count; ++i) {
      const Poisoned sums(size_t(kernels.sums_floats(p, i)) * sizeof(float));
      for (int64_t b = 0; b < c_.batch; ++b)
        for (int64_t h = 0; h < c_.heads; ++h)
          for (int64_t s = 0; s < branches_[size_t(i)].segments; ++s) {
            const DilatedProblem at{i, b, h, s, c_.fine, reinterpret_cast<float*>(sums.get())};
            const BackwardGrid g = kernels.grid(p, at);
            for (int64_t step = 0; step < g.steps(); ++step)
              for (int64_t lane = 0; lane < g.lanes(); ++lane)
                kernels.cell(p, at, step, reversed ? g.lanes() - 1 - lane : lane, scratch.get());
          }
    }
    return r;
  }

  bool rounds(const std::vector<float>& from) {
    Array to(c_.type, int64_t(from.size()));
    isa::dilated_backward_kernels().round(from.data(), c_.type, to.data(), int64_t(from.size()));
    bool ok = to.intact();
    for (size_t i = 0; i < from.size(); ++i) ok &= to.at(int64_t(i)) == round_to(c_.type, from[i]);
    if (!ok) std::printf("  sums are not rounded\n");
    return ok;
  }

  static double value(const Array& t, size_t i) { return t.at(int64_t(i)); }
  static double value(const std::vector<float>& t, size_t i) { return t[i]; }

  template <typename Got>
  bool compare(const char* name, const Got& got, std::vector<double> Results::* member,
               double terms) {
    Error ours, plain;
    for (size_t i = 0; i < (exact_.*member).size(); ++i) {
      ours.add(value(got, i), (exact_.*member)[i]);
      plain.add((plain_.*member)[i], (exact_.*member)[i]);
    }
    return report(name, ours, plain, kEps[int(c_.type)], terms);
  }

  Case c_;
  Array q_, k_, v_, grad_;
  std::vector<float> grad_lse_;
  std::vector<DilatedBranch> branches_;
  int64_t rows_ = 0;
  Results exact_, plain_;
};

std::vector<Case> cases(ElementType type) {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, std::vector<int64_t> lengths,
                       std::vector<int64_t> ratios) -> Case& {
    Case c;
    c.name = std::string(kTypeNames[int(type)]) + "/" + name;
    c.type = type;
    c.lengths = std::move(lengths);
    c.ratios = std::move(ratios);
    all.push_back(c);
    return all.back();
  };
  for (int64_t d : {8, 24, 48, 64, 96, 256}) {
    Case& c = add("head_dim_" + std::to_string(d), {8, 24, 64}, {1, 2, 4});
    c.head_dim = d;
    c.heads = 4;
  }
  const struct {
    const char* name;
    std::vector<int64_t> lengths, ratios;
  } layouts[] = {{"one_dense_branch", {64}, {1}},
                 {"ratio_does_not_divide", {5, 9, 13}, {1, 2, 4}},
                 {"rows_no_branch_covers", {12, 20}, {2, 3}},
                 {"ratio_above_heads", {16, 32}, {1, 8}},
                 {"ratio_above_segment", {3, 16}, {5, 1}},
                 {"the_same_twice", {16, 16}, {1, 1}}};
  for (const auto& layout : layouts)
    for (int variant = 0; variant < 4; ++variant) {
      Case& c = add(layout.name, layout.lengths, layout.ratios);
      c.causal = variant & 1;
      c.torchscale = variant & 2;
      if (c.causal) c.name += "_causal";
      if (c.torchscale) c.name += "_torchscale";
    }
  for (int64_t n : {1, 2, 16, 17, 63, 65}) {
    Case& c = add("tokens_" + std::to_string(n), {8, 24, 64}, {1, 2, 4});
    c.tokens = n;
    c.batch = 2;
  }
  add("scores_far_below_zero", {32}, {1}).far_from = 32;
  add("negative_scale", {8, 24}, {1, 2}).scale = -0.4;
  add("nan_row", {8, 24}, {1, 2}).nan_token = 19;
  add("no_grad_lse", {8, 24}, {1, 2}).grad_lse = false;
  add("expanded_grad", {8, 24}, {1, 2}).expanded_grad = true;
  for (const bool torchscale : {false, true}) {
    Case& c = add(torchscale ? "ranges_torchscale" : "ranges", {299, 700}, {1, 2});
    c.tokens = 590;
    c.heads = 2;
    c.head_dim = 8;
    c.fine = true;
    c.torchscale = torchscale;
  }
  Case& chunks = add("several_chunks", {1101, 40}, {1, 3});
  chunks.tokens = 1150;
  chunks.heads = 1;
  chunks.head_dim = 8;
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
