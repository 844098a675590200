// layer_norm_modulate on the CPU: checks, cuts of the work, and the gradients of the small tensors.
#include "layer_norm_modulate.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "small_tensor.h"

VITKIT_ISA_TABLE(LayerNormKernels, layer_norm_kernels)

namespace vitkit::cpu {
namespace {

constexpr const char* kOp = "layer_norm_modulate";
// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrainElements = int64_t(1) << 14;
// Parts of a segment in the gradient: rows enough to hide the sums of a part, parts enough for any
// number of threads. Constants, not the number of threads: results must not depend on it.
constexpr int64_t kPartRows = 64, kMaxParts = 256;

LayerNormShape read_shape(const Tensor& x, const std::optional<Tensor>& shift,
                          const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
                          const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, kOp, ": x must have shape [*, E] with E >= 1");
  STD_TORCH_CHECK(x.is_contiguous(), kOp, ": x must be contiguous");
  const int64_t width = x.size(-1), total = x.numel() / width;
  LayerNormShape s{norm_element(kOp, "x", x), 1, total, width, {}, {}, {}, {}, false};
  const auto vector = [&](const char* arg, const std::optional<Tensor>& t) -> Rows {
    if (!t) return {};
    check_rank(kOp, arg, *t, 1);
    check_size(kOp, arg, *t, 0, width);
    return rows_of(kOp, arg, *t);
  };
  s.weight = vector("weight", weight);
  s.bias = vector("bias", bias);
  const std::optional<Tensor>& modulation = scale ? scale : shift;
  if (!modulation) return s;
  STD_TORCH_CHECK(x.dim() >= 2, kOp, ": a modulated x must have shape [B, *, E]");
  s.per_token = modulation->dim() == x.dim();
  const auto rows = [&](const char* arg, const std::optional<Tensor>& t) -> Rows {
    if (!t) return {};
    check_rank(kOp, arg, *t, s.per_token ? x.dim() : 2);
    for (int64_t d = 0; s.per_token && d < x.dim(); ++d) check_size(kOp, arg, *t, d, x.size(d));
    check_size(kOp, arg, *t, 0, x.size(0));
    check_size(kOp, arg, *t, -1, width);
    const Rows found = rows_of(kOp, arg, *t);
    STD_TORCH_CHECK(!s.per_token || found.element == s.element || found.element == NormElement::f32,
                    kOp, ": ", arg, " per token must be float32 or have the dtype of x");
    return found;
  };
  s.shift = rows("shift", shift);
  s.scale = rows("scale", scale);
  STD_TORCH_CHECK(!s.per_token || !shift || !scale || s.shift.element == s.scale.element, kOp,
                  ": shift per token must have the dtype of scale");
  if (!s.per_token && x.size(0) > 0) {
    s.segments = x.size(0);
    s.rows = total / s.segments;
  }
  return s;
}

std::tuple<Tensor, Tensor> forward(Tensor x, std::optional<Tensor> shift,
                                   std::optional<Tensor> scale, std::optional<Tensor> weight,
                                   std::optional<Tensor> bias, double eps) {
  STD_TORCH_CHECK(eps >= 0, kOp, ": eps must be >= 0, got ", eps);
  const LayerNormShape s = read_shape(x, shift, scale, weight, bias);
  Tensor y = torch::stable::empty_like(x);
  std::vector<int64_t> sizes{2};
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  Tensor stats = torch::stable::new_empty(x, sizes, ScalarType::Float);
  if (x.numel() == 0) return {y, stats};
  const int64_t total = s.segments * s.rows;
  prefer_huge_pages(y.mutable_data_ptr(), x.numel() * int64_t(x.element_size()));
  float* mean = static_cast<float*>(stats.mutable_data_ptr());
  const LayerNormForward p{s,    float(eps),  x.const_data_ptr(), y.mutable_data_ptr(),
                           mean, mean + total};
  const LayerNormKernels& kernels = layer_norm_kernels();
  parallel_for(0, total, 1 + kGrainElements / s.width,
               [&](int64_t begin, int64_t end) { kernels.forward(p, begin, end); });
  return {y, stats};
}

// The gradients of the small tensors from the sums of every segment.
struct SmallGradients {
  const LayerNormShape& s;
  const std::vector<float>& sums;  // [segments, 2, width]: of dz and dz * xhat

  const float* of(int64_t segment, int k) const {
    return sums.data() + (segment * 2 + k) * s.width;
  }

  // [E]: sum over segments of (1 + scale) * sum k; scale [segments, E] or empty
  std::vector<float> over_segments(const std::vector<float>& scale, int k) const {
    std::vector<double> total(size_t(s.width), 0.);
    for (int64_t g = 0; g < s.segments; ++g)
      for (int64_t e = 0; e < s.width; ++e)
        total[size_t(e)] +=
            (scale.empty() ? 1. : 1. + double(scale[size_t(g * s.width + e)])) * of(g, k)[e];
    return {total.begin(), total.end()};
  }

