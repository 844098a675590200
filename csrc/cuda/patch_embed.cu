// patch_embed and its packed form on CUDA: allocations, launches.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "patch_embed_arguments.h"

namespace vitkit::patch_embed {
namespace {

// Into `out`, which has elements.
void run_forward(const Arguments& a, const Tensor& weight, Tensor& out) {
  const Call& c = a.call;
  const Launch launch(weight);
  Tensor workspace =
      torch::stable::new_empty(weight, {ForwardBuffers(c, nullptr).bytes()}, ScalarType::Byte);
  check_launch(a.op, patch_forward(c, out.mutable_data_ptr(), workspace.mutable_data_ptr(),
                                   launch.stream()));
}

Tensor forward(Tensor images, Tensor weight, Optional bias, Numbers mean, Numbers std,
               Optional norm_weight, Optional norm_bias, double norm_eps, Optional pos_embed,
               Optional prefix_tokens, bool pad) {
  const Arguments a(images, weight, bias, mean, std, norm_weight, norm_bias, norm_eps, pos_embed,
                    prefix_tokens, pad);
  Tensor out = torch::stable::new_empty(weight, {a.call.images, a.call.out_rows(), a.call.embed});
  if (out.numel() > 0) run_forward(a, weight, out);
  return out;
}

Tensor packed_forward(Tensor pixels, Tensor places, Tensor weight, Optional bias, Numbers mean,
                      Numbers std, Optional norm_weight, Optional norm_bias, double norm_eps,
                      Optional pos_embed) {
  const Arguments a(pixels, places, weight, bias, mean, std, norm_weight, norm_bias, norm_eps,
                    pos_embed);
  Tensor out = torch::stable::new_empty(weight, {a.call.g.tokens, a.call.embed});
  if (out.numel() > 0) run_forward(a, weight, out);
  return out;
}

// The gradients that an operator returns, without elements where they are not asked for.
struct Found {
  Tensor images, weight, bias, norm_weight, norm_bias, position, prefix;

  Found(const Tensor& images_like, const Tensor& weight_like, const Optional& bias_like,
        const Optional& norm_weight_like, const Optional& norm_bias_like,
        const Optional& position_like, const Optional& prefix_like, bool need_images,
        bool need_weight)
      : images(need_images ? torch::stable::empty_like(images_like) : nothing(weight_like)),
        weight(need_weight ? torch::stable::empty_like(weight_like) : nothing(weight_like)),
        bias(like(bias_like, weight_like)),
        norm_weight(like(norm_weight_like, weight_like)),
        norm_bias(like(norm_bias_like, weight_like)),
        position(like(position_like, weight_like)),
        prefix(like(prefix_like, weight_like)) {}

  void zero_parameters() {
    for (Tensor* t : {&weight, &bias, &norm_weight, &norm_bias, &position, &prefix})
      torch::stable::zero_(*t);
  }

 private:
  static Tensor nothing(const Tensor& weight) { return torch::stable::new_empty(weight, {0}); }
  static Tensor like(const Optional& t, const Tensor& weight) {
    return t ? torch::stable::new_empty(*t, t->sizes()) : nothing(weight);
  }
};

void check_gradients(const Arguments& a, const Tensor& grad, const Tensor& weight,
                     bool need_images) {
  const Call& c = a.call;
  STD_TORCH_CHECK(grad.scalar_type() == weight.scalar_type() && grad.is_contiguous() &&
                      grad.get_device_index() == weight.get_device_index() &&
                      grad.numel() == int64_t(c.images) * c.out_rows() * c.embed,
                  a.op, ": grad must be contiguous and have the shape and dtype of the output");
  STD_TORCH_CHECK(!need_images || !c.bytes, a.op, ": uint8 images have no gradient");
}

// Of a grad that has elements. The gradient of the images is dense as they are.
void run_backward(const Arguments& a, const Tensor& grad, const Tensor& weight, bool need_images,
                  bool need_weight, Found& found) {
  const Call& c = a.call;
  const auto gradient = [&](Tensor& t) {
    return t.numel() == 0 ? SmallGradient{nullptr, Element::f32}
                          : SmallGradient{t.mutable_data_ptr(), element_of(a.op, "gradient", t)};
  };
  const Gradients to{need_images ? found.images.mutable_data_ptr() : nullptr,
                     need_weight ? found.weight.mutable_data_ptr() : nullptr,
                     gradient(found.bias),
                     gradient(found.norm_weight),
                     gradient(found.norm_bias),
                     gradient(found.position),
                     gradient(found.prefix)};
  const Launch launch(weight);
  const int64_t bytes = BackwardBuffers(c, to, grad.const_data_ptr(), nullptr).bytes();
  Tensor workspace = torch::stable::new_empty(weight, {bytes}, ScalarType::Byte);
  check_launch(a.op, patch_backward(c, to, grad.const_data_ptr(), workspace.mutable_data_ptr(),
                                    launch.stream()));
  // Without a product, the gradient of bias is not asked for: its memory is defined all the same.
  if (!need_weight) torch::stable::zero_(found.bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor images, Tensor weight, Optional bias, Numbers mean, Numbers std,
    Optional norm_weight, Optional norm_bias, double norm_eps, Optional pos_embed,
    Optional prefix_tokens, bool pad, bool need_images, bool need_weight) {
  const Arguments a(images, weight, bias, mean, std, norm_weight, norm_bias, norm_eps, pos_embed,
                    prefix_tokens, pad);
  check_gradients(a, grad, weight, need_images);
  Found f(images, weight, bias, norm_weight, norm_bias, pos_embed, prefix_tokens, need_images,
          need_weight);
  for (int64_t d = 0; need_images && d < images.dim(); ++d)
    STD_TORCH_CHECK(images.size(d) <= 1 || f.images.stride(d) == images.stride(d), a.op,
                    ": images must be contiguous or channels_last to have a gradient");
  if (grad.numel() == 0)
    f.zero_parameters();
  else
    run_backward(a, grad, weight, need_images, need_weight, f);
  return {f.images, f.weight, f.bias, f.norm_weight, f.norm_bias, f.position, f.prefix};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> packed_backward(
    Tensor grad, Tensor pixels, Tensor places, Tensor weight, Optional bias, Numbers mean,
    Numbers std, Optional norm_weight, Optional norm_bias, double norm_eps, Optional pos_embed,
    bool need_pixels, bool need_weight) {
  const Arguments a(pixels, places, weight, bias, mean, std, norm_weight, norm_bias, norm_eps,
                    pos_embed);
  check_gradients(a, grad, weight, need_pixels);
  Found f(pixels, weight, bias, norm_weight, norm_bias, pos_embed, std::nullopt, need_pixels,
          need_weight);
  if (need_pixels) torch::stable::zero_(f.images);  // no patch may cover a pixel
  if (grad.numel() == 0)
    f.zero_parameters();
  else
    run_backward(a, grad, weight, need_pixels, need_weight, f);
  return {f.images, f.weight, f.bias, f.norm_weight, f.norm_bias, f.position};
}

}  // namespace
}  // namespace vitkit::patch_embed

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("patch_embed_fwd", TORCH_BOX(&vitkit::patch_embed::forward));
  m.impl("patch_embed_bwd", TORCH_BOX(&vitkit::patch_embed::backward));
  m.impl("patch_embed_packed_fwd", TORCH_BOX(&vitkit::patch_embed::packed_forward));
  m.impl("patch_embed_packed_bwd", TORCH_BOX(&vitkit::patch_embed::packed_backward));
}
