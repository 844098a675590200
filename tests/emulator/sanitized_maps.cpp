// A program for the sanitizers: a structured bias, windows and segments of slots on the emulator,
// over memory of exact size. bfloat16, head dim 24.
#include "attention_driver.h"

#include "attention/structured_gradient.cuh"
#include "attention/window_table.cuh"
#include "dilated_attention.cuh"
#include "exact_memory.h"

using namespace vitkit;
using namespace vitkit::attention;
using namespace emulator;

namespace {

using T = __nv_bfloat16;
constexpr int kHeadDim = 24, kOf = 32;

bool report(const char* name, const char* error, bool written) {
  if (error == nullptr && written) return true;
  std::printf("%s: %s\n", name, error ? error : "not all was written");
  return false;
}

// Rows [tokens, heads] of one batch, and what becomes of them. gradient_bytes: of an element.
struct Tokens {
  Memory q, k, v, grad, out, dq, dk, dv, lse, delta;
  size_t of_q, of_k, statistics;

  Tokens(int n_q, int n_k, int heads, size_t gradient_bytes = 2)
      : of_q(size_t(n_q * heads * kHeadDim)),
        of_k(size_t(n_k * heads * kHeadDim)),
        statistics(size_t(n_q * heads)) {
    q = normal(of_q), k = normal(of_k), v = normal(of_k), grad = normal(of_q);
    out = empty(of_q * 2), dq = empty(of_q * gradient_bytes);
    dk = empty(of_k * gradient_bytes), dv = empty(of_k * gradient_bytes);
    lse = empty(statistics * 4), delta = empty(statistics * 4);
  }

