#include "scratch.h"

#include <new>

namespace vitkit::cpu {
namespace {

constexpr std::align_val_t kAlignment{4096};

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  void release() {
    if (data) ::operator delete(data, kAlignment);
    data = nullptr;
    bytes = 0;
  }
  ~Buffer() { release(); }
};

thread_local Buffer buffer;

}  // namespace

void* thread_scratch(size_t bytes) {
  if (bytes > buffer.bytes) {
    buffer.release();
    buffer.data = ::operator new(bytes, kAlignment);
    buffer.bytes = bytes;
  }
  return buffer.data;
}

void release_large_scratch() {
  if (buffer.bytes > kKeptScratch) buffer.release();
}

}  // namespace vitkit::cpu
