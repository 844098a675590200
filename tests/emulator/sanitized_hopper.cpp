// A program for the sanitizers: the Hopper kernel of attention on the emulator, over memory of
// exact size.
#include "hopper_attention.cpp"

#include "exact_memory.h"

using namespace emulator;

namespace {

bool attend(const char* name, int n_q, int n_k, bool causal, uint64_t seed) {
  constexpr int kHeadDim = 64;
  const size_t of_q = size_t(n_q) * kHeadDim, of_k = size_t(n_k) * kHeadDim;
  const Memory q = normal(of_q), k = normal(of_k), v = normal(of_k), out = empty(of_q * 2),
               lse = empty(size_t(n_q) * 4);
  Call call{};
  auto& p = call.params;
  const auto rows = [](const Memory& m) { return Rows{m.data.get(), 0, kHeadDim, kHeadDim}; };
  p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = rows(out);
  p.lse = lse.as<float>(), p.lse_head = n_q, p.head_dim = kHeadDim, p.causal = causal;
  p.scale = 0.2f * kLog2e, p.map = {1, 1, n_q, n_k, 1, nullptr, nullptr};
  call.element = Element::bf16, call.seed = seed;
  if (const char* error = emulated_forward(&call)) {
    std::printf("%s: %s\n", name, error);
    return false;
  }
  if (!finite(out, of_q) || !finite_floats(lse, size_t(n_q))) {
    std::printf("%s: not all was written\n", name);
    return false;
  }
  return true;
}

}  // namespace

// More steps than stages, and both warpgroups.
int main() {
  bool ok = attend("ragged", 70, 420, false, 1);
  ok &= attend("causal", 70, 70, true, 2);
  std::printf(ok ? "done\n" : "failed\n");
  return ok ? 0 : 1;
}
