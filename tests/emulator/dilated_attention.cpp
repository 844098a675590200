// Entry points for ctypes: dilated_attention's launches on the emulator, for few head dims.
#include "attention_driver.h"

#include "dilated_attention.cuh"

using namespace vitkit;
using namespace vitkit::attention;

extern "C" {

struct Call {
  BackwardTensors tensors;  // dq, dk and dv: float32
  Rows parts;
  float *part_lse, *delta;  // [B, H, rows]
  int64_t row_count;
  int batch, heads, tokens, count;
  int64_t lengths[kMaxBranches], ratios[kMaxBranches];
  bool torchscale;
  Element element;
  uint64_t seed;
};

size_t emulated_call_size() { return sizeof(Call); }
}

namespace {

DilatedLayout layout_of(const Call& c) {
  return {c.tokens, c.heads, c.count, c.lengths, c.ratios, c.torchscale};
}

MixParams mix_of(const Call& c, const DilatedLayout& layout) {
  const BackwardTensors& t = c.tensors;
  MixParams p{c.parts,          t.out,           const_cast<float*>(t.lse),
              c.part_lse,       c.delta,         t.grad_lse,
              t.grad_lse_batch, t.grad_lse_head, t.grad_lse_token,
              layout.rows,      c.batch,         c.heads,
              c.tokens,         t.head_dim,      layout.count};
  std::copy(layout.branches, layout.branches + layout.count, p.branches);
  return p;
}

}  // namespace

extern "C" {

// Null, or what was undefined.
const char* emulated_forward(const Call* call) {
  const DilatedLayout layout = layout_of(*call);
  if (layout.rows != call->row_count) return "the operator has another number of rows";
  DilatedForward p{forward_of(call->tensors), {call->batch, call->heads, call->tokens}, {}};
  p.out = call->parts;
  p.lse = call->part_lse;
  p.lse_batch = call->heads * layout.rows;
  p.lse_head = layout.rows;
  return with_few_kernels<96>(call->element, p.head_dim, [&]<typename T, int kHeadDim>() {
    const Stream stream{call->seed};
    const char* error = launch_dilated_forward<T, kHeadDim>(p, layout, stream);
    return error ? error : launch_mix<T>(mix_of(*call, layout), false, stream);
  });
}

const char* emulated_backward(const Call* call) {
  const DilatedLayout layout = layout_of(*call);
  MixParams mix = mix_of(*call, layout);
  mix.out = call->tensors.grad;
  DilatedBackward p{call->tensors, {call->batch, call->heads, call->tokens}, {}};
  p.lse = call->part_lse;
  p.delta = call->delta;
  p.lse_batch = call->heads * layout.rows;
  p.lse_head = layout.rows;
  return with_few_kernels<96>(call->element, p.head_dim, [&]<typename T, int kHeadDim>() {
    const Stream stream{call->seed};
    const char* error = launch_mix<T>(mix, true, stream);
    for (bool keys : {true, false})
      if (!error) error = launch_dilated_gradient<T, kHeadDim>(p, layout, keys, stream);
    return error;
  });
}
}
