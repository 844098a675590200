// A program for the sanitizers: gated_residual, swiglu and rope_2d on the emulator, over memory of
// exact size.
#include "emulator.h"
#include "exact_memory.h"
// The kernels and launches, by the same files nvcc compiles.
#include "gated_activation.cuh"
#include "gated_residual.cuh"
#include "rope_2d.cuh"

using namespace vitkit;
using namespace emulator;
using Bf16 = __nv_bfloat16;

namespace {

bool report(const char* name, const char* error, bool written) {
  if (error) std::printf("%s: %s\n", name, error);
  if (!written) std::printf("%s: not all was written\n", name);
  return !error && written;
}

// Two samples, parts that are not whole; a gate per sample or per token.
bool gate_rows(int width, int64_t rows, bool per_token, uint64_t seed) {
  namespace gr = vitkit::gated_residual;
  const size_t total = 2 * size_t(rows) * size_t(width);
  const size_t gates = per_token ? total : 2 * size_t(width);
  const int64_t part_rows = 4, parts = (rows + 3) / 4;
  const Memory x = normal(total), y = normal(total), gate = normal(gates), out = empty(2 * total);
  const Memory dy = empty(2 * total), dgate = empty(2 * gates);
  const size_t sums = 2 * size_t(parts) * size_t(width);
  const Memory partial = empty(4 * sums);
  const gr::Shape s{2, rows, width, per_token, {gate.as<void>(), Element::bf16, width}};
  const char* error = gr::gated_residual_forward(
      {s, x.as<void>(), y.as<void>(), out.as<void>(), {}}, Element::bf16, {seed});
  if (!error)
    error = gr::gated_residual_backward({s,
                                         x.as<void>(),
                                         y.as<void>(),
                                         dy.as<void>(),
                                         {dgate.as<void>(), Element::bf16},
                                         per_token ? nullptr : partial.as<float>(),
                                         parts,
                                         part_rows,
                                         {}},
                                        Element::bf16, {seed});
  return report("gated_residual", error,
                finite(out, total) && finite(dy, total) && finite(dgate, gates));
}

// The halves of one tensor, or two tensors and rows without gaps.
bool activate(int64_t columns, bool packed, uint64_t seed) {
  namespace ga = vitkit::gated_activation;
  constexpr int64_t kRows = 3;
  const size_t n = size_t(kRows * columns);
  const Memory x = normal(2 * n), grad = normal(n), y = empty(2 * n), dx = empty(4 * n);
  const int64_t stride = packed ? 2 * columns : columns;
  const auto half = [&](const Memory& m, int which) {
    return ga::Rows{m.as<Bf16>() + which * (packed ? columns : int64_t(n)), stride};
  };
  const ga::Rows of_y{y.as<void>(), columns}, of_grad{grad.as<void>(), columns};
  const char* error = ga::launch_forward<Activation::silu, true>(
      {kRows, columns, half(x, 0), half(x, 1), of_y, {}}, Element::bf16, {seed});
  if (!error)
    error = ga::launch_backward<Activation::silu, true>(
        {kRows, columns, of_grad, half(x, 0), half(x, 1), half(dx, 0), half(dx, 1), {}},
        Element::bf16, {seed});
  return report("gated_activation", error, finite(y, n) && finite(dx, 2 * n));
}

// Five tokens of two samples, the first without angles, with five heads of q and two of k.
bool rotate(int head_dim, bool interleaved, uint64_t seed) {
  constexpr int kTokens = 5;
  const size_t row = size_t(head_dim), of_q = 2 * kTokens * 5 * row, of_k = 2 * kTokens * 2 * row;
  const Memory q = normal(of_q), k = normal(of_k), turned_q = empty(2 * of_q),
               turned_k = empty(2 * of_k), cos = normal_floats((kTokens - 1) * row),
               sin = normal_floats((kTokens - 1) * row);
  const auto heads = [&](const Memory& x, const Memory& y, int count) {
    const int64_t token = int64_t(count) * head_dim;
    return rope::Heads{x.as<void>(), y.as<void>(), kTokens * token, token, head_dim, count, 0, {}};
  };
  const rope::Params p{heads(q, turned_q, 5),
                       heads(k, turned_k, 2),
                       {cos.as<float>(), 0, head_dim, 0},
                       {sin.as<float>(), 0, head_dim, 0},
                       2,
                       kTokens,
                       1,
                       head_dim,
                       false};
  const char* error = rope::rope_2d(p, Element::bf16, interleaved, {seed});
  return report("rope_2d", error, finite(turned_q, of_q) && finite(turned_k, of_k));
}

}  // namespace

int main() {
  bool ok = gate_rows(40, 11, false, 1);
  ok &= gate_rows(7, 5, false, 2);
  ok &= gate_rows(24, 3, true, 3);
  ok &= activate(24, true, 4);
  ok &= activate(12, true, 5);
  ok &= activate(7, false, 6);
  ok &= rotate(16, false, 8);
  ok &= rotate(24, true, 9);
  ok &= rotate(6, true, 10);
  std::printf(ok ? "done\n" : "failed\n");
  return ok ? 0 : 1;
}
