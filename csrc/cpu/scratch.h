// Working memory of one thread: allocated at first use, kept for the next call, freed when the
// thread ends.
#pragma once

#include <cstddef>

namespace vitkit::cpu {

// At least `bytes` bytes, aligned to a page, valid until the next call on the same thread. Contents
// are undefined. What is asked for is bounded by the kernels (a few MiB), never by the length of a
// sequence; above kKeptScratch the memory is given back by release_large_scratch().
constexpr size_t kKeptScratch = size_t(16) << 20;
void* thread_scratch(size_t bytes);
void release_large_scratch();

}  // namespace vitkit::cpu
