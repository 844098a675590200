// Entry points for ctypes: flash_attention's launches on the emulator, for a few head dims.
#include "emulator.h"
// The kernels and launches, by the same files nvcc compiles.
#include "attention/bias_gradient.cuh"
#include "attention/forward.cuh"

#include <vector>

using namespace vitkit;
using namespace vitkit::attention;

// Mutants make do with one head dim and dtype.
#ifndef EMULATED_HEAD_DIMS
#define EMULATED_HEAD_DIMS 32, sizeof(T) == 4 ? 96 : 80, 192
#endif

namespace {

template <typename T, typename F>
const char* with_head_dim(int head_dim, F&& f) {
  const char* result = "no such head dim in this driver";
  const auto try_all = [&]<int... kHeadDim>(std::integer_sequence<int, kHeadDim...>) {
    (void)((head_dim <= kHeadDim && (result = f.template operator()<T, kHeadDim>(), true)) || ...);
  };
  try_all(std::integer_sequence<int, EMULATED_HEAD_DIMS>{});
  return result;
}

template <typename F>
const char* with_kernel(Element element, int head_dim, F&& f) {
  if (element == Element::bf16) return with_head_dim<__nv_bfloat16>(head_dim, f);
#ifdef EMULATED_BF16_ONLY
  return "no such dtype in this driver";
#else
  if (element == Element::f32) return with_head_dim<float>(head_dim, f);
  return with_head_dim<__half>(head_dim, f);
#endif
}

}  // namespace

extern "C" {

struct Call {
  BackwardParams<SequenceMap, DenseTerm> params;
  Element element;
  int rows_q, rows_k;
  void* dbias;  // null: no gradient
  int bias_sizes[4];
  int chunks;  // partial sums of a tile of dbias, 0: as planned
  uint64_t seed;
};

size_t emulated_call_size() { return sizeof(Call); }

// Null, or what was undefined.
const char* emulated_forward(const Call* call) {
  const auto& b = call->params;
  const ForwardParams<SequenceMap, DenseTerm> p{
      b.q,         b.k,        b.v,        b.out,    const_cast<float*>(b.lse),
      b.lse_batch, b.lse_head, b.head_dim, b.causal, b.scale,
      b.map,       b.term};
  return with_kernel(call->element, b.head_dim, [&]<typename T, int kHeadDim>() {
    const Stream stream{call->seed};
    if (p.term.data || !(p.scale > 0.f))
      return launch_forward<T, kHeadDim>(p, call->rows_q, stream);
    return launch_forward<T, kHeadDim>(without_term(p), call->rows_q, stream);
  });
}

const char* emulated_backward(const Call* call) {
  const auto& p = call->params;
  return with_kernel(call->element, p.head_dim, [&]<typename T, int kHeadDim>() -> const char* {
    const Stream stream{call->seed};
    const char* error =
        p.term.data
            ? launch_backward<T, kHeadDim>(p, call->rows_q, call->rows_k, stream)
            : launch_backward<T, kHeadDim>(without_term(p), call->rows_q, call->rows_k, stream);
    if (error || !call->dbias) return error;
    const int* sizes = call->bias_sizes;
    BiasGradientPlan plan =
        plan_bias_gradient<T, kHeadDim>(p.map, sizes[0], sizes[1], sizes[2], sizes[3]);
    if (call->chunks) {
      plan.copies = plan.copies / plan.chunks * call->chunks;
      plan.chunks = call->chunks;
    }
    const int64_t count = int64_t(sizes[0]) * sizes[1] * sizes[2] * sizes[3];
    std::vector<float> sums(size_t(plan.copies * count), NAN);
    BiasGradientParams<SequenceMap> g{};
    g.backward = p;
    g.sums = sums.data();
    g.batches = sizes[0];
    g.heads = sizes[1];
    g.queries = sizes[2];
    g.keys = sizes[3];
    error = launch_bias_gradient<T, kHeadDim>(g, plan, stream);
    if (error) return error;
    return launch_bias_sum({sums.data(), call->dbias, p.term.element, count, plan.copies}, stream);
  });
}
}
