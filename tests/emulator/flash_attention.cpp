// Entry points for ctypes: flash_attention's launches on the emulator, for a few head dims.
#include "attention_driver.h"

#include "attention/bias_gradient.cuh"

using namespace vitkit;
using namespace vitkit::attention;

#ifndef EMULATED_HEAD_DIMS
#define EMULATED_HEAD_DIMS 32, 96, 192
#endif

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
  return with_kernel<EMULATED_HEAD_DIMS>(
      call->element, b.head_dim, [&]<typename T, int kHeadDim>() {
        const Stream stream{call->seed};
        if (b.term.data)
          return launch_forward<T, kHeadDim>(
              ForwardParams<SequenceMap, DenseTerm>{forward_of(b), b.map, b.term}, call->rows_q,
              stream);
        return launch_forward<T, kHeadDim>(
            ForwardParams<SequenceMap, NoTerm>{forward_of(b), b.map, {}}, call->rows_q, stream);
      });
}

const char* emulated_backward(const Call* call) {
  const auto& p = call->params;
  return with_kernel<EMULATED_HEAD_DIMS>(
      call->element, p.head_dim, [&]<typename T, int kHeadDim>() -> const char* {
        const Stream stream{call->seed};
        if (!p.term.data)
          return launch_backward<T, kHeadDim>(BackwardParams<SequenceMap, NoTerm>{p, p.map, {}},
                                              call->rows_q, call->rows_k, stream);
        const char* error = launch_backward<T, kHeadDim>(p, call->rows_q, call->rows_k, stream);
        if (error || !call->dbias) return error;
        const int* sizes = call->bias_sizes;
        BiasGradientPlan plan =
            plan_bias_gradient<T, kHeadDim>({p.map.batch, p.map.heads, p.map.n_q, p.map.n_k},
                                            {sizes[0], sizes[1], sizes[2], sizes[3]});
        if (call->chunks) {
          plan.copies = plan.copies / plan.chunks * call->chunks;
          plan.chunks = call->chunks;
        }
        const int64_t count = int64_t(sizes[0]) * sizes[1] * sizes[2] * sizes[3];
        std::vector<float> sums = poisoned(plan.copies * count);
        BiasGradientParams<SequenceMap, DenseTerm> g{};
        g.backward = p;
        g.sums = sums.data();
        g.batches = sizes[0];
        g.heads = sizes[1];
        g.queries = sizes[2];
        g.keys = sizes[3];
        error = launch_bias_gradient<T, kHeadDim>(g, plan, stream);
        if (error) return error;
        return launch_partial_sums(sums.data(), call->dbias, p.term.element, plan.copies, count,
                                   stream);
      });
}
}
