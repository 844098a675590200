// Runs flash_attention's CPU forward kernel of one instruction set, without PyTorch, against
// float64.
//
// Compiled together with csrc/cpu/flash_attention_kernel.cpp and the same -DVITKIT_ISA and flags;
// with -DVITKIT_EMULATE_AMX also where there is no AMX. Every case checks out and lse by the
// project's rule: at most twice the error of the same computation done plainly in the element type,
// plus rounding. Inputs lie before a canary, scratch and outputs start as NaN, and the work is done
// twice, in two different splits, which must agree bit by bit.
//
//   attention_forward_driver [substring of a case name]      exit code 0: every case passed
#include "driver.h"

#include <algorithm>
#include <memory>

#include "flash_attention.h"
#include "structured_bias.h"

namespace vitkit::cpu::VITKIT_ISA {
const FlashForwardKernels& flash_forward_kernels();
}

using namespace vitkit::cpu;
using namespace driver;

namespace {

enum class Bias { none, dense, broadcast_batch, per_key, per_query, transposed, mask, row_mask };

struct Case {
  std::string name;
  ElementType type = ElementType::f32;
  int64_t batch = 1, heads = 2, nq = 1, nk = 1, head_dim = 64;
  bool causal = false;
  double scale = 0;  // 0: 1 / sqrt(head_dim)
  double magnitude = 1;
  Bias bias = Bias::none;
  ElementType bias_type = ElementType::f32;
  Structure structure = Structure::none;
  int64_t width = 1;       // of a decomposed bias
  bool broadcast = false;  // k and v are the same for every head (stride 0)
  int64_t nan_row = -1;    // of q, in every head
  std::vector<int64_t> starts_q, starts_k;
};

struct Problem {
  FlashForward p{};
  std::vector<int64_t> first_item;
  int64_t items = 0;
};

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        kv_heads_(c.broadcast ? 1 : c.heads),
        q_(c.type, rows(c.nq) * c.heads * c.head_dim, [&] { return c.magnitude * normal(); }),
        k_(c.type, rows(c.nk) * kv_heads_ * c.head_dim, [&] { return c.magnitude * normal(); }),
        v_(c.type, rows(c.nk) * kv_heads_ * c.head_dim, normal),
        bias_(bias_type(), bias_elements(), [&] { return bias_value(); }),
        structured_(c.structure, c.bias_type, c.batch, c.heads, c.nq, c.nk, c.width) {
    if (c.nan_row >= 0)
      for (int64_t b = 0; b < dense_batch(); ++b)
        for (int64_t h = 0; h < c.heads; ++h)
          q_.set(((b * c.nq + c.nan_row) * c.heads + h) * c.head_dim + 3, NAN);
    if (c.bias == Bias::row_mask)
      for (int64_t j = 0; j < c.nk; ++j)
        bias_.set(c.nk * (c.nq / 2) + j, 0);  // one row attends nothing
  }

