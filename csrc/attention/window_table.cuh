// The gradient of the bias table of windows: that of a dense bias [heads, places, places] which all
// windows share, folded along its diagonals.
#pragma once

#include "bias_gradient.cuh"
#include "window_map.cuh"

namespace vitkit::attention {

template <typename T, int kHeadDim>
BiasGradientPlan plan_window_scores(const WindowMap& map) {
  const int places = map.places();
  return plan_bias_gradient<T, kHeadDim>({int(map.windows()), map.heads, places, places},
                                         {1, map.heads, places, places});
}

// sums [plan.copies, heads, places, places]: of the gradients of scores, over windows.
template <typename T, int kHeadDim, typename Term>
const char* launch_window_scores(const BackwardParams<WindowMap, Term>& p,
                                 const BiasGradientPlan& plan, float* sums, Stream stream) {
  BiasGradientParams<WindowMap, Term> g{};
  g.backward = p;
  g.sums = sums;
  g.batches = 1;
  g.heads = p.map.heads;
  g.queries = g.keys = p.map.places();
  return launch_bias_gradient<T, kHeadDim>(g, plan, stream);
}

struct TableFold {
  const float* sums;  // [copies, heads, places, places]
  float* dtable;      // [slots, heads]
  int copies, heads, window_height, window_width;
};

// A warp a slot and head; its lanes take the pairs in turn.
static __global__ void __launch_bounds__(128)
    window_dtable_kernel(const __grid_constant__ TableFold p) {
  const int wh = p.window_height, ww = p.window_width, line = 2 * ww - 1;
  const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int slot = int(index / p.heads), head = int(index % p.heads);
  if (slot >= (2 * wh - 1) * line) return;
  const int dy = slot / line - (wh - 1), dx = slot % line - (ww - 1);
  // Queries (iy, ix) of the keys (iy - dy, ix - dx).
  const int rows = wh - abs(dy), columns = ww - abs(dx), first_y = max(dy, 0), first_x = max(dx, 0);
  const int places = wh * ww;
  float total = 0.f;
  for (int copy = 0; copy < p.copies; ++copy) {
    const float* const plane = p.sums + (int64_t(copy) * p.heads + head) * places * places;
    for (int i = lane_id(); i < rows * columns; i += kWarp) {
      const int iy = first_y + i / columns, ix = first_x + i % columns;
      total += plane[int64_t(iy * ww + ix) * places + (iy - dy) * ww + ix - dx];
    }
  }
  total = warp_sum(total);
  if (lane_id() == 0) p.dtable[int64_t(slot) * p.heads + head] = total;
}

inline const char* launch_window_dtable(const TableFold& p, Stream stream) {
  const int64_t warps = int64_t(2 * p.window_height - 1) * (2 * p.window_width - 1) * p.heads;
  return launch_kernel(&window_dtable_kernel, unsigned((warps + 3) / 4), 128, 0, stream, p);
}

}  // namespace vitkit::attention
