// The arguments of the patch_embed operators, dense and packed, as their launches want them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <vector>

#include "launch.h"
#include "patch_embed_launch.cuh"

namespace vitkit::patch_embed {

using Optional = std::optional<Tensor>;
using Numbers = std::optional<std::vector<double>>;

// Of both directions. Holds the tensors whose memory the call points to.
class Arguments {
 public:
  Call call{};
  const char* const op;

  // images [B, C, (T,) H, W], weight [E, C, (Pt,) Ph, Pw]
  Arguments(const Tensor& images, const Tensor& weight, const Optional& bias, const Numbers& mean,
            const Numbers& std, const Optional& norm_weight, const Optional& norm_bias,
            double norm_eps, const Optional& pos_embed, const Optional& prefix_tokens, bool pad)
      : op("patch_embed"), mean_(mean), std_(std) {
    STD_TORCH_CHECK((weight.dim() == 4 || weight.dim() == 5) && images.dim() == weight.dim(), op,
                    ": images must have shape [B, C, (T,) H, W], weight [E, C, (Pt,) Ph, Pw]");
    check_size(op, "images", images, 1, weight.size(1));
    read_weight("images", images, weight);
    read_geometry(images, weight, pad);
    read_small(weight, bias, norm_weight, norm_bias, norm_eps, pos_embed, prefix_tokens);
    read_numbers();
    if (!pos_embed) return;
    call.position_of_prefix = pos_embed->size(0) != call.g.patches;
    STD_TORCH_CHECK(
        pos_embed->size(0) == call.g.patches + (call.position_of_prefix ? call.prefixes : 0), op,
        ": pos_embed must have N or P + N rows");
  }

  // pixels [any], places [T, kPlaceColumns], weight [E, C, Ph, Pw]. What places say is checked on
  // the device: the host does not wait for it.
  Arguments(const Tensor& pixels, const Tensor& places, const Tensor& weight, const Optional& bias,
            const Numbers& mean, const Numbers& std, const Optional& norm_weight,
            const Optional& norm_bias, double norm_eps, const Optional& pos_embed)
      : op("patch_embed_packed"), mean_(mean), std_(std) {
    check_rank(op, "weight", weight, 4);
    check_rank(op, "places", places, 2);
    check_size(op, "places", places, 1, kPlaceColumns);
    STD_TORCH_CHECK(places.scalar_type() == ScalarType::Long && places.is_contiguous(), op,
                    ": places must be contiguous int64");
    STD_TORCH_CHECK(places.get_device_index() == weight.get_device_index(), op,
                    ": places must be on the device of weight");
    STD_TORCH_CHECK(pixels.is_contiguous(), op, ": pixels must be contiguous");
    STD_TORCH_CHECK(pixels.numel() <= int64_t(1) << 40, op,
                    ": pixels must have at most 2^40 elements, got ", pixels.numel());
    read_weight("pixels", pixels, weight);
    const int tokens = as_int("the number of tokens", places.size(0), 1 << 30);
    call.g =
        packed_geometry(tokens, as_int("C", weight.size(1), kMost),
                        as_int("Ph", weight.size(2), kMost), as_int("Pw", weight.size(3), kMost));
    call.images = 1;
    call.places = static_cast<const int64_t*>(places.const_data_ptr());
    call.pixel_count = pixels.numel();
    read_small(weight, bias, norm_weight, norm_bias, norm_eps, pos_embed, std::nullopt);
    read_numbers();
    if (pos_embed)
      call.position_rows = as_int("the rows of pos_embed", pos_embed->size(0), 1 << 30);
  }

  Arguments(const Arguments&) = delete;

 private:
  static constexpr int64_t kMost = 65534;  // channels, and sizes of a patch

  int as_int(const char* what, int64_t value,
             int64_t limit = std::numeric_limits<int>::max()) const {
    STD_TORCH_CHECK(value <= limit, op, ": ", what, " must be at most ", limit, " on CUDA, got ",
                    value);
    return int(value);
  }

  void read_weight(const char* name, const Tensor& pixels, const Tensor& weight) {
    STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() > 0, op,
                    ": weight must be contiguous, without a 0 in its shape");
    STD_TORCH_CHECK(pixels.get_device_index() == weight.get_device_index(), op, ": ", name,
                    " must be on the device of weight");
    call.type = element_of(op, "weight", weight);
    call.bytes = pixels.scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(call.bytes || pixels.scalar_type() == weight.scalar_type(), op, ": ", name,
                    " must be uint8 or have the dtype of weight");
    call.pixels = pixels.const_data_ptr();
    call.weight = weight.const_data_ptr();
    call.embed = as_int("E", weight.size(0), 1 << 20);
    as_int("the size of a patch", weight.numel() / weight.size(0), 1 << 24);
  }

