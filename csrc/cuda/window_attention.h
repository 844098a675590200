// What the files of window_attention call of one another. Kernels are instantiated in files without
// torch headers, which compile side by side.
#pragma once

#include "attention/forward.cuh"
#include "attention/window_table.cuh"

namespace vitkit::attention {

// Swin V2's term stands for both: without logit_scale, kernels for plain WindowTerms are taken.
using SwinTerm = WindowTerm<true>;
using WindowForward = ForwardParams<WindowMap, SwinTerm>;
using WindowBackward = BackwardParams<WindowMap, SwinTerm>;

inline WindowTerm<false> without_cosine(const SwinTerm& t) {
  return {t.table,   t.window_height, t.window_width, t.limit_y,
          t.limit_x, nullptr,         nullptr,        t.heads};
}

// Warps that leave a sum each for a head: those of dq for logit_scale, those of dk and dv for pads.
// And in what shape the sums of score gradients come.
struct WindowPlan {
  int64_t copies;
  BiasGradientPlan scores;
};

// Null, or what went wrong.
const char* window_forward(const WindowForward& p, Element element, Stream stream);
const char* window_backward(const WindowBackward& p, Element element, Stream stream);
WindowPlan plan_window(const WindowBackward& p, Element element);
const char* window_score_gradient(const WindowBackward& p, const BiasGradientPlan& plan,
                                  float* sums, Element element, Stream stream);

}  // namespace vitkit::attention
