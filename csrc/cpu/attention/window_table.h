// The bias table of window attention, unfolded along x.
//
// The bias of query (iy, ix) and key (jy, jx) is T[iy - jy + wh - 1][ix - jx + ww - 1]. Unfolded it
// is E[ix][jy - iy + wh - 1][jx]: for one query, the keys of the whole window in their own order
// are one run of consecutive elements, so a row of scores adds its bias with plain vector loads,
// and a row of gradients is added to a mirror of E the same way. E has ww (2 wh - 1) ww elements
// where the matrix of all pairs has (wh ww)^2, and is shared by all windows.
#pragma once

#include "window_attention.h"

namespace vitkit::cpu {

constexpr int64_t kUnfoldedTail = 16;  // a vector that starts inside E may end behind it

inline int64_t unfolded_elements(const WindowGrid& g) { return g.ww * (2 * g.wh - 1) * g.ww; }

// Distance of the tables of two heads.
inline int64_t unfolded_stride(const WindowGrid& g) {
  return (unfolded_elements(g) + 2 * kUnfoldedTail - 1) / kUnfoldedTail * kUnfoldedTail;
}

// Where the run of query (iy, ix) begins.
inline int64_t unfolded_row(const WindowGrid& g, int64_t iy, int64_t ix) {
  return (ix * (2 * g.wh - 1) + g.wh - 1 - iy) * g.ww;
}

// f(element of E, row of the table), in the order of E.
template <typename F>
void for_each_unfolded(const WindowGrid& g, const F& f) {
  int64_t element = 0;
  for (int64_t ix = 0; ix < g.ww; ++ix)
    for (int64_t r = 0; r < 2 * g.wh - 1; ++r)
      for (int64_t jx = 0; jx < g.ww; ++jx)
        f(element++, (2 * g.wh - 2 - r) * (2 * g.ww - 1) + ix - jx + g.ww - 1);
}

// table: one head's column, its rows `stride` apart.
inline void unfold_table(const WindowGrid& g, const float* table, int64_t stride, float factor,
                         float* to) {
  for_each_unfolded(g, [&](int64_t e, int64_t row) { to[e] = table[row * stride] * factor; });
  for (int64_t e = unfolded_elements(g); e < unfolded_stride(g); ++e) to[e] = 0.f;
}

// The gradient of the table from that of E.
inline void fold_table(const WindowGrid& g, const float* from, int64_t stride, float* table) {
  for (int64_t row = 0; row < (2 * g.wh - 1) * (2 * g.ww - 1); ++row) table[row * stride] = 0.f;
  for_each_unfolded(g, [&](int64_t e, int64_t row) { table[row * stride] += from[e]; });
}

}  // namespace vitkit::cpu
