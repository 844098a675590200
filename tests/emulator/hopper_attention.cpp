// Entry points for ctypes: the Hopper kernel of flash_attention on the emulator.
#include "attention_driver.h"

#include "attention/hopper_forward.cuh"

using namespace vitkit;
using namespace vitkit::attention;

#ifndef EMULATED_HEAD_DIMS
#define EMULATED_HEAD_DIMS 64, 80, 96, 128
#endif

extern "C" {

struct Call {
  BackwardParams<SequenceMap, NoTerm> params;
  Element element;
  uint64_t seed;
};

size_t emulated_call_size() { return sizeof(Call); }

// Null, or what was undefined.
const char* emulated_forward(const Call* call) {
  const auto& p = call->params;
  return with_kernel<EMULATED_HEAD_DIMS>(
      call->element, p.head_dim, [&]<typename T, int kHeadDim>() -> const char* {
        if constexpr (sizeof(T) == 2) {
          return launch_hopper_forward<T, kHeadDim>(forward_of(p), p.map, {call->seed});
        } else {
          return "no such dtype in this driver";
        }
      });
}

const char* emulated_backward(const Call*) { return "forward only"; }
}
