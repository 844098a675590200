// Launching a kernel that takes one struct, with the shared memory it asks for. Host files and the
// emulator's drivers share the code that calls this: grids, tiles and sizes are tested with it.
#pragma once

#ifdef VITKIT_EMULATED

namespace vitkit {

struct Stream {
  uint64_t seed;
};

template <typename P>
const char* launch_kernel(void (*kernel)(const P), unsigned blocks, int threads, int shared_bytes,
                          Stream stream, const P& params) {
  const bool ok = emulator::launch(dim3(blocks), dim3(unsigned(threads)), size_t(shared_bytes),
                                   stream.seed, [&] { kernel(params); });
  return ok ? nullptr : emulator::error();
}

}  // namespace vitkit

#else

#include <cuda_runtime.h>

namespace vitkit {

using Stream = cudaStream_t;

// Null, or what went wrong.
template <typename P>
const char* launch_kernel(void (*kernel)(const P), unsigned blocks, int threads, int shared_bytes,
                          Stream stream, const P& params) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // what every kernel has without asking
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<P*>(&params)};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                             dim3(unsigned(threads)), arguments, size_t(shared_bytes), stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vitkit

#endif
