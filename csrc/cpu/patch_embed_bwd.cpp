// Gradients of patch_embed and its packed form on the CPU. What is summed over tokens is cut by the
// shape alone, so that results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "attention/schedule.h"
#include "isa.h"
#include "memory.h"
#include "patch/inputs.h"
#include "patch_embed.h"
#include "small_tensor.h"

VITKIT_ISA_TABLE(PatchBackwardKernels, patch_embed_bwd_kernels)

namespace vitkit::cpu {
namespace {

using Optional = std::optional<Tensor>;

// Independent items of the weight's gradient worth having, and tokens that are worth a part.
constexpr int64_t kWeightItems = 32, kPartTokens = 1024;
constexpr int64_t kMostRowParts = 256;

// One backward pass; results are made by its methods.
class Backward {
 public:
  Backward(const char* op, const PatchArguments& arguments, const Tensor& grad,
           const Tensor& weight)
      : arguments_(arguments), weight_(weight), threads_(threads_for(arguments.product_flops())) {
    const PatchEmbed& in = arguments.in;
    STD_TORCH_CHECK(grad.scalar_type() == weight.scalar_type() && grad.is_contiguous() &&
                        grad.numel() == in.batch * in.out_rows() * in.embed,
                    op, ": grad must be contiguous and have the shape and dtype of the output");
    p_.in = in;
    p_.grad = static_cast<const char*>(grad.const_data_ptr());
    p_.row_parts = std::min(divide_up(in.tokens(), kernels_.block_rows), kMostRowParts);
  }

  // Gradients through LayerNorm, of its parameters, and of the images.
  void rows(Tensor* dimages) {
    const PatchEmbed& in = p_.in;
    if (in.tokens() == 0 || (!dimages && !in.norm_weight)) return;
    if (in.norm_weight) {
      const auto bytes = int64_t(kernels_.weight_bytes(in));
      p_.weights = hold(torch::stable::new_empty(weight_, {bytes}, ScalarType::Byte));
      float* shift = floats(in.embed + 64);
      p_.shift = shift;
      p_.dz = floats(in.tokens() * in.embed);
      p_.norm_partial = floats(p_.row_parts * 2 * in.embed);
      each(kernels_.weight_panels(in), 0, [&](int64_t i, void*) {
        kernels_.pack_weight_float32(in, const_cast<void*>(p_.weights), shift, i, i + 1);
      });
    }
    if (dimages) {
      prefer_huge_pages(dimages->mutable_data_ptr(),
                        dimages->numel() * int64_t(dimages->element_size()));
      p_.dimages = static_cast<char*>(dimages->mutable_data_ptr());
      float* panels = floats(int64_t(kernels_.rows_bytes(in) / sizeof(float)));
      p_.panels = panels;
      each(in.embed, 0, [&](int64_t i, void*) { kernels_.pack_weight_rows(in, panels, i, i + 1); });
    }
    each(p_.row_parts, kernels_.gradient_scratch_bytes(p_),
         [&](int64_t i, void* scratch) { kernels_.gradient_rows(p_, i, i + 1, scratch); });
  }

  // Gradients of weight and bias.
  void weights(Tensor& dweight) {
    const PatchEmbed& in = p_.in;
    dbias_.assign(size_t(in.embed), 0.);
    if (in.tokens() == 0) {
      torch::stable::zero_(dweight);
      return;
    }
    const int64_t tiles = kernels_.weight_tiles(in);
    p_.parts = std::clamp<int64_t>(kWeightItems / tiles, 1, divide_up(in.tokens(), kPartTokens));
    p_.dweight = floats(p_.parts * int64_t(kernels_.dweight_bytes(in) / sizeof(float)));
    p_.dbias = floats(p_.parts * in.embed);
    each(p_.parts * tiles, kernels_.weight_scratch_bytes(p_),
         [&](int64_t i, void* scratch) { kernels_.weight_gradient(p_, i, i + 1, scratch); });
    for (int64_t i = 0; i < p_.parts * in.embed; ++i) dbias_[size_t(i % in.embed)] += p_.dbias[i];
    p_.dbias_sum = dbias_.data();
    p_.dweight_out = static_cast<char*>(dweight.mutable_data_ptr());
    each(in.embed, 0, [&](int64_t i, void*) { kernels_.finish_weight(p_, i, i + 1); });
  }

  Tensor bias(const Optional& like) const {
    if (!like) return nothing();
    return like_of(*like, dbias_.empty() ? std::vector<float>(size_t(p_.in.embed)) : dbias_);
  }

  // Row 0: gradient of the norm's weight, row 1: of its bias.
  Tensor norm(const Optional& like, int64_t row) const {
    if (!like) return nothing();
    std::vector<double> sums(size_t(p_.in.embed), 0.);
    const int64_t parts = p_.norm_partial ? p_.row_parts : 0;
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t e = 0; e < p_.in.embed; ++e)
        sums[size_t(e)] += double(p_.norm_partial[(2 * part + row) * p_.in.embed + e]);
    return like_of(*like, std::vector<float>(sums.begin(), sums.end()));
  }

