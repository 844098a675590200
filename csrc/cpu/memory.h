// Pages of large fresh outputs.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vitkit::cpu {

// Asks for huge pages under a large buffer that is about to be written for the first time: an
// allocation of that size is mapped afresh, and its 4 KiB page faults cost more than the kernel.
// Harmless where the pages exist already or the system refuses.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kHugePage = int64_t(2) << 20, kWorthIt = 2 * kHugePage;
  if (bytes < kWorthIt) return;
  const auto begin =
      (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
  const auto end =
      (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~uintptr_t(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

template <typename Tensor>
void prefer_huge_pages(Tensor& t) {
  prefer_huge_pages(t.mutable_data_ptr(), t.numel() * int64_t(t.element_size()));
}

}  // namespace vitkit::cpu
