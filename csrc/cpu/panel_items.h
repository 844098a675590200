// Host side of products with a weight: groups of panels of its columns and ranges of rows to
// threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/schedule.h"

namespace vitkit::cpu {

struct PanelShares {
  int64_t groups, ranges;
};

// `groups` groups of panels or more, and at most `most_ranges` ranges, so that each thread finds
// `per_thread` items.
inline PanelShares share_panels(int64_t panels, int64_t groups, int64_t most_ranges,
                                int64_t threads, int64_t per_thread) {
  PanelShares s{std::min(panels, groups), 1};
  if (threads == 1) return s;
  const int64_t wanted = per_thread * threads;
  s.ranges = std::clamp<int64_t>(most_ranges, 1, divide_up(wanted, s.groups));
  s.groups = std::min(panels, std::max(s.groups, divide_up(wanted, s.ranges)));
  if (s.ranges == 1) s.groups = std::min(panels, divide_up(s.groups, threads) * threads);
  return s;
}

// Item i is range i % ranges of group i / ranges.
template <typename Problem, typename Kernels>
void run_panel_items(const Problem& p, const Kernels& kernels, int64_t threads) {
  const int64_t groups = divide_up(p.columns, p.group_panels * kernels.panel);
  run_items(
      groups * p.ranges(), threads, kernels.scratch_bytes(p),
      [&](int64_t item, void* scratch, int64_t) { kernels.forward(p, item, item + 1, scratch); });
}

}  // namespace vitkit::cpu
