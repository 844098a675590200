// Entry points for ctypes: attention with structured biases on the emulator, for few head dims.
#include "attention_driver.h"

#include "attention/structured_gradient.cuh"

using namespace vitkit;
using namespace vitkit::attention;

extern "C" {

struct Call {
  StructuredBackward params;
  Element element;
  float* dslopes;  // null: no gradient
  bool apart;      // sums of drel_h and drel_w lie in global memory, though they fit shared memory
  uint64_t seed;
};

size_t emulated_call_size() { return sizeof(Call); }

// What the kernels divide by multiplying.
int emulated_divide(int n, int d) { return Divisor::of(d).divide(n); }

// Null, or what was undefined.
const char* emulated_forward(const Call* call) {
  const auto& b = call->params;
  return with_few_kernels<96>(call->element, b.head_dim, [&]<typename T, int kHeadDim>() {
    return launch_forward<T, kHeadDim>(StructuredForward{forward_of(b), b.map, b.term}, b.map.n_q,
                                       Stream{call->seed});
  });
}

const char* emulated_backward(const Call* call) {
  StructuredBackward p = call->params;
  return with_few_kernels<96>(
      call->element, p.head_dim, [&]<typename T, int kHeadDim>() -> const char* {
        const Stream stream{call->seed};
        const StructuredPlan plan = plan_structured_gradient<T, kHeadDim>(p, p.map.n_q);
        const int64_t lines = plan.copies * p.map.heads * 16 * p.term.grid_lines();
        if (plan.sums != 0 && plan.sums != lines) return "the plan is not what it was";
        std::vector<float> sums = poisoned(lines), slopes = poisoned(plan.copies * p.map.heads);
        if (plan.sums || call->apart) p.term.sums = sums.data();
        if (call->dslopes) p.term.dslopes = slopes.data();
        const char* error = launch_backward<T, kHeadDim>(p, p.map.n_q, p.map.n_k, stream);
        if (error || !call->dslopes) return error;
        return launch_partial_sums(slopes.data(), call->dslopes, Element::f32, plan.copies,
                                   p.map.heads, stream);
      });
}
}
