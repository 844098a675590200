// patch_embed and its packed form on the CPU: blocks of tokens to threads.
#include "patch_embed.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "attention/schedule.h"
#include "isa.h"
#include "memory.h"
#include "patch/inputs.h"

VITKIT_ISA_TABLE(PatchKernels, patch_embed_kernels)

namespace vitkit::cpu {
namespace {

// Fewer patches than this in a block read every weight for too little work.
constexpr int64_t kLeastRows = 24;
constexpr int64_t kBlockBytes = 384 << 10;

// Equal blocks, at least one for every thread, whose patches and sums stay in a 512 KiB cache. How
// the tokens are cut changes no result.
int64_t block_rows(const PatchKernels& kernels, const PatchEmbed& in, int64_t threads) {
  const int64_t row_bytes = (in.depth + in.embed) * int64_t(sizeof(float));
  const int64_t most = std::clamp(kBlockBytes / row_bytes, kLeastRows, kernels.most_rows);
  int64_t blocks = divide_up(in.tokens(), most);
  const int64_t wanted = std::min(threads, divide_up(in.tokens(), kLeastRows));
  if (blocks < 4 * wanted) blocks = divide_up(blocks, wanted) * wanted;
  return divide_up(divide_up(in.tokens(), blocks), kernels.row_step) * kernels.row_step;
}

void run(const PatchArguments& arguments, const Tensor& like, Tensor& out) {
  const PatchEmbed& in = arguments.in;
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * int64_t(out.element_size()));
  const PatchKernels& kernels = patch_embed_kernels();
  const int64_t panels = kernels.weight_panels(in),
                threads = threads_for(arguments.product_flops());
  const auto bytes = int64_t(kernels.weight_bytes(in));
  Tensor weights = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  // A panel has at most 64 columns.
  Tensor shift = torch::stable::new_empty(like, {in.embed + 64}, ScalarType::Float);
  auto* shift_data = static_cast<float*>(shift.mutable_data_ptr());
  void* weight_data = weights.mutable_data_ptr();
  run_items(panels, threads, 0, [&](int64_t panel, void*, int64_t) {
    kernels.pack_weight(in, weight_data, shift_data, panel, panel + 1);
  });
  const PatchForward p{in, static_cast<char*>(out.mutable_data_ptr()), weight_data, shift_data,
                       block_rows(kernels, in, threads)};
  run_items(divide_up(in.tokens(), p.block_rows), threads, kernels.scratch_bytes(p),
            [&](int64_t block, void* scratch, int64_t) {
              kernels.forward(p, block, block + 1, scratch);
            });
}

Tensor patch_embed_fwd(Tensor images, Tensor weight, std::optional<Tensor> bias, Numbers mean,
                       Numbers std, std::optional<Tensor> norm_weight,
                       std::optional<Tensor> norm_bias, double norm_eps,
                       std::optional<Tensor> pos_embed, std::optional<Tensor> prefix_tokens,
                       bool pad) {
  const PatchArguments arguments("patch_embed", images, weight, bias, mean, std, norm_weight,
                                 norm_bias, norm_eps, pos_embed, prefix_tokens, pad);
  const PatchEmbed& in = arguments.in;
  Tensor out = torch::stable::new_empty(weight, {in.batch, in.out_rows(), in.embed});
  if (in.tokens() > 0) run(arguments, weight, out);
  return out;
}

Tensor patch_embed_packed_fwd(Tensor pixels, Tensor places, Tensor weight,
                              std::optional<Tensor> bias, Numbers mean, Numbers std,
                              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                              double norm_eps, std::optional<Tensor> pos_embed) {
  const PatchArguments arguments("patch_embed_packed", pixels, places, weight, bias, mean, std,
                                 norm_weight, norm_bias, norm_eps, pos_embed);
  Tensor out = torch::stable::new_empty(weight, {arguments.in.patches, arguments.in.embed});
  if (arguments.in.tokens() > 0) run(arguments, weight, out);
  return out;
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("patch_embed_fwd", TORCH_BOX(&vitkit::cpu::patch_embed_fwd));
  m.impl("patch_embed_packed_fwd", TORCH_BOX(&vitkit::cpu::patch_embed_packed_fwd));
}