  bool check() {
    const std::vector<float> lse = run(false);
    const Array out = *out_;
    const std::vector<float> lse_again = run(true);
    bool ok = q_.intact() && k_.intact() && v_.intact() && out.intact() && out_->intact() &&
              structured_.intact();
    if (!ok) std::printf("  canary overwritten\n");
    if (!(out == *out_) || std::memcmp(lse.data(), lse_again.data(), lse.size() * 4) != 0) {
      std::printf("  another split of the work gives another result\n");
      ok = false;
    }
    Error ours, plain, ours_lse, plain_lse;
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t h = 0; h < c_.heads; ++h)
        for (int64_t i = 0; i < queries(b); ++i)
          compare(b, h, i, out, lse, ours, plain, ours_lse, plain_lse);
    const double eps = kEps[int(c_.type)];
    ok &= report("out", ours, plain, eps, double(c_.nk));
    ok &= report("lse", ours_lse, plain_lse, eps, double(c_.head_dim));
    return ok;
  }

 private:
  bool packed() const { return !c_.starts_q.empty(); }
  int64_t dense_batch() const { return packed() ? 1 : c_.batch; }
  int64_t rows(int64_t n) const { return dense_batch() * n; }
  int64_t queries(int64_t b) const {
    return packed() ? c_.starts_q[size_t(b) + 1] - c_.starts_q[size_t(b)] : c_.nq;
  }
  int64_t keys(int64_t b) const {
    return packed() ? c_.starts_k[size_t(b) + 1] - c_.starts_k[size_t(b)] : c_.nk;
  }
  double scale() const {
    return float(c_.scale == 0 ? 1 / std::sqrt(double(c_.head_dim)) : c_.scale);
  }

  bool is_mask() const { return c_.bias == Bias::mask || c_.bias == Bias::row_mask; }
  ElementType bias_type() const { return is_mask() ? ElementType::boolean : c_.bias_type; }
  double bias_value() const {
    if (is_mask()) return uniform() - 0.3;
    return uniform() < 0.1 ? -kInf : normal();
  }
  int64_t bias_elements() const {
    const int64_t square = c_.nq * c_.nk;
    switch (c_.bias) {
      case Bias::none:
        return 1;
      case Bias::broadcast_batch:
        return c_.heads * square;
      case Bias::per_key:
        return c_.batch * c_.nk;
      case Bias::per_query:
        return c_.nq;
      case Bias::row_mask:
        return square;
      default:
        return c_.batch * c_.heads * square;
    }
  }
  BiasView bias_view() {
    BiasView v{bias_.data(), bias_type(), 0, 0, c_.nk, 1};
    const int64_t square = c_.nq * c_.nk;
    switch (c_.bias) {
      case Bias::none:
        return {};
      case Bias::broadcast_batch:
        v.head_stride = square;
        break;
      case Bias::per_key:
        v.batch_stride = c_.nk;
        v.query_stride = 0;
        break;
      case Bias::per_query:
        v.query_stride = 1;
        v.key_stride = 0;
        break;
      case Bias::row_mask:
        break;
      case Bias::transposed:
        v.query_stride = 1;
        v.key_stride = c_.nq;
        [[fallthrough]];
      default:
        v.batch_stride = c_.heads * square;
        v.head_stride = square;
    }
    return v;
  }

  RowsView view(Array& t, int64_t n, int64_t heads) const {
    const int64_t row = heads * c_.head_dim;
    return {t.data(), packed() ? 0 : n * row, row, c_.broadcast && heads == 1 ? 0 : c_.head_dim};
  }

  Problem problem(float* lse) {
    Problem r;
    FlashForward& p = r.p;
    p.in = {c_.type,
            view(q_, c_.nq, c_.heads),
            view(k_, c_.nk, kv_heads_),
            view(v_, c_.nk, kv_heads_),
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
    p.out = view(*out_, c_.nq, c_.heads);
    p.out.head_stride = c_.head_dim;
    p.lse = lse;
    p.lse_batch_stride = packed() ? 0 : c_.heads * c_.nq;
    p.lse_head_stride = c_.nq;
    p.max_nk = packed() ? 0 : c_.nk;
    const FlashForwardKernels& kernels = isa::flash_forward_kernels();
    r.first_item.push_back(0);
    for (int64_t b = 0; b < c_.batch; ++b) {
      if (keys(b) > p.max_nk) p.max_nk = keys(b);
      r.items += c_.heads * kernels.blocks(p.in, queries(b), keys(b));
      r.first_item.push_back(r.items);
    }
    return r;
  }

  // All items in one call, or one by one from the last to the first. Returns lse; out is in out_.
  std::vector<float> run(bool piecewise) {
    out_.reset(
        new Array(c_.type, rows(c_.nq) * c_.heads * c_.head_dim, [] { return double(NAN); }));
    std::vector<float> lse(size_t(rows(c_.nq) * c_.heads), NAN);
    Problem r = problem(lse.data());
    if (packed()) r.p.first_item = r.first_item.data();
    const FlashForwardKernels& kernels = isa::flash_forward_kernels();
    const size_t bytes = size_t(kernels.scratch_bytes(r.p));
    const Poisoned scratch(bytes);
    if (!piecewise) kernels.run(r.p, 0, r.items, scratch.get());
    for (int64_t i = r.items; piecewise && i-- > 0;) kernels.run(r.p, i, i + 1, scratch.get());
    return lse;
  }

  // Row i of head h: exact in double, and plainly in the element type with a rounding after every
  // operation.
  void compare(int64_t b, int64_t h, int64_t i, const Array& out, const std::vector<float>& lse,
               Error& ours, Error& plain, Error& ours_lse, Error& plain_lse) {
    const int64_t d = c_.head_dim, q_first = packed() ? c_.starts_q[size_t(b)] : b * c_.nq;
    const int64_t k_first = packed() ? c_.starts_k[size_t(b)] : b * c_.nk;
    const int64_t n = c_.causal ? std::min(keys(b), i + 1) : keys(b),
                  kv_head = c_.broadcast ? 0 : h;
    const BiasView bias = bias_view();
    std::vector<double> s(size_t(n), 0), t(size_t(n), 0);
    double top = -kInf, plain_top = -kInf;
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      float plain_sum = 0;
      for (int64_t e = 0; e < d; ++e) {
        const double x = q_.at(((q_first + i) * c_.heads + h) * d + e);
        const double y = k_.at(((k_first + j) * kv_heads_ + kv_head) * d + e);
        sum += x * y;
        plain_sum += float(round_to(c_.type, x * scale()) * y);
      }
      double& exact = s[size_t(j)] = sum * scale();
      double& rounded = t[size_t(j)] = round_to(c_.type, plain_sum);
      if (bias.data) {
        const double x = get(bias.data, bias.type,
                             b * bias.batch_stride + h * bias.head_stride + i * bias.query_stride +
                                 j * bias.key_stride);
        exact = is_mask() ? (x > 0 ? exact : -kInf) : exact + x;
        rounded = is_mask() ? (x > 0 ? rounded : -kInf)
                            : round_to(c_.type, rounded + round_to(c_.type, x));
      }
      if (structured_.exists()) {
        const double x = structured_.at(b, h, i, j);
        exact += x;
        rounded = round_to(c_.type, rounded + round_to(c_.type, x));
      }
      top = std::isnan(exact) ? exact : std::fmax(top, exact);
      plain_top = std::fmax(plain_top, rounded);
    }
    if (c_.nan_row == i) top = NAN;
    double total = 0, plain_total = 0;
    for (int64_t j = 0; j < n; ++j) {
      total += std::exp(s[size_t(j)] - (top == -kInf ? 0 : top));
      plain_total += float(std::exp(float(t[size_t(j)] - (plain_top == -kInf ? 0 : plain_top))));
    }
    const double got_lse =
        lse[size_t(packed() ? h * c_.nq + q_first + i : (b * c_.heads + h) * c_.nq + i)];
    const double exact_lse = total == 0 ? -kInf : top + std::log(total);
    ours_lse.add(got_lse, exact_lse);
    plain_lse.add(total == 0 ? -kInf : float(plain_top + std::log(plain_total)), exact_lse);
    for (int64_t e = 0; e < d; ++e) {
      double sum = 0;
      float plain_sum = 0;
      for (int64_t j = 0; j < n && total != 0; ++j) {
        const double y = v_.at(((k_first + j) * kv_heads_ + kv_head) * d + e);
        sum += std::exp(s[size_t(j)] - top) / total * y;
        plain_sum += float(round_to(c_.type, std::exp(t[size_t(j)] - plain_top) / plain_total) * y);
      }
      ours.add(out.at(((q_first + i) * c_.heads + h) * d + e), sum);
      plain.add(round_to(c_.type, plain_sum), sum);
    }
  }

  Case c_;
  int64_t kv_heads_;
  Array q_, k_, v_, bias_;
  StructuredBias structured_;
  std::unique_ptr<Array> out_;
};

