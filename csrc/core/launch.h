// What every CUDA host file needs around a launch: the tensor's device, torch's current stream, and
// an exception where the launch failed.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "check.h"
#include "element.cuh"

// Lives in libtorch_cuda. Weak: the library must load beside a torch without CUDA, too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace vitkit {

// bool is one of them only where the kernel takes a mask.
inline Element element_of(const char* op, const char* arg, const Tensor& t, bool mask = false) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::BFloat16:
      return Element::bf16;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::Bool:
      if (mask) return Element::boolean;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, op, ": ", arg, " must be float32, bfloat16 or float16",
                      mask ? ", or bool" : "");
  }
}

// 90 for compute capability 9.0.
inline int compute_capability(const Tensor& t) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index());
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device_index());
  return major * 10 + minor;
}

// What a launch returned: null, or what went wrong.
inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": kernel launch failed: ", error);
}

class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  void check(const char* op) const {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, op,
                    ": kernel launch failed: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace vitkit
