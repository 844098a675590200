// Host side of the attention ops: independent items to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "parallel.h"
#include "scratch.h"

namespace vitkit::cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr double kFlopsPerThread = 2e6;  // about 20 us, several times what waking a thread costs

inline int64_t threads_for(double flops) {
  return std::clamp<int64_t>(int64_t(std::min(flops / kFlopsPerThread, 1e6)), 1, num_threads());
}

// Takes items 0, 1, ... with `threads` threads; f(item, scratch, thread).
template <typename F>
void run_items(int64_t items, int64_t threads, size_t scratch_bytes, const F& f) {
  std::atomic<int64_t> next{0}, started{0};
  parallel_for(0, std::min(threads, items), 1, [&](int64_t, int64_t) {
    void* scratch = thread_scratch(scratch_bytes);
    const int64_t thread = started.fetch_add(1, std::memory_order_relaxed);
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;)
      f(item, scratch, thread);
    release_large_scratch();
  });
}

}  // namespace vitkit::cpu
