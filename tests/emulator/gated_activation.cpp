// Entry points for ctypes: the launches of swiglu, geglu and gelu on the emulator.
#include "emulator.h"
// The kernels and launches, by the same file nvcc compiles.
#include "gated_activation.cuh"

using namespace vitkit;
using namespace vitkit::gated_activation;

namespace {

// f(std::integral_constant<Activation, ...>)
template <typename F>
const char* with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
  }
  return "no such activation";
}

}  // namespace

extern "C" {

size_t emulated_size(int which) {
  const size_t sizes[] = {sizeof(ForwardParams), sizeof(BackwardParams)};
  return sizes[which];
}

const char* emulated_forward(const ForwardParams* p, Activation activation, Element element,
                             uint64_t seed) {
  return with_activation(activation, [&](auto which) {
    constexpr Activation kWhich = decltype(which)::value;
    if (p->value.data) return launch_forward<kWhich, true>(*p, element, {seed});
    if constexpr (kWhich != Activation::silu)  // which no op has alone
      return launch_forward<kWhich, false>(*p, element, {seed});
    return "no such op";
  });
}

const char* emulated_backward(const BackwardParams* p, Activation activation, Element element,
                              uint64_t seed) {
  return with_activation(activation, [&](auto which) {
    constexpr Activation kWhich = decltype(which)::value;
    if (p->value.data) return launch_backward<kWhich, true>(*p, element, {seed});
    if constexpr (kWhich != Activation::silu)  // which no op has alone
      return launch_backward<kWhich, false>(*p, element, {seed});
    return "no such op";
  });
}

// Threads of a row side by side and blocks of a tiling; false if it has too many.
bool emulated_tiling(int64_t segments, int64_t rows, int64_t units, int* lanes, unsigned* blocks) {
  Tiling t;
  if (make_tiling(t, segments, rows, units) != nullptr) return false;
  *lanes = t.lanes();
  *blocks = blocks_of(t);
  return true;
}
}
