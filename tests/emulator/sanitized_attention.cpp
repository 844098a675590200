// A program for the sanitizers: attention on the emulator, over memory of exact size.
#include "flash_attention.cpp"

#include "exact_memory.h"

using namespace emulator;

namespace {

// Forward and backward; bfloat16, head dim 24.
bool attend(const char* name, SequenceMap map, bool causal, bool with_bias, bool all_written,
            uint64_t seed) {
  constexpr int kHeadDim = 24;
  const size_t n_q = size_t(map.n_q), n_k = size_t(map.n_k), heads = size_t(map.heads);
  const size_t of_q = n_q * heads * kHeadDim, of_k = n_k * heads * kHeadDim;
  const Memory q = normal(of_q), k = normal(of_k), v = normal(of_k), grad = normal(of_q);
  const Memory out = empty(of_q * 2), dq = empty(of_q * 2), dk = empty(of_k * 2),
               dv = empty(of_k * 2);
  const Memory lse = empty(heads * n_q * 4), delta = empty(heads * n_q * 4);
  const Memory bias = normal(heads * n_q * n_k), dbias = empty(heads * n_q * n_k * 2);
  const auto rows = [&](const Memory& m) {
    return Rows{m.data.get(), 0, int64_t(heads) * kHeadDim, kHeadDim};
  };
  Call call{};
  auto& p = call.params;
  p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = rows(out), p.grad = rows(grad);
  p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
  p.lse = lse.as<float>(), p.delta = delta.as<float>(), p.lse_head = map.n_q;
  p.head_dim = kHeadDim, p.causal = causal;
  p.scale = 0.2f * kLog2e, p.map = map;
  if (with_bias) {
    p.term = {bias.data.get(), Element::bf16, 0, int64_t(n_q * n_k), int64_t(n_k), 1};
    call.dbias = dbias.data.get();
    const int sizes[4] = {1, int(heads), int(n_q), int(n_k)};
    std::copy(sizes, sizes + 4, call.bias_sizes);
  }
  call.element = Element::bf16;
  call.rows_q = map.n_q, call.rows_k = map.n_k, call.seed = seed;
  const char* error = emulated_forward(&call);
  if (!error) error = emulated_backward(&call);
  if (error) {
    std::printf("%s: %s\n", name, error);
    return false;
  }
  const bool written = !all_written || (finite(out, of_q) && finite(dq, of_q) && finite(dk, of_k) &&
                                        finite(dv, of_k));
  if (!written || (with_bias && !finite(dbias, heads * n_q * n_k))) {
    std::printf("%s: not all was written\n", name);
    return false;
  }
  return true;
}

}  // namespace

// Two steps of keys, or of queries, and two warps; not more, for the thread sanitizer pays for
// every fiber.
int main() {
  bool ok = attend("dense", {1, 1, 37, 69, 1, nullptr, nullptr}, false, true, true, 1);
  ok &= attend("causal", {1, 1, 70, 37, 1, nullptr, nullptr}, true, false, true, 2);
  const auto cu = std::make_unique<int32_t[]>(4);
  const int32_t bad[4] = {5, -7, 900, 3};
  std::copy(bad, bad + 4, cu.get());
  ok &= attend("bad cu_seqlens", {1, 1, 40, 35, 3, cu.get(), cu.get()}, false, false, false, 3);
  std::printf(ok ? "done\n" : "failed\n");
  return ok ? 0 : 1;
}
