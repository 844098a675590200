// layer_norm_modulate on CUDA: checks, allocations, launches.
#include "layer_norm_modulate.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "row_tensors.h"

namespace vitkit::layer_norm {
namespace {

constexpr const char* kOp = "layer_norm_modulate";
using Optional = std::optional<Tensor>;

Shape read_shape(const Tensor& x, const Optional& shift, const Optional& scale,
                 const Optional& weight, const Optional& bias) {
  check_floating(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0 && x.size(-1) <= kMaxWidth, kOp,
                  ": x must have shape [*, E] with E from 1 to ", kMaxWidth);
  STD_TORCH_CHECK(x.is_contiguous(), kOp, ": x must be contiguous");
  const int64_t width = x.size(-1), total = x.numel() / width;
  Shape s{1, total, int(width), false, {}, {}, {}, {}};
  for (const auto& [arg, t] :
       {std::pair<const char*, const Optional*>{"weight", &weight}, {"bias", &bias}})
    if (*t) check_rank(kOp, arg, **t, 1);
  s.weight = rows_of(kOp, "weight", weight, x);
  s.bias = rows_of(kOp, "bias", bias, x);
  const Optional& modulation = scale ? scale : shift;
  if (modulation) {
    STD_TORCH_CHECK(x.dim() >= 2, kOp, ": a modulated x must have shape [B, *, E]");
    s.per_token = modulation->dim() == x.dim();
  }
  for (const auto& [arg, t] :
       {std::pair<const char*, const Optional*>{"shift", &shift}, {"scale", &scale}}) {
    if (!*t) continue;
    check_rank(kOp, arg, **t, s.per_token ? x.dim() : 2);
    for (int64_t d = 0; d + 1 < (**t).dim(); ++d) check_size(kOp, arg, **t, d, x.size(d));
  }
  s.shift = rows_of(kOp, "shift", shift, x);
  s.scale = rows_of(kOp, "scale", scale, x);
  if (modulation && !s.per_token && x.size(0) > 0) {
    s.segments = x.size(0);
    s.rows = total / s.segments;
  }
  return s;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Optional shift, Optional scale, Optional weight,
                                   Optional bias, double eps) {
  STD_TORCH_CHECK(eps >= 0, kOp, ": eps must be >= 0, got ", eps);
  const Shape s = read_shape(x, shift, scale, weight, bias);
  Tensor y = torch::stable::empty_like(x);
  std::vector<int64_t> sizes{2};
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  Tensor stats = torch::stable::new_empty(x, sizes, ScalarType::Float);
  if (x.numel() == 0) return {y, stats};
  float* const mean = static_cast<float*>(stats.mutable_data_ptr());
  const ForwardParams p{
      s, x.const_data_ptr(), y.mutable_data_ptr(), mean, mean + s.segments * s.rows, float(eps), 0};
  const Launch launch(x);
  check_launch(kOp, layer_norm_forward(p, element_of(kOp, "x", x), launch.stream()));
  return {y, stats};
}

void check_backward(const Tensor& grad, const Tensor& x, const Tensor& stats) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim() &&
                      grad.is_contiguous() && grad.get_device_index() == x.get_device_index(),
                  kOp, ": grad must be contiguous, in the shape, dtype and device of x");
  for (int64_t d = 0; d < x.dim(); ++d) check_size(kOp, "grad", grad, d, x.size(d));
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                      stats.numel() * x.size(-1) == 2 * x.numel(),
                  kOp, ": stats must be a contiguous float32 [2, *]");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor stats,
                                                            Optional shift, Optional scale,
                                                            Optional weight, Optional bias) {
  const Shape s = read_shape(x, shift, scale, weight, bias);
  check_backward(grad, x, stats);
  STD_TORCH_CHECK(!s.per_token || !shift, kOp,
                  ": the gradient of a shift per token is grad, pass none");
  Tensor dx = torch::stable::empty_like(x);
  const auto like = [&](const Optional& t) {
    return t ? torch::stable::new_empty(*t, t->sizes()) : torch::stable::new_empty(x, {0});
  };
  Tensor dshift = like(shift), dscale = like(scale), dweight = like(weight), dbias = like(bias);
  if (x.numel() == 0) {
    for (Tensor* t : {&dshift, &dscale, &dweight, &dbias}) torch::stable::zero_(*t);
    return {dx, dshift, dscale, dweight, dbias};
  }
  const auto gradient = [&](const char* arg, Tensor& t, bool wanted) {
    return wanted ? SmallGradient{t.mutable_data_ptr(), element_of(kOp, arg, t)}
                  : SmallGradient{nullptr, Element::f32};
  };
  const Launch launch(x);
  const bool sums_wanted = weight || bias || (!s.per_token && (shift || scale));
  const int64_t part_rows = part_rows_of(s.rows), parts = (s.rows + part_rows - 1) / part_rows;
  const auto floats = [&](bool wanted, int64_t rows) {
    return torch::stable::new_empty(x, {wanted ? rows * 2 * s.width : 0}, ScalarType::Float);
  };
  Tensor partial = floats(sums_wanted, s.segments * parts);
  Tensor sums = floats(s.segments > 1, s.segments);
  const float* const mean = static_cast<const float*>(stats.const_data_ptr());
  const BackwardParams p{s,
                         x.const_data_ptr(),
                         grad.const_data_ptr(),
                         dx.mutable_data_ptr(),
                         mean,
                         mean + s.segments * s.rows,
                         gradient("scale", dscale, scale && s.per_token),
                         sums_wanted ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr,
                         parts,
                         part_rows};
  check_launch(kOp, layer_norm_backward(p, element_of(kOp, "x", x), launch.stream()));
  if (sums_wanted) {
    const SmallParams small{s,
                            p.partial,
                            s.segments > 1 ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr,
                            parts,
                            gradient("shift", dshift, shift && !s.per_token),
                            gradient("scale", dscale, scale && !s.per_token),
                            gradient("weight", dweight, weight.has_value()),
                            gradient("bias", dbias, bias.has_value())};
    check_launch(kOp, layer_norm_small_gradients(small, launch.stream()));
  }
  return {dx, dshift, dscale, dweight, dbias};
}

}  // namespace
}  // namespace vitkit::layer_norm

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("layer_norm_modulate_fwd", TORCH_BOX(&vitkit::layer_norm::forward));
  m.impl("layer_norm_modulate_bwd", TORCH_BOX(&vitkit::layer_norm::backward));
}
