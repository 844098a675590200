// geglu on CUDA.
#include "gated_activation.h"

namespace vitkit::gated_activation {
namespace {

Tensor forward(Tensor x, Optional gate, bool gate_last, bool tanh) {
  return gated_forward(
      "geglu",
      tanh ? &launch_forward<Activation::gelu_tanh, true> : &launch_forward<Activation::gelu, true>,
      x, gate, gate_last);
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor x, Optional gate, bool gate_last,
                                    bool tanh) {
  return gated_backward("geglu",
                        tanh ? &launch_backward<Activation::gelu_tanh, true>
                             : &launch_backward<Activation::gelu, true>,
                        grad, x, gate, gate_last);
}

}  // namespace
}  // namespace vitkit::gated_activation

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("geglu_fwd", TORCH_BOX(&vitkit::gated_activation::forward));
  m.impl("geglu_bwd", TORCH_BOX(&vitkit::gated_activation::backward));
}
