// patch_embed on CUDA: checks, allocations, launches.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <vector>

#include "launch.h"
#include "patch_embed_launch.cuh"

namespace vitkit::patch_embed {
namespace {

constexpr const char* kOp = "patch_embed";
using Optional = std::optional<Tensor>;
using Numbers = std::optional<std::vector<double>>;

int as_int(const char* what, int64_t value, int64_t limit = std::numeric_limits<int>::max()) {
  STD_TORCH_CHECK(value <= limit, kOp, ": ", what, " must be at most ", limit, " on CUDA, got ",
                  value);
  return int(value);
}

// The arguments of both directions. Holds the tensors whose memory the call points to.
class Arguments {
 public:
  Call call{};

  Arguments(const Tensor& images, const Tensor& weight, const Optional& bias, const Numbers& mean,
            const Numbers& std, const Optional& norm_weight, const Optional& norm_bias,
            double norm_eps, const Optional& pos_embed, const Optional& prefix_tokens, bool pad)
      : mean_(mean), std_(std) {
    STD_TORCH_CHECK((weight.dim() == 4 || weight.dim() == 5) && images.dim() == weight.dim(), kOp,
                    ": images must have shape [B, C, (T,) H, W], weight [E, C, (Pt,) Ph, Pw]");
    STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() > 0, kOp,
                    ": weight must be contiguous, without a 0 in its shape");
    STD_TORCH_CHECK(images.get_device_index() == weight.get_device_index(), kOp,
                    ": images must be on the device of weight");
    check_size(kOp, "images", images, 1, weight.size(1));
    call.type = element_of(kOp, "weight", weight);
    call.bytes = images.scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(call.bytes || images.scalar_type() == weight.scalar_type(), kOp,
                    ": images must be uint8 or have the dtype of weight");
    call.pixels = images.const_data_ptr();
    call.weight = weight.const_data_ptr();
    call.embed = as_int("E", weight.size(0), 1 << 20);
    read_geometry(images, weight, pad);
    read_small(weight, bias, norm_weight, norm_bias, norm_eps, pos_embed, prefix_tokens);
    STD_TORCH_CHECK(call.bytes || (!mean && !std), kOp,
                    ": mean and std must be None for floating images");
    for (const Numbers* values : {&mean_, &std_})
      STD_TORCH_CHECK(!*values || int64_t((*values)->size()) == call.g.channels, kOp,
                      ": mean and std must have ", call.g.channels, " numbers");
    if (std_)
      for (const double s : *std_) STD_TORCH_CHECK(s > 0, kOp, ": std must be positive, got ", s);
    call.mean = mean_ ? mean_->data() : nullptr;
    call.std = std_ ? std_->data() : nullptr;
  }
  Arguments(const Arguments&) = delete;

 private:
  void read_geometry(const Tensor& images, const Tensor& weight, bool pad) {
    const int64_t dims = images.dim();
    for (int64_t d = 2; d < dims; ++d)
      STD_TORCH_CHECK(images.size(d) > 0 && (pad || images.size(d) % weight.size(d) == 0), kOp,
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
    constexpr int64_t kMost = 65534;
    g.channels = as_int("C", weight.size(1), kMost);
    g.patch_frames = video ? as_int("Pt", weight.size(2), kMost) : 1;
    g.patch_rows = as_int("Ph", weight.size(-2), kMost);
    g.patch_columns = as_int("Pw", weight.size(-1), kMost);
    as_int("the size of a patch", weight.numel() / weight.size(0), 1 << 24);
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
    STD_TORCH_CHECK(!norm_bias || norm_weight, kOp, ": norm_bias must be None without norm_weight");
    STD_TORCH_CHECK(norm_eps >= 0, kOp, ": norm_eps must be >= 0, got ", norm_eps);
    call.eps = float(norm_eps);
    call.prefixes =
        prefix_tokens ? as_int("the number of prefix tokens", prefix_tokens->size(0), 1 << 20) : 0;
    as_int("the number of tokens", int64_t(call.g.patches) + call.prefixes, 1 << 30);
    as_int("P * E", int64_t(call.prefixes) * call.embed, 1 << 30);
    if (!pos_embed) return;
    call.position_of_prefix = pos_embed->size(0) != call.g.patches;
    STD_TORCH_CHECK(
        pos_embed->size(0) == call.g.patches + (call.position_of_prefix ? call.prefixes : 0), kOp,
        ": pos_embed must have N or P + N rows");
  }

  RowTensor rows(const char* arg, const Optional& t, const Tensor& weight, int64_t rank) {
    if (!t) return {nullptr, Element::f32, 0};
    check_rank(kOp, arg, *t, rank);
    check_size(kOp, arg, *t, rank - 1, weight.size(0));
    STD_TORCH_CHECK(t->get_device_index() == weight.get_device_index(), kOp, ": ", arg,
                    " must be on the device of weight");
    Tensor dense = *t;
    if (!t->is_contiguous()) {
      dense = torch::stable::new_empty(*t, t->sizes());
      torch::stable::copy_(dense, *t);
    }
    held_.push_back(dense);
    return {dense.const_data_ptr(), element_of(kOp, arg, dense), weight.size(0)};
  }

  Numbers mean_, std_;
  std::vector<Tensor> held_;
};

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, kOp, ": kernel launch failed: ", error);
}

