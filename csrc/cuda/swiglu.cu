// swiglu on CUDA.
#include "gated_activation.h"

namespace vitkit::gated_activation {
namespace {

Tensor forward(Tensor x, Optional gate, bool gate_last) {
  return gated_forward("swiglu", &launch_forward<Activation::silu, true>, x, gate, gate_last);
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor x, Optional gate, bool gate_last) {
  return gated_backward("swiglu", &launch_backward<Activation::silu, true>, grad, x, gate,
                        gate_last);
}

}  // namespace
}  // namespace vitkit::gated_activation

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&vitkit::gated_activation::forward));
  m.impl("swiglu_bwd", TORCH_BOX(&vitkit::gated_activation::backward));
}