  // [B, E]; weight and bias [E] or empty
  std::vector<float> of_scale(const std::vector<float>& weight,
                              const std::vector<float>& bias) const {
    std::vector<float> out(size_t(s.segments * s.width));
    for (int64_t g = 0; g < s.segments; ++g)
      for (int64_t e = 0; e < s.width; ++e)
        out[size_t(g * s.width + e)] = (weight.empty() ? 1.f : weight[size_t(e)]) * of(g, 1)[e] +
                                       (bias.empty() ? 0.f : bias[size_t(e)]) * of(g, 0)[e];
    return out;
  }

  std::vector<float> of_shift() const {
    std::vector<float> out(size_t(s.segments * s.width));
    for (int64_t g = 0; g < s.segments; ++g)
      std::copy_n(of(g, 0), s.width, out.begin() + g * s.width);
    return out;
  }
};

void check_backward(const Tensor& grad, const Tensor& x, const Tensor& stats) {
  STD_TORCH_CHECK(
      grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim() && grad.is_contiguous(), kOp,
      ": grad must be contiguous, in the shape and dtype of x");
  for (int64_t d = 0; d < x.dim(); ++d) check_size(kOp, "grad", grad, d, x.size(d));
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                      stats.numel() * x.size(-1) == 2 * x.numel(),
                  kOp, ": stats must be a contiguous float32 [2, *]");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor stats,
                                                            std::optional<Tensor> shift,
                                                            std::optional<Tensor> scale,
                                                            std::optional<Tensor> weight,
                                                            std::optional<Tensor> bias) {
  const LayerNormShape s = read_shape(x, shift, scale, weight, bias);
  check_backward(grad, x, stats);
  STD_TORCH_CHECK(!s.per_token || !shift, kOp,
                  ": the gradient of a shift per token is grad, pass none");
  Tensor dx = torch::stable::empty_like(x);
  const auto none = [&] { return torch::stable::new_empty(x, {0}); };
  Tensor dscale = none();
  if (scale && s.per_token) dscale = torch::stable::new_empty(*scale, scale->sizes());
  const bool sums_wanted = weight || bias || (!s.per_token && (shift || scale));
  const int64_t total = s.segments * s.rows;
  std::vector<float> partial, sums;
  if (sums_wanted) sums.assign(size_t(s.segments * 2 * s.width), 0.f);
  if (x.numel() > 0) {
    const int64_t rows = std::max(kPartRows, (s.rows + kMaxParts - 1) / kMaxParts);
    const int64_t parts = (s.rows + rows - 1) / rows;
    if (sums_wanted) partial.resize(size_t(s.segments * parts * 2 * s.width));
    prefer_huge_pages(dx.mutable_data_ptr(), x.numel() * int64_t(x.element_size()));
    const float* mean = static_cast<const float*>(stats.const_data_ptr());
    const LayerNormBackward p{s,
                              x.const_data_ptr(),
                              grad.const_data_ptr(),
                              dx.mutable_data_ptr(),
                              dscale.numel() > 0 ? dscale.mutable_data_ptr() : nullptr,
                              mean,
                              mean + total,
                              sums_wanted ? partial.data() : nullptr,
                              sums_wanted ? sums.data() : nullptr,
                              parts};
    const LayerNormKernels& kernels = layer_norm_kernels();
    const int64_t per_part = std::max<int64_t>(1, s.rows / parts) * s.width;
    parallel_for(0, s.segments * parts, 1 + kGrainElements / per_part,
                 [&](int64_t begin, int64_t end) { kernels.backward(p, begin, end); });
    if (sums_wanted) kernels.merge(p, 0, s.segments);
  }
  const SmallGradients small{s, sums};
  const auto floats = [&](const char* arg, const std::optional<Tensor>& t) {
    return s.per_token ? std::vector<float>{} : small_floats(kOp, arg, t, {s.segments, s.width});
  };
  const auto vector = [&](const char* arg, const std::optional<Tensor>& t) {
    return small_floats(kOp, arg, t, {s.width});
  };
  if (scale && !s.per_token && x.size(0) > 0)
    dscale = like_of(*scale, small.of_scale(vector("weight", weight), vector("bias", bias)));
  if (x.numel() == 0) {
    const auto zeros = [&](const std::optional<Tensor>& t) {
      return t ? like_of(*t, std::vector<float>(size_t(t->numel()), 0.f)) : none();
    };
    return {dx, zeros(shift), zeros(scale), zeros(weight), zeros(bias)};
  }
  return {dx, shift ? like_of(*shift, small.of_shift()) : none(), dscale,
          weight ? like_of(*weight, small.over_segments(floats("scale", scale), 1)) : none(),
          bias ? like_of(*bias, small.over_segments(floats("scale", scale), 0)) : none()};
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("layer_norm_modulate_fwd", TORCH_BOX(&vitkit::cpu::forward));
  m.impl("layer_norm_modulate_bwd", TORCH_BOX(&vitkit::cpu::backward));
}