  BackwardTensors tensors(int n_q, int heads) const {
    const auto rows = [&](const Memory& m) {
      return Rows{m.data.get(), 0, int64_t(heads) * kHeadDim, kHeadDim};
    };
    BackwardTensors t{};
    t.q = rows(q), t.k = rows(k), t.v = rows(v), t.out = rows(out), t.grad = rows(grad);
    t.dq = rows(dq), t.dk = rows(dk), t.dv = rows(dv);
    t.lse = lse.as<float>(), t.delta = delta.as<float>(), t.lse_head = n_q;
    t.head_dim = kHeadDim, t.scale = 0.2f * kLog2e;
    return t;
  }
  bool written() const {
    return finite(out, of_q) && finite(dq, of_q) && finite(dk, of_k) && finite(dv, of_k);
  }
};

// A grid of 5 x 7 keys, in two steps of lanes.
bool structured(uint64_t seed) {
  constexpr int kQueries = 21, kHeight = 5, kWidth = 7, kKeys = kHeight * kWidth;
  const Tokens x(kQueries, kKeys, 1);
  const Memory rel_h = normal(kQueries * kHeight), rel_w = normal(kQueries * kWidth);
  const Memory drel_h = empty(kQueries * kHeight * 2), drel_w = empty(kQueries * kWidth * 2);
  StructuredTerm term{};
  term.decomposed = {rel_h.data.get(), rel_w.data.get(), Element::bf16,      0, 0, kHeight, 0, 0,
                     kWidth,           kHeight,          Divisor::of(kWidth)};
  term.drel_h = drel_h.data.get(), term.drel_w = drel_w.data.get(), term.heads = 1;
  const StructuredBackward p{
      x.tensors(kQueries, 1), {1, 1, kQueries, kKeys, 1, nullptr, nullptr}, term};
  const char* error =
      launch_forward<T, kOf>(StructuredForward{forward_of(p), p.map, term}, kQueries, Stream{seed});
  if (!error) error = launch_backward<T, kOf>(p, kQueries, kKeys, Stream{seed});
  return report(
      "structured", error,
      x.written() && finite(drel_h, kQueries * kHeight) && finite(drel_w, kQueries * kWidth));
}

// 3 x 5 tokens in windows of 2 x 4, shifted, cosine attention.
bool windows(uint64_t seed) {
  constexpr int kHeight = 3, kWidth = 5, kTokens = kHeight * kWidth, kPlaces = 8, kSlots = 3 * 7;
  const Tokens x(kTokens, kTokens, 1);
  const Memory table = normal_floats(kSlots), gain = normal_floats(1), pads = normal(3 * kHeadDim);
  WindowMap map{1, 1,    kHeight, kWidth,          2,        2,        2,      Divisor::of(4), 1,
                3, true, false,   pads.data.get(), kHeadDim, kHeadDim, nullptr};
  const int64_t copies = map.blocks(16, false);
  const Memory dpads = empty(size_t(copies * 2 * kHeadDim) * 4), dgains = empty(size_t(copies) * 4);
  map.dpads = dpads.as<float>();
  const WindowTerm<true> term{table.as<float>(),  2, Divisor::of(4), 3, 5, gain.as<float>(),
                              dgains.as<float>(), 1};
  const BackwardParams<WindowMap, WindowTerm<true>> p{x.tensors(kTokens, 1), map, term};
  const Stream stream{seed};
  const char* error = launch_forward<T, kOf>(
      ForwardParams<WindowMap, WindowTerm<true>>{forward_of(p), map, term}, kPlaces, stream);
  if (!error) error = launch_backward<T, kOf>(p, kPlaces, kPlaces, stream);
  const BiasGradientPlan plan = plan_window_scores<T, kOf>(map);
  const Memory scores = empty(size_t(plan.copies) * kPlaces * kPlaces * 4);
  const Memory dtable = empty(kSlots * 4);
  if (!error) error = launch_window_scores<T, kOf>(p, plan, scores.as<float>(), stream);
  if (!error)
    error = launch_window_dtable({scores.as<float>(), dtable.as<float>(), plan.copies, 1, 2, 4},
                                 stream);
  return report("windows", error,
                x.written() && finite_floats(dpads, size_t(copies * 2 * kHeadDim)) &&
                    finite_floats(dgains, size_t(copies)) && finite_floats(dtable, kSlots));
}

// Segments that drift, one of them dense.
bool slots(uint64_t seed) {
  constexpr int kTokens = 19, kHeads = 2;
  const int64_t lengths[] = {5, 9}, ratios[] = {1, 2};
  const DilatedLayout layout(kTokens, kHeads, 2, lengths, ratios, true);
  const Tokens x(kTokens, kTokens, kHeads, 4);
  const size_t of_rows = size_t(layout.rows) * kHeads;
  const Memory parts = empty(of_rows * kHeadDim * 2), part_lse = empty(of_rows * 4),
               delta = empty(of_rows * 4);
  const Stream stream{seed};
  DilatedBackward p{x.tensors(kTokens, kHeads), {1, kHeads, kTokens}, {}};
  DilatedForward f{forward_of(p), {1, kHeads, kTokens}, {}};
  MixParams mix{};
  mix.out = p.out;
  mix.lse = x.lse.as<float>();
  p.out = f.out = mix.parts = {parts.data.get(), 0, kHeads * kHeadDim, kHeadDim};
  p.lse = f.lse = mix.part_lse = part_lse.as<float>();
  p.delta = mix.delta = delta.as<float>();
  p.lse_head = f.lse_head = mix.row_count = layout.rows;
  mix.batch = 1, mix.heads = kHeads, mix.tokens = kTokens, mix.head_dim = kHeadDim;
  mix.count = layout.count;
  std::copy(layout.branches, layout.branches + layout.count, mix.branches);
  const char* error = launch_dilated_forward<T, kOf>(f, layout, stream);
  if (!error) error = launch_mix<T>(mix, false, stream);
  mix.out = p.grad;
  if (!error) error = launch_mix<T>(mix, true, stream);
  for (bool keys : {true, false})
    if (!error) error = launch_dilated_gradient<T, kOf>(p, layout, keys, stream);
  return report("slots", error,
                finite(x.out, x.of_q) && finite_floats(x.lse, x.statistics) &&
                    finite_floats(x.dq, x.of_q) && finite_floats(x.dk, x.of_k) &&
                    finite_floats(x.dv, x.of_k));
}

}  // namespace

int main() {
  bool ok = structured(1);
  ok &= windows(2);
  ok &= slots(3);
  std::printf(ok ? "done\n" : "failed\n");
  return ok ? 0 : 1;
}
