// Entry points for ctypes: window_attention's launches on the emulator, for few head dims.
#include "attention_driver.h"

#include "attention/window_table.cuh"

using namespace vitkit;
using namespace vitkit::attention;

extern "C" {

struct Call {
  BackwardParams<WindowMap, WindowTerm<true>> params;  // cosine attention if logit_scale
  Element element;
  int window_width;
  float *dtable, *dlogit_scale, *dpads;  // dpads [heads, 2, head_dim]; null: no gradient
  int chunks;                            // partial sums of the table's gradient, 0: as planned
  uint64_t seed;
};

size_t emulated_call_size() { return sizeof(Call); }
}

namespace {

// f(params, T, head dim) with the kernels for a term.
template <typename F>
const char* with_window_kernel(const Call& call, F&& f) {
  auto p = call.params;
  p.map.window_width = p.term.window_width = Divisor::of(call.window_width);
  if (p.term.logit_scale)
    return with_kernel<32>(call.element, p.head_dim, [&]<typename T, int kHeadDim>() {
      return f.template operator()<T, kHeadDim>(p);
    });
  const auto& t = p.term;
  const BackwardParams<WindowMap, WindowTerm<false>> plain{
      p,
      p.map,
      {t.table, t.window_height, t.window_width, t.limit_y, t.limit_x, nullptr, nullptr, t.heads}};
  return with_few_kernels<96>(call.element, p.head_dim, [&]<typename T, int kHeadDim>() {
    return f.template operator()<T, kHeadDim>(plain);
  });
}

}  // namespace

extern "C" {

// Null, or what was undefined.
const char* emulated_forward(const Call* call) {
  return with_window_kernel(*call, [&]<typename T, int kHeadDim>(const auto& p) {
    return launch_forward<T, kHeadDim>(
        ForwardParams<WindowMap, decltype(p.term)>{forward_of(p), p.map, p.term}, p.map.places(),
        Stream{call->seed});
  });
}

const char* emulated_backward(const Call* call) {
  return with_window_kernel(*call, [&]<typename T, int kHeadDim>(auto p) -> const char* {
    const Stream stream{call->seed};
    const int places = p.map.places(), heads = p.map.heads;
    const int warps = dq_warps<T, kHeadDim>(p.term, places);
    const int64_t copies = p.map.blocks(16 * warps, false) / heads * warps;
    const int64_t of_pad = int64_t(heads) * 2 * p.head_dim;
    std::vector<float> gains = poisoned(copies * heads), pads = poisoned(copies * of_pad);
    if (call->dlogit_scale) p.term.dlogit_scale = gains.data();
    if (call->dpads) p.map.dpads = pads.data();
    const char* error = launch_backward<T, kHeadDim>(p, places, places, stream);
    if (!error && call->dlogit_scale)
      error = launch_partial_sums(gains.data(), call->dlogit_scale, Element::f32, copies, heads,
                                  stream);
    if (!error && call->dpads)
      error = launch_partial_sums(pads.data(), call->dpads, Element::f32, copies, of_pad, stream);
    if (error || !call->dtable) return error;
    BiasGradientPlan plan = plan_window_scores<T, kHeadDim>(p.map);
    if (call->chunks) {
      plan.copies = plan.copies / plan.chunks * call->chunks;
      plan.chunks = call->chunks;
    }
    std::vector<float> scores = poisoned(int64_t(plan.copies) * heads * places * places);
    error = launch_window_scores<T, kHeadDim>(p, plan, scores.data(), stream);
    if (error) return error;
    return launch_window_dtable({scores.data(), call->dtable, plan.copies, heads,
                                 p.map.window_height, p.map.window_width.value},
                                stream);
  });
}
}