template <typename Add>
void add_structured(ElementType type, const Add& add) {
  for (int64_t width : {1, 3, 8, 14, 16, 33, 64, 990}) {
    const int64_t nk = width == 990 ? 990 : (width == 33 ? 35 : 6) * width;
    Case& c = add("decomposed_width_" + std::to_string(width), 21, nk, 16);
    c.structure = Structure::decomposed;
    c.width = width;
    c.bias_type = type;
    c.batch = 2;
  }
  Case& mixed = add("decomposed_float32_causal", 150, 150, 8);
  mixed.structure = Structure::decomposed;
  mixed.width = 15;
  mixed.causal = true;
  for (int64_t nk : {5, 32, 51, 1100}) {
    Case& c = add("distance_" + std::to_string(nk), 37, nk, 24);
    c.structure = Structure::distance;
    c.batch = 2;
  }
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
  add("one_query_many_keys", 1, 197, 64).heads = 3;
  add("cross_attention", 70, 77, 40).batch = 2;
  add("many_heads_per_sweep", 20, 50, 64).heads = 11;
  add("several_chunks", 37, 1100, 16);
  add("several_chunks_causal", 1090, 1090, 8).causal = true;
  add("causal", 67, 67, 24).causal = true;
  add("causal_more_keys", 20, 90, 24).causal = true;
  add("causal_more_queries", 90, 20, 24).causal = true;
  add("negative_scale", 33, 40, 32).scale = -0.7;
  add("tiny_scale", 33, 40, 32).scale = 1e-30;
  add("large_scores", 33, 40, 64).magnitude = 30;
  add("shared_keys", 30, 40, 32).broadcast = true;
  add("nan_row", 40, 45, 32).nan_row = 17;
  add("nan_row_several_chunks", 20, 1100, 8).nan_row = 7;
  struct {
    const char* name;
    Bias bias;
  } biases[] = {{"bias", Bias::dense},
                {"bias_batch", Bias::broadcast_batch},
                {"bias_keys", Bias::per_key},
                {"bias_queries", Bias::per_query},
                {"bias_transposed", Bias::transposed},
                {"mask", Bias::mask},
                {"row_without_keys", Bias::row_mask}};
  for (const auto& b : biases) {
    Case& c = add(b.name, 35, 51, 24);
    c.batch = 2;
    c.bias = b.bias;
    c.bias_type = type;
  }
  for (ElementType t : {ElementType::f32, ElementType::bf16, ElementType::f16}) {
    Case& c = add(std::string("bias_of_") + kTypeNames[int(t)], 18, 33, 16);
    c.bias = Bias::dense;
    c.bias_type = t;
  }
  Case& chunked = add("bias_causal_several_chunks", 50, 1100, 8);
  chunked.bias = Bias::dense;
  chunked.causal = true;
  add_structured(type, add);
  Case& packed = add("packed", 120, 130, 40);
  packed.batch = 5;
  packed.starts_q = {0, 17, 17, 60, 61, 120};
  packed.starts_k = {0, 33, 40, 40, 77, 130};
  Case& packed_causal = add("packed_causal_long", 1200, 1200, 8);
  packed_causal.batch = 3;
  packed_causal.causal = true;
  packed_causal.starts_q = packed_causal.starts_k = {0, 20, 1120, 1200};
  return all;
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
