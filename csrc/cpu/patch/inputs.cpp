// Checks of the patch_embed operators, the order in which a patch is read, and the folding of the
// normalisation of bytes.
#include "patch/inputs.h"

#include <algorithm>
#include <cmath>

#include "small_tensor.h"

namespace vitkit::cpu {
namespace {

constexpr int64_t kVectorSlack = 16;  // elements a vector may read beyond a per-element array

PatchElement element_of(const char* op, const char* arg, const Tensor& t, bool bytes) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return PatchElement::f32;
    case ScalarType::BFloat16:
      return PatchElement::bf16;
    case ScalarType::Half:
      return PatchElement::f16;
    case ScalarType::Byte:
      if (bytes) return PatchElement::u8;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, op, ": ", arg, " must be float32, bfloat16 or float16",
                      bytes ? " or uint8" : "");
  }
}

TokenRows token_rows(const char* op, const char* arg, const std::optional<Tensor>& t,
                     int64_t embed) {
  if (!t) return {nullptr, PatchElement::f32};
  check_rank(op, arg, *t, 2);
  check_size(op, arg, *t, 1, embed);
  STD_TORCH_CHECK(t->is_contiguous(), op, ": ", arg, " must be contiguous");
  return {static_cast<const char*>(t->const_data_ptr()), element_of(op, arg, *t, false)};
}

// Elements from the first to the last of a tensor, both included.
int64_t span(const Tensor& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return last + 1;
}

}  // namespace

void PatchArguments::read_weight(const char* op, const Tensor& images, const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() > 0, op,
                  ": weight must be contiguous and have elements");
  in.type = element_of(op, "weight", weight, false);
  in.pixels = element_of(op, "images", images, true);
  STD_TORCH_CHECK(in.pixels == in.type || in.pixels == PatchElement::u8, op,
                  ": images must have the dtype of weight or be uint8");
  in.images = static_cast<const char*>(images.const_data_ptr());
  in.pixel_count = span(images);
  in.weight = static_cast<const char*>(weight.const_data_ptr());
  in.embed = weight.size(0);
  in.depth = weight.numel() / in.embed;
  colours_ = in.channels = weight.size(1);
  in.frames = weight.dim() == 5 ? weight.size(2) : 1;
  in.rows = weight.size(-2);
  in.run = weight.size(-1);
}

PatchArguments::PatchArguments(const char* op, const Tensor& images, const Tensor& weight,
                               const std::optional<Tensor>& bias, const Numbers& mean,
                               const Numbers& std, const std::optional<Tensor>& norm_weight,
                               const std::optional<Tensor>& norm_bias, double norm_eps,
                               const std::optional<Tensor>& pos_embed,
                               const std::optional<Tensor>& prefix_tokens, bool pad) {
  STD_TORCH_CHECK((weight.dim() == 4 || weight.dim() == 5) && images.dim() == weight.dim(), op,
                  ": images must have shape [B, C, (T,) H, W], weight [E, C, (Pt,) Ph, Pw]");
  check_size(op, "images", images, 1, weight.size(1));
  read_weight(op, images, weight);
  const int64_t dims = images.dim();
  for (int64_t d = 2; d < dims; ++d)
    STD_TORCH_CHECK(images.size(d) > 0 && (pad || images.size(d) % weight.size(d) == 0), op,
                    ": images must be divisible by the patch");
  const auto grid = [&](int64_t d) {
    return (images.size(d) + weight.size(d) - 1) / weight.size(d);
  };
  in.batch = images.size(0);
  in.size_frames = dims == 5 ? images.size(2) : 1;
  in.size_rows = images.size(-2);
  in.size_columns = images.size(-1);
  in.grid_frames = dims == 5 ? grid(2) : 1;
  in.grid_rows = grid(dims - 2);
  in.grid_columns = grid(dims - 1);
  in.patches = in.grid_frames * in.grid_rows * in.grid_columns;
  in.image_stride = images.stride(0);
  in.channel_stride = images.stride(1);
  in.frame_stride = dims == 5 ? images.stride(2) : 0;
  in.row_stride = images.stride(-2);
  if (images.size(-1) > 1 && images.stride(-1) != 1) {
    STD_TORCH_CHECK(
        (in.channels == 1 || in.channel_stride == 1) && images.stride(-1) == in.channels, op,
        ": images must have dense rows or dense pixels");
    order_by_pixel(in.channels);
  }
  in.prefixes = prefix_tokens ? prefix_tokens->size(0) : 0;
  in.prefix = token_rows(op, "prefix_tokens", prefix_tokens, in.embed);
  in.position = token_rows(op, "pos_embed", pos_embed, in.embed);
  if (pos_embed) {
    in.position_of_prefix = pos_embed->size(0) != in.patches;
    STD_TORCH_CHECK(pos_embed->size(0) == in.patches + (in.position_of_prefix ? in.prefixes : 0),
                    op, ": pos_embed must have N or P + N rows");
  }
  read_small(op, bias, mean, std, norm_weight, norm_bias, norm_eps);
}

