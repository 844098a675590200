// flash_attention on the CPU, forward: tensors to FlashForward, and query blocks to threads.
#include "flash_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention/inputs.h"
#include "attention/schedule.h"
#include "check.h"
#include "isa.h"
#include "memory.h"

VITKIT_ISA_TABLE(FlashForwardKernels, flash_forward_kernels)

namespace vitkit::cpu {
namespace {

constexpr int64_t kUnitsPerThread = 4;

// Threads take units of consecutive items until none is left: cores differ in speed (hybrid CPUs,
// other work on the machine) and causal blocks in cost. A unit is one or more whole heads where
// there are enough of them, because each thread that works on a head packs its keys again.
void run_blocks(const FlashForwardKernels& kernels, const FlashForward& p, int64_t items,
                int64_t heads, double flops) {
  const int64_t threads = threads_for(flops);
  const int64_t head_items = (items + heads - 1) / heads;
  int64_t unit = std::max<int64_t>(1, items / (threads * kUnitsPerThread));
  if (unit >= head_items) unit = unit / head_items * head_items;
  const size_t scratch = size_t(kernels.scratch_bytes(p));
  run_items((items + unit - 1) / unit, threads, scratch, [&](int64_t i, void* memory, int64_t) {
    kernels.run(p, i * unit, std::min((i + 1) * unit, items), memory);
  });
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const AttentionArguments& arguments) {
  const AttentionInputs& in = arguments.in;
  const bool packed = arguments.packed();
  Tensor out = torch::stable::new_empty(q, q.sizes());
  prefer_huge_pages(out);
  const std::vector<int64_t> lse_sizes = packed ? std::vector<int64_t>{in.heads, in.nq}
                                                : std::vector<int64_t>{in.batch, in.heads, in.nq};
  Tensor lse = torch::stable::new_empty(q, lse_sizes, ScalarType::Float);
  if (!arguments.covers_queries()) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
  }
  if (out.numel() == 0) return {out, lse};

  const FlashForwardKernels& kernels = flash_forward_kernels();
  FlashForward p{in,
                 rows_view(out),
                 static_cast<float*>(lse.mutable_data_ptr()),
                 packed ? 0 : in.heads * in.nq,
                 in.nq,
                 in.nk,
                 nullptr};
  std::vector<int64_t> first_item;
  int64_t items = 0;
  double pairs = 0;  // of a query and a key, over the batch
  if (packed) {
    p.max_nk = 0;
    first_item.push_back(0);
    for (int64_t b = 0; b < in.batch; ++b) {
      p.max_nk = std::max(p.max_nk, arguments.keys(b));
      pairs += double(arguments.queries(b)) * double(arguments.keys(b));
      items += in.heads * kernels.blocks(in, arguments.queries(b), arguments.keys(b));
      first_item.push_back(items);
    }
    p.first_item = first_item.data();
  } else {
    pairs = double(in.batch) * double(in.nq) * double(in.nk);
    items = in.batch * in.heads * kernels.blocks(in, in.nq, in.nk);
  }
  if (items == 0) return {out, lse};

  const double flops = 4. * pairs * double(in.heads) * double(in.head_dim);
  run_blocks(kernels, p, items, in.batch * in.heads, flops);
  return {out, lse};
}

std::tuple<Tensor, Tensor> flash_attention_fwd(Tensor q, Tensor k, Tensor v,
                                               std::optional<Tensor> bias,
                                               std::optional<Tensor> cu_seqlens_q,
                                               std::optional<Tensor> cu_seqlens_k, bool causal,
                                               double scale) {
  return attend(q, AttentionArguments("flash_attention", q, k, v, bias, cu_seqlens_q, cu_seqlens_k,
                                      causal, scale));
}

std::tuple<Tensor, Tensor> flash_attention_decomposed_fwd(Tensor q, Tensor k, Tensor v,
                                                          Tensor rel_h, Tensor rel_w, bool causal,
                                                          double scale) {
  constexpr const char* op = "flash_attention_decomposed";
  AttentionArguments arguments(op, q, k, v, causal, scale);
  arguments.add_decomposed_bias(op, rel_h, rel_w);
  return attend(q, arguments);
}

std::tuple<Tensor, Tensor> flash_attention_distance_fwd(Tensor q, Tensor k, Tensor v, Tensor slopes,
                                                        Tensor coords_q, Tensor coords_k,
                                                        bool causal, double scale) {
  constexpr const char* op = "flash_attention_distance";
  AttentionArguments arguments(op, q, k, v, causal, scale);
  arguments.add_distance_bias(op, slopes, coords_q, coords_k);
  return attend(q, arguments);
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("flash_attention_fwd", TORCH_BOX(&vitkit::cpu::flash_attention_fwd));
  m.impl("flash_attention_decomposed_fwd", TORCH_BOX(&vitkit::cpu::flash_attention_decomposed_fwd));
  m.impl("flash_attention_distance_fwd", TORCH_BOX(&vitkit::cpu::flash_attention_distance_fwd));
}
