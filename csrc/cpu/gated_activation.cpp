// swiglu, geglu and gelu on the CPU: tensors to rows, rows to threads.
#include "gated_activation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "attention/inputs.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "rows.h"

VITKIT_ISA_TABLE(GatedKernels, gated_kernels)

namespace vitkit::cpu {
namespace {

// Columns of one item: a whole number of vectors of every width.
constexpr int64_t kChunk = 4096;
// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrainElements = int64_t(1) << 14;

char* data_of(const Tensor& t, int64_t offset) {
  // Not const because results are rows too.
  return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) +
         offset * int64_t(t.element_size());
}

struct Halves {
  ActivationRows value, gate;
};

// Rows of value and gate: two tensors, or the halves of one.
Halves halves(const char* op, const Tensor& x, const std::optional<Tensor>& gate, bool gate_last) {
  const int64_t stride = row_stride(op, "x", x);
  if (gate) return {{data_of(x, 0), stride}, {data_of(*gate, 0), row_stride(op, "gate", *gate)}};
  const ActivationRows first{data_of(x, 0), stride}, second{data_of(x, x.size(-1) / 2), stride};
  return gate_last ? Halves{first, second} : Halves{second, first};
}

template <typename Params>
void run(const Params& p, void (*kernel)(const Params&, int64_t, int64_t)) {
  const int64_t per_item = std::min(p.columns, p.chunk);
  parallel_for(0, p.items(), 1 + kGrainElements / per_item,
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void prefer_huge_pages_of(const Tensor& t) {
  prefer_huge_pages(data_of(t, 0), t.numel() * int64_t(t.element_size()));
}

Tensor gated_forward(const char* op, Activation activation, const Tensor& x,
                     const std::optional<Tensor>& gate, bool gate_last) {
  const std::vector<int64_t> sizes = gated_sizes(op, x, gate);
  Tensor y = torch::stable::new_empty(x, sizes);
  if (y.numel() == 0) return y;
  prefer_huge_pages_of(y);
  const Halves in = halves(op, x, gate, gate_last);
  const int64_t columns = sizes.back(), rows = y.numel() / columns;
  run(GatedForward{element_type(x),
                   activation,
                   rows,
                   columns,
                   kChunk,
                   in.value,
                   in.gate,
                   {data_of(y, 0), columns}},
      gated_kernels().forward);
  return y;
}

std::tuple<Tensor, Tensor> gated_backward(const char* op, Activation activation, const Tensor& grad,
                                          const Tensor& x, const std::optional<Tensor>& gate,
                                          bool gate_last) {
  const std::vector<int64_t> sizes = gated_sizes(op, x, gate);
  check_gated_gradient(op, grad, x, sizes);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dgate = gate ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  if (dx.numel() == 0) return {dx, dgate};
  prefer_huge_pages_of(dx);
  if (gate) prefer_huge_pages_of(dgate);
  const Halves in = halves(op, x, gate, gate_last);
  const Halves out = halves(op, dx, gate ? std::optional<Tensor>(dgate) : std::nullopt, gate_last);
  const int64_t columns = sizes.back(), rows = grad.numel() / columns;
  run(GatedBackward{element_type(x),
                    activation,
                    rows,
                    columns,
                    kChunk,
                    {data_of(grad, 0), row_stride(op, "grad", grad)},
                    in.value,
                    in.gate,
                    out.value,
                    out.gate},
      gated_kernels().backward);
  return {dx, dgate};
}

Tensor swiglu_forward(Tensor x, std::optional<Tensor> gate, bool gate_last) {
  return gated_forward("swiglu", Activation::silu, x, gate, gate_last);
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad, Tensor x, std::optional<Tensor> gate,
                                           bool gate_last) {
  return gated_backward("swiglu", Activation::silu, grad, x, gate, gate_last);
}

Activation gelu_of(bool tanh) { return tanh ? Activation::gelu_tanh : Activation::gelu; }

Tensor geglu_forward(Tensor x, std::optional<Tensor> gate, bool gate_last, bool tanh) {
  return gated_forward("geglu", gelu_of(tanh), x, gate, gate_last);
}

std::tuple<Tensor, Tensor> geglu_backward(Tensor grad, Tensor x, std::optional<Tensor> gate,
                                          bool gate_last, bool tanh) {
  return gated_backward("geglu", gelu_of(tanh), grad, x, gate, gate_last);
}

// ---- gelu: all elements as one row, in whatever order they lie ----

Tensor gelu_forward(Tensor x, bool tanh) {
  check_floating("gelu", "x", x);
  Tensor y = torch::stable::empty_like(x);
  const int64_t n = x.numel();
  if (n == 0) return y;
  check_dense("gelu", "x", x);
  prefer_huge_pages_of(y);
  run(GatedForward{element_type(x),
                   gelu_of(tanh),
                   1,
                   n,
                   kChunk,
                   {nullptr, 0},
                   {data_of(x, 0), 0},
                   {data_of(y, 0), 0}},
      gated_kernels().forward);
  return y;
}

Tensor gelu_backward(Tensor grad, Tensor x, bool tanh) {
  check_floating("gelu", "x", x);
  check_like("gelu", "grad", grad, "x", x);
  Tensor dx = torch::stable::empty_like(x);
  const int64_t n = x.numel();
  if (n == 0) return dx;
  check_dense("gelu", "x", x);
  check_same_layout("gelu", grad, x);
  prefer_huge_pages_of(dx);
  run(GatedBackward{element_type(x),
                    gelu_of(tanh),
                    1,
                    n,
                    kChunk,
                    {data_of(grad, 0), 0},
                    {nullptr, 0},
                    {data_of(x, 0), 0},
                    {nullptr, 0},
                    {data_of(dx, 0), 0}},
      gated_kernels().backward);
  return dx;
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&vitkit::cpu::swiglu_forward));
  m.impl("swiglu_bwd", TORCH_BOX(&vitkit::cpu::swiglu_backward));
  m.impl("geglu_fwd", TORCH_BOX(&vitkit::cpu::geglu_forward));
  m.impl("geglu_bwd", TORCH_BOX(&vitkit::cpu::geglu_backward));
  m.impl("gelu_fwd", TORCH_BOX(&vitkit::cpu::gelu_forward));
  m.impl("gelu_bwd", TORCH_BOX(&vitkit::cpu::gelu_backward));
}
