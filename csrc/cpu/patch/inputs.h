// The arguments of the patch_embed operators as the kernels want them, and what they point to.
#pragma once

#include <optional>
#include <vector>

#include "check.h"
#include "patch_embed.h"

namespace vitkit::cpu {

using Numbers = std::optional<std::vector<double>>;

struct PatchArguments {
  PatchEmbed in{};

  // images [B, C, (T,) H, W], weight [E, C, (Pt,) Ph, Pw]
  PatchArguments(const char* op, const Tensor& images, const Tensor& weight,
                 const std::optional<Tensor>& bias, const Numbers& mean, const Numbers& std,
                 const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                 double norm_eps, const std::optional<Tensor>& pos_embed,
                 const std::optional<Tensor>& prefix_tokens, bool pad);

  // pixels [any], places [T, kPlaceColumns], weight [E, C, Ph, Pw]
  PatchArguments(const char* op, const Tensor& pixels, const Tensor& places, const Tensor& weight,
                 const std::optional<Tensor>& bias, const Numbers& mean, const Numbers& std,
                 const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                 double norm_eps, const std::optional<Tensor>& pos_embed);

  PatchArguments(const PatchArguments&) = delete;

  double product_flops() const {
    return 2. * double(in.tokens()) * double(in.depth) * double(in.embed);
  }

 private:
  void read_weight(const char* op, const Tensor& images, const Tensor& weight);
  void read_small(const char* op, const std::optional<Tensor>& bias, const Numbers& mean,
                  const Numbers& std, const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& norm_bias, double norm_eps);
  void fold(const char* op, const Numbers& mean, const Numbers& std);
  void order_by_pixel(int64_t channels);

  int64_t colours_ = 0;       // channels of the images, whatever a line holds
  bool pixel_order_ = false;  // the channels of a pixel are neighbours
  std::vector<float> bias_, norm_weight_, norm_bias_;
  std::vector<float> centre_, padding_, factor_, offset_;
  std::vector<int64_t> order_, places_;
};

}  // namespace vitkit::cpu