  // Sums of grad over images: gradients of pos_embed and prefix_tokens.
  void tokens(const Optional& position, const Optional& prefix) {
    if (!position && !prefix) return;
    const PatchEmbed& in = p_.in;
    drows_.assign(size_t((in.places ? position->size(0) : in.out_rows()) * in.embed), 0.f);
    p_.drows = drows_.data();
    if (in.tokens() == 0) return;
    each(in.places ? divide_up(in.embed, kernels_.sum_columns) : in.out_rows(), 0,
         [&](int64_t i, void*) { kernels_.sum_rows(p_, i, i + 1); });
  }

  Tensor rows_of(const Optional& like, int64_t first) const {
    if (!like) return nothing();
    const auto begin = drows_.begin() + first * p_.in.embed;
    return like_of(*like, std::vector<float>(begin, begin + like->numel()));
  }

  Tensor nothing() const { return torch::stable::new_empty(weight_, {0}); }

 private:
  template <typename F>
  void each(int64_t items, size_t scratch_bytes, const F& f) const {
    run_items(items, threads_, scratch_bytes,
              [&](int64_t item, void* scratch, int64_t) { f(item, scratch); });
  }

  void* hold(Tensor t) {
    held_.push_back(t);
    return held_.back().mutable_data_ptr();
  }
  float* floats(int64_t count) {
    return static_cast<float*>(hold(torch::stable::new_empty(weight_, {count}, ScalarType::Float)));
  }

  const PatchArguments& arguments_;
  const Tensor& weight_;
  const PatchBackwardKernels& kernels_ = patch_embed_bwd_kernels();
  int64_t threads_;
  PatchBackward p_{};
  std::vector<Tensor> held_;
  std::vector<float> dbias_, drows_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_bwd(
    Tensor grad, Tensor images, Tensor weight, Optional bias, Numbers mean, Numbers std,
    Optional norm_weight, Optional norm_bias, double norm_eps, Optional pos_embed,
    Optional prefix_tokens, bool pad, bool need_images, bool need_weight) {
  constexpr const char* op = "patch_embed";
  const PatchArguments arguments(op, images, weight, bias, mean, std, norm_weight, norm_bias,
                                 norm_eps, pos_embed, prefix_tokens, pad);
  STD_TORCH_CHECK(!need_images || arguments.in.pixels == arguments.in.type, op,
                  ": uint8 images have no gradient");
  Backward backward(op, arguments, grad, weight);
  Tensor dimages = need_images ? torch::stable::empty_like(images) : backward.nothing();
  Tensor dweight = need_weight ? torch::stable::empty_like(weight) : backward.nothing();
  if (need_images)
    for (int64_t d = 0; d < images.dim(); ++d)
      STD_TORCH_CHECK(images.size(d) <= 1 || dimages.stride(d) == images.stride(d), op,
                      ": images must be contiguous or channels_last to have a gradient");
  backward.rows(need_images ? &dimages : nullptr);
  if (need_weight) backward.weights(dweight);
  backward.tokens(pos_embed, prefix_tokens);
  const int64_t first = arguments.in.position_of_prefix ? 0 : arguments.in.prefixes;
  return {dimages,
          dweight,
          backward.bias(bias),
          backward.norm(norm_weight, 0),
          backward.norm(norm_bias, 1),
          backward.rows_of(pos_embed, first),
          backward.rows_of(prefix_tokens, 0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_packed_bwd(
    Tensor grad, Tensor pixels, Tensor places, Tensor weight, Optional bias, Numbers mean,
    Numbers std, Optional norm_weight, Optional norm_bias, double norm_eps, Optional pos_embed,
    bool need_pixels, bool need_weight) {
  constexpr const char* op = "patch_embed_packed";
  const PatchArguments arguments(op, pixels, places, weight, bias, mean, std, norm_weight,
                                 norm_bias, norm_eps, pos_embed);
  STD_TORCH_CHECK(!need_pixels || arguments.in.pixels == arguments.in.type, op,
                  ": uint8 images have no gradient");
  Backward backward(op, arguments, grad, weight);
  Tensor dpixels = need_pixels ? torch::stable::empty_like(pixels) : backward.nothing();
  Tensor dweight = need_weight ? torch::stable::empty_like(weight) : backward.nothing();
  if (need_pixels) torch::stable::zero_(dpixels);  // no patch may cover a pixel
  backward.rows(need_pixels ? &dpixels : nullptr);
  if (need_weight) backward.weights(dweight);
  backward.tokens(pos_embed, std::nullopt);
  return {dpixels,
          dweight,
          backward.bias(bias),
          backward.norm(norm_weight, 0),
          backward.norm(norm_bias, 1),
          backward.rows_of(pos_embed, 0)};
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("patch_embed_bwd", TORCH_BOX(&vitkit::cpu::patch_embed_bwd));
  m.impl("patch_embed_packed_bwd", TORCH_BOX(&vitkit::cpu::patch_embed_packed_bwd));
}