Tensor forward(Tensor images, Tensor weight, Optional bias, Numbers mean, Numbers std,
               Optional norm_weight, Optional norm_bias, double norm_eps, Optional pos_embed,
               Optional prefix_tokens, bool pad) {
  const Arguments a(images, weight, bias, mean, std, norm_weight, norm_bias, norm_eps, pos_embed,
                    prefix_tokens, pad);
  const Call& c = a.call;
  Tensor out = torch::stable::new_empty(weight, {c.images, c.out_rows(), c.embed});
  if (out.numel() == 0) return out;
  const Launch launch(weight);
  Tensor workspace =
      torch::stable::new_empty(weight, {ForwardBuffers(c, nullptr).bytes()}, ScalarType::Byte);
  check_launch(
      patch_forward(c, out.mutable_data_ptr(), workspace.mutable_data_ptr(), launch.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor images, Tensor weight, Optional bias, Numbers mean, Numbers std,
    Optional norm_weight, Optional norm_bias, double norm_eps, Optional pos_embed,
    Optional prefix_tokens, bool pad, bool need_images, bool need_weight) {
  const Arguments a(images, weight, bias, mean, std, norm_weight, norm_bias, norm_eps, pos_embed,
                    prefix_tokens, pad);
  const Call& c = a.call;
  STD_TORCH_CHECK(grad.scalar_type() == weight.scalar_type() && grad.is_contiguous() &&
                      grad.get_device_index() == weight.get_device_index() &&
                      grad.numel() == int64_t(c.images) * c.out_rows() * c.embed,
                  kOp, ": grad must be contiguous and have the shape and dtype of the output");
  STD_TORCH_CHECK(!need_images || !c.bytes, kOp, ": uint8 images have no gradient");
  const auto nothing = [&] { return torch::stable::new_empty(weight, {0}); };
  const auto like = [&](const Optional& t) {
    return t ? torch::stable::new_empty(*t, t->sizes()) : nothing();
  };
  Tensor dimages = need_images ? torch::stable::empty_like(images) : nothing();
  Tensor dweight = need_weight ? torch::stable::empty_like(weight) : nothing();
  Tensor dbias = like(bias), dnorm_weight = like(norm_weight), dnorm_bias = like(norm_bias);
  Tensor dposition = like(pos_embed), dprefix = like(prefix_tokens);
  const auto all = [&] {
    return std::make_tuple(dimages, dweight, dbias, dnorm_weight, dnorm_bias, dposition, dprefix);
  };
  if (grad.numel() == 0) {
    for (Tensor* t : {&dweight, &dbias, &dnorm_weight, &dnorm_bias, &dposition, &dprefix})
      torch::stable::zero_(*t);
    return all();
  }
  for (int64_t d = 0; need_images && d < images.dim(); ++d)
    STD_TORCH_CHECK(images.size(d) <= 1 || dimages.stride(d) == images.stride(d), kOp,
                    ": images must be contiguous or channels_last to have a gradient");
  const auto gradient = [&](Tensor& t) {
    return t.numel() == 0 ? SmallGradient{nullptr, Element::f32}
                          : SmallGradient{t.mutable_data_ptr(), element_of(kOp, "gradient", t)};
  };
  const Gradients to{need_images ? dimages.mutable_data_ptr() : nullptr,
                     need_weight ? dweight.mutable_data_ptr() : nullptr,
                     gradient(dbias),
                     gradient(dnorm_weight),
                     gradient(dnorm_bias),
                     gradient(dposition),
                     gradient(dprefix)};
  const Launch launch(weight);
  const int64_t bytes = BackwardBuffers(c, to, grad.const_data_ptr(), nullptr).bytes();
  Tensor workspace = torch::stable::new_empty(weight, {bytes}, ScalarType::Byte);
  check_launch(
      patch_backward(c, to, grad.const_data_ptr(), workspace.mutable_data_ptr(), launch.stream()));
  // Without a product, the gradient of bias is not asked for: its memory is defined all the same.
  if (!need_weight) torch::stable::zero_(dbias);
  return all();
}

}  // namespace
}  // namespace vitkit::patch_embed

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("patch_embed_fwd", TORCH_BOX(&vitkit::patch_embed::forward));
  m.impl("patch_embed_bwd", TORCH_BOX(&vitkit::patch_embed::backward));
}