PatchArguments::PatchArguments(const char* op, const Tensor& pixels, const Tensor& places,
                               const Tensor& weight, const std::optional<Tensor>& bias,
                               const Numbers& mean, const Numbers& std,
                               const std::optional<Tensor>& norm_weight,
                               const std::optional<Tensor>& norm_bias, double norm_eps,
                               const std::optional<Tensor>& pos_embed) {
  check_rank(op, "weight", weight, 4);
  check_rank(op, "places", places, 2);
  check_size(op, "places", places, 1, kPlaceColumns);
  STD_TORCH_CHECK(
      places.scalar_type() == ScalarType::Long && places.is_contiguous() && pixels.is_contiguous(),
      op, ": places must be int64, places and pixels contiguous");
  read_weight(op, pixels, weight);
  in.batch = 1;
  in.patches = places.size(0);
  in.position = token_rows(op, "pos_embed", pos_embed, in.embed);
  // Whatever a caller writes into places, nothing outside the tensors is touched.
  const auto* given = static_cast<const int64_t*>(places.const_data_ptr());
  places_.assign(given, given + places.numel());
  const int64_t position_rows = pos_embed ? pos_embed->size(0) : 1;
  for (int64_t m = 0; m < in.patches; ++m) {
    int64_t* at = places_.data() + m * kPlaceColumns;
    at[kRows] = std::clamp<int64_t>(at[kRows], 0, in.rows);
    at[kColumns] = std::clamp<int64_t>(at[kColumns], 0, in.run);
    const bool drawn = at[kRows] > 0 && at[kColumns] > 0;
    const auto limit = double(in.pixel_count);
    const double last = double(at[kOrigin]) + double(in.channels - 1) * double(at[kChannelStride]) +
                        double(at[kRows] - 1) * double(at[kRowStride]) + double(at[kColumns]);
    const bool inside = at[kOrigin] >= 0 && at[kChannelStride] >= 0 && at[kRowStride] >= 0 &&
                        last <= limit && at[kPositionRow] >= 0 && at[kPositionRow] < position_rows;
    STD_TORCH_CHECK(!drawn || inside, op, ": places must lie inside pixels and pos_embed, token ",
                    m, " does not");
    if (!drawn) std::fill(at, at + kPlaceColumns, 0);
  }
  in.places = places_.data();
  read_small(op, bias, mean, std, norm_weight, norm_bias, norm_eps);
}

// Lines of pixels with their channels, instead of lines of one channel.
void PatchArguments::order_by_pixel(int64_t channels) {
  pixel_order_ = true;
  const int64_t lines = in.frames * in.rows, columns = in.run;
  order_.reserve(size_t(in.depth));
  for (int64_t line = 0; line < lines; ++line)
    for (int64_t x = 0; x < columns; ++x)
      for (int64_t c = 0; c < channels; ++c) order_.push_back((c * lines + line) * columns + x);
  in.order = order_.data();
  in.channels = 1;
  in.channel_stride = 0;
  in.run = columns * channels;
  in.size_columns *= channels;
}

void PatchArguments::read_small(const char* op, const std::optional<Tensor>& bias,
                                const Numbers& mean, const Numbers& std,
                                const std::optional<Tensor>& norm_weight,
                                const std::optional<Tensor>& norm_bias, double norm_eps) {
  bias_ = small_floats(op, "bias", bias, {in.embed});
  norm_weight_ = small_floats(op, "norm_weight", norm_weight, {in.embed});
  norm_bias_ = small_floats(op, "norm_bias", norm_bias, {in.embed});
  STD_TORCH_CHECK(!norm_bias || norm_weight, op, ": norm_bias must be None without norm_weight");
  STD_TORCH_CHECK(norm_eps >= 0, op, ": norm_eps must be >= 0, got ", norm_eps);
  in.bias = bias ? bias_.data() : nullptr;
  in.norm_weight = norm_weight ? norm_weight_.data() : nullptr;
  in.norm_bias = norm_bias ? norm_bias_.data() : nullptr;
  in.norm_eps = float(norm_eps);
  in.scale = 1.f;
  if (in.pixels == PatchElement::u8)
    fold(op, mean, std);
  else
    STD_TORCH_CHECK(!mean && !std, op, ": mean and std must be None for floating images");
}

// (x / 255 - mean) / std = (x - centre) * factor * scale + offset. The centre is an integer, so
// that x - centre is exact in every type; factors are at most 1, so that a weight times its factor
// stays in the range of its type.
void PatchArguments::fold(const char* op, const Numbers& mean, const Numbers& std) {
  const auto size = size_t(colours_);
  const std::vector<double> means = mean ? *mean : std::vector<double>(size, 0.);
  const std::vector<double> stds = std ? *std : std::vector<double>(size, 1.);
  STD_TORCH_CHECK(means.size() == size && stds.size() == size, op, ": mean and std must have ",
                  colours_, " numbers");
  double scale = 0;
  for (const double s : stds) {
    STD_TORCH_CHECK(s > 0, op, ": std must be positive, got ", s);
    scale = std::max(scale, 1 / (255 * s));
  }
  const size_t slots = size_t(in.depth + kVectorSlack);
  for (auto* values : {&centre_, &padding_, &factor_, &offset_}) values->assign(slots, 0.f);
  for (int64_t k = 0; k < in.depth; ++k) {
    const auto c = size_t(pixel_order_ ? k % colours_ : k / (in.depth / colours_));
    const double centre = std::clamp(std::nearbyint(255 * means[c]), 0., 255.);
    centre_[size_t(k)] = float(centre);
    padding_[size_t(k)] = float(255 * means[c] - centre);
    factor_[size_t(k)] = float(1 / (255 * stds[c]) / scale);
    offset_[size_t(k)] = float((centre / 255 - means[c]) / stds[c]);
  }
  in.scale = float(scale);
  in.centre = centre_.data();
  in.padding = padding_.data();
  in.factor = factor_.data();
  in.offset = offset_.data();
}

}  // namespace vitkit::cpu
