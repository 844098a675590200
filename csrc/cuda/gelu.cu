// gelu on CUDA.
#include "gated_activation.h"

namespace vitkit::gated_activation {
namespace {

Tensor forward(Tensor x, bool tanh) {
  return activation_forward("gelu",
                            tanh ? &launch_forward<Activation::gelu_tanh, false>
                                 : &launch_forward<Activation::gelu, false>,
                            x);
}

Tensor backward(Tensor grad, Tensor x, bool tanh) {
  return activation_backward("gelu",
                             tanh ? &launch_backward<Activation::gelu_tanh, false>
                                  : &launch_backward<Activation::gelu, false>,
                             grad, x);
}

}  // namespace
}  // namespace vitkit::gated_activation

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("gelu_fwd", TORCH_BOX(&vitkit::gated_activation::forward));
  m.impl("gelu_bwd", TORCH_BOX(&vitkit::gated_activation::backward));
}