  void read_geometry(const Tensor& images, const Tensor& weight, bool pad) {
    const int64_t dims = images.dim();
    for (int64_t d = 2; d < dims; ++d)
      STD_TORCH_CHECK(images.size(d) > 0 && (pad || images.size(d) % weight.size(d) == 0), op,
                      ": images must be divisible by the patch");
    const bool video = dims == 5;
    Geometry& g = call.g;
    g.image = images.stride(0);
    g.channel = images.stride(1);
    g.frame = video ? images.stride(2) : 0;
    g.row = images.stride(-2);
    g.column = images.stride(-1);
    g.frames = video ? as_int("T", images.size(2)) : 1;
    g.rows = as_int("H", images.size(-2));
    g.columns = as_int("W", images.size(-1));
    g.channels = as_int("C", weight.size(1), kMost);
    g.patch_frames = video ? as_int("Pt", weight.size(2), kMost) : 1;
    g.patch_rows = as_int("Ph", weight.size(-2), kMost);
    g.patch_columns = as_int("Pw", weight.size(-1), kMost);
    const auto grid = [](int size, int patch) { return (size + patch - 1) / patch; };
    g.grid_rows = grid(g.rows, g.patch_rows);
    g.grid_columns = grid(g.columns, g.patch_columns);
    const int64_t patches = int64_t(grid(g.frames, g.patch_frames)) * g.grid_rows * g.grid_columns;
    g.patches = as_int("the number of patches", patches, 1 << 30);
    call.images = as_int("B", images.size(0));
    g.tokens = as_int("the number of patches", patches * images.size(0), 1 << 30);
    g.pixel_order = g.channels > 1 && g.channel == 1 && g.column == g.channels;
  }

  void read_small(const Tensor& weight, const Optional& bias, const Optional& norm_weight,
                  const Optional& norm_bias, double norm_eps, const Optional& pos_embed,
                  const Optional& prefix_tokens) {
    call.bias = rows("bias", bias, weight, 1);
    call.norm_weight = rows("norm_weight", norm_weight, weight, 1);
    call.norm_bias = rows("norm_bias", norm_bias, weight, 1);
    call.position = rows("pos_embed", pos_embed, weight, 2);
    call.prefix = rows("prefix_tokens", prefix_tokens, weight, 2);
    STD_TORCH_CHECK(!norm_bias || norm_weight, op, ": norm_bias must be None without norm_weight");
    STD_TORCH_CHECK(norm_eps >= 0, op, ": norm_eps must be >= 0, got ", norm_eps);
    call.eps = float(norm_eps);
    call.prefixes =
        prefix_tokens ? as_int("the number of prefix tokens", prefix_tokens->size(0), 1 << 20) : 0;
    as_int("the number of tokens", int64_t(call.g.patches) + call.prefixes, 1 << 30);
    as_int("P * E", int64_t(call.prefixes) * call.embed, 1 << 30);
  }

  void read_numbers() {
    STD_TORCH_CHECK(call.bytes || (!mean_ && !std_), op,
                    ": mean and std must be None for floating images");
    for (const Numbers* values : {&mean_, &std_})
      STD_TORCH_CHECK(!*values || int64_t((*values)->size()) == call.g.channels, op,
                      ": mean and std must have ", call.g.channels, " numbers");
    if (std_)
      for (const double s : *std_) STD_TORCH_CHECK(s > 0, op, ": std must be positive, got ", s);
    call.mean = mean_ ? mean_->data() : nullptr;
    call.std = std_ ? std_->data() : nullptr;
  }

  RowTensor rows(const char* arg, const Optional& t, const Tensor& weight, int64_t rank) {
    if (!t) return {nullptr, Element::f32, 0};
    check_rank(op, arg, *t, rank);
    check_size(op, arg, *t, rank - 1, weight.size(0));
    STD_TORCH_CHECK(t->get_device_index() == weight.get_device_index(), op, ": ", arg,
                    " must be on the device of weight");
    Tensor dense = *t;
    if (!t->is_contiguous()) {
      dense = torch::stable::new_empty(*t, t->sizes());
      torch::stable::copy_(dense, *t);
    }
    held_.push_back(dense);
    const void* const data = dense.numel() > 0 ? dense.const_data_ptr() : nullptr;
    return {data, element_of(op, arg, dense), weight.size(0)};
  }

  Numbers mean_, std_;
  std::vector<Tensor> held_;
};

}  // namespace vitkit::patch_embed
