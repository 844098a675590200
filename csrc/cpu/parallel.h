// parallel_for over torch's own intra-op pool (torch.set_num_threads is obeyed, nested calls run
// serially as torch's do). A child made by fork() inherits no pool threads, and GNU OpenMP would
// wait for them for ever: there the work runs on the calling thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace vitkit::cpu {

bool in_forked_child();

inline int64_t num_threads() {
  return in_forked_child() ? 1 : int64_t(torch::stable::get_num_threads());
}

// Calls f(begin, end) on disjoint ranges that cover [begin, end); at least `grain` iterations each.
// f must not throw: checks belong before the loop.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= grain || num_threads() == 1) {
    f(begin, end);
  } else {
    torch::stable::parallel_for(begin, end, grain, f);
  }
}

}  // namespace vitkit::cpu
