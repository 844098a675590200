// group_norm_silu on the CPU: checks, small tensors to float32, and the choice between one group
// per thread and parts of samples.
#include "group_norm_silu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "check.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "rows.h"
#include "small_tensor.h"

VITKIT_ISA_TABLE(GroupNormKernels, group_norm_kernels)

namespace vitkit::cpu {
namespace {

constexpr const char* kOp = "group_norm_silu";
// Groups below which one thread per group leaves threads without work. A constant, not the number
// of threads: results must not depend on it.
constexpr int64_t kEnoughGroups = 8;
// Elements of one part: large enough to hide its bookkeeping, small enough to balance.
constexpr int64_t kPartElements = int64_t(1) << 16;
// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrainElements = int64_t(1) << 14;

struct Inputs {
  GroupNormShape shape;
  std::vector<float> weight, bias, add, scale, shift;  // empty where absent
  std::vector<float> gain, offset;                     // [samples, channels]
  int64_t parts = 0;                                   // 0: one group per item

  const float* add_or_null() const { return add.empty() ? nullptr : add.data(); }

  // Items of the group path or of the parts path, with a grain that keeps a thread busy.
  template <typename F>
  void each_group(const F& f) const {
    const int64_t per_item = std::max<int64_t>(1, shape.group_elements());
    parallel_for(0, shape.samples * shape.groups, 1 + kGrainElements / per_item, f);
  }
  template <typename F>
  void each_part(const F& f) const {
    const int64_t per_item = std::max<int64_t>(1, shape.channels * shape.positions / parts);
    parallel_for(0, shape.samples * parts, 1 + kGrainElements / per_item, f);
  }
  template <typename F>
  void each_sample(const F& f) const {
    parallel_for(0, shape.samples,
                 1 + kGrainElements / std::max<int64_t>(1, shape.channels * parts), f);
  }
};

Inputs read_inputs(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, bool silu,
                   const std::optional<Tensor>& add, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& shift) {
  STD_TORCH_CHECK(x.dim() >= 2, kOp, ": x must have shape [N, C, *]");
  const int64_t n = x.size(0), c = x.size(1);
  STD_TORCH_CHECK(num_groups >= 1 && c > 0 && c % num_groups == 0, kOp,
                  ": num_groups must be at least 1 and divide C = ", c, ", got ", num_groups);
  STD_TORCH_CHECK(eps >= 0, kOp, ": eps must be >= 0, got ", eps);
  Inputs in;
  in.shape = {
      norm_element(kOp, "x", x), n,    c,         n == 0 ? 0 : x.numel() / (n * c), num_groups,
      is_channels_last(x),       silu, float(eps)};
  in.weight = small_floats(kOp, "weight", weight, {c});
  in.bias = small_floats(kOp, "bias", bias, {c});
  in.add = small_floats(kOp, "add", add, {n, c});
  in.scale = small_floats(kOp, "scale", scale, {n, c});
  in.shift = small_floats(kOp, "shift", shift, {n, c});
  in.gain.resize(size_t(n * c));
  in.offset.resize(size_t(n * c));
  for (int64_t i = 0, channel = 0; i < n * c; ++i, channel = channel + 1 == c ? 0 : channel + 1) {
    const float factor = in.scale.empty() ? 1.f : 1.f + in.scale[size_t(i)];
    in.gain[size_t(i)] = (in.weight.empty() ? 1.f : in.weight[size_t(channel)]) * factor;
    in.offset[size_t(i)] = (in.bias.empty() ? 0.f : in.bias[size_t(channel)]) * factor +
                           (in.shift.empty() ? 0.f : in.shift[size_t(i)]);
  }
  const bool too_few_groups =
      n * num_groups < kEnoughGroups && in.shape.group_elements() > kGrainElements;
  if (in.shape.channels_last || too_few_groups) {
    const int64_t per_sample = in.shape.channels * in.shape.positions;
    in.parts = std::clamp<int64_t>((per_sample + kPartElements - 1) / kPartElements, 1,
                                   std::max<int64_t>(1, in.shape.positions));
  }
  return in;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, int64_t num_groups,
                                           std::optional<Tensor> weight, std::optional<Tensor> bias,
                                           double eps, bool silu, std::optional<Tensor> add,
                                           std::optional<Tensor> scale,
                                           std::optional<Tensor> shift) {
  x = dense_image(x);
  Inputs in = read_inputs(x, num_groups, weight, bias, eps, silu, add, scale, shift);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {x.size(0), num_groups}, ScalarType::Float);
  Tensor rstd = torch::stable::empty_like(mean);
  if (x.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(rstd);
    return {y, mean, rstd};
  }
  prefer_huge_pages(y.mutable_data_ptr(), x.numel() * int64_t(x.element_size()));
  GroupNormForward p{in.shape,
                     x.const_data_ptr(),
                     y.mutable_data_ptr(),
                     in.add_or_null(),
                     in.gain.data(),
                     in.offset.data(),
                     static_cast<float*>(mean.mutable_data_ptr()),
                     static_cast<float*>(rstd.mutable_data_ptr()),
                     nullptr,
                     in.parts};
  const GroupNormKernels& kernels = group_norm_kernels();
  if (in.parts == 0) {
    in.each_group([&](int64_t begin, int64_t end) { kernels.forward_groups(p, begin, end); });
    return {y, mean, rstd};
  }
  std::vector<float> partial(size_t(in.shape.samples * in.parts * in.shape.channels * 2));
  p.partial = partial.data();
  in.each_part([&](int64_t begin, int64_t end) { kernels.forward_statistics(p, begin, end); });
  in.each_sample([&](int64_t begin, int64_t end) { kernels.forward_merge(p, begin, end); });
  in.each_part([&](int64_t begin, int64_t end) { kernels.forward_apply(p, begin, end); });
  return {y, mean, rstd};
}

// The gradients of the small tensors from the sums of every channel; `which` writes one of them.
struct SmallGradients {
  const Inputs& in;
  const std::vector<float>& sums;  // [samples, channels, 3]
  const float* rstd;               // [samples, groups]

  float scaled(int64_t i) const { return in.scale.empty() ? 1.f : 1.f + in.scale[size_t(i)]; }
  float s(int64_t i, int k) const { return sums[size_t(i * 3 + k)]; }

  // [C]: sum over samples of (1 + scale) * S_k
  std::vector<float> over_samples(int k) const {
    const int64_t c = in.shape.channels;
    std::vector<double> total(size_t(c), 0.);
    for (int64_t i = 0; i < in.shape.samples * c; ++i)
      total[size_t(i % c)] += double(scaled(i)) * s(i, k);
    return {total.begin(), total.end()};
  }

  std::vector<float> of_scale() const {
    const int64_t c = in.shape.channels;
    std::vector<float> out(size_t(in.shape.samples * c));
    for (int64_t i = 0; i < int64_t(out.size()); ++i) {
      const size_t channel = size_t(i % c);
      out[size_t(i)] = (in.weight.empty() ? 1.f : in.weight[channel]) * s(i, 1) +
                       (in.bias.empty() ? 0.f : in.bias[channel]) * s(i, 0);
    }
    return out;
  }

  std::vector<float> of_shift() const {
    std::vector<float> out(sums.size() / 3);
    for (size_t i = 0; i < out.size(); ++i) out[i] = s(int64_t(i), 0);
    return out;
  }

  // The sum of dx over the positions of a channel.
  std::vector<float> of_add() const {
    const GroupNormShape& shape = in.shape;
    const int64_t per_group = shape.channels_per_group();
    const double m = double(shape.group_elements()), hw = double(shape.positions);
    std::vector<float> out(sums.size() / 3);
    if (shape.positions == 0) return out;
    for (int64_t group = 0; group < shape.samples * shape.groups; ++group) {
      double g1 = 0, g2 = 0;
      for (int64_t i = group * per_group; i < (group + 1) * per_group; ++i) {
        g1 += double(in.gain[size_t(i)]) * s(i, 0);
        g2 += double(in.gain[size_t(i)]) * s(i, 1);
      }
      for (int64_t i = group * per_group; i < (group + 1) * per_group; ++i)
        out[size_t(i)] = float(
            rstd[group] * (double(in.gain[size_t(i)]) * s(i, 0) - hw * g1 / m - s(i, 2) * g2 / m));
    }
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups,
    std::optional<Tensor> weight, std::optional<Tensor> bias, bool silu, std::optional<Tensor> add,
    std::optional<Tensor> scale, std::optional<Tensor> shift) {
  x = dense_image(x);
  Inputs in = read_inputs(x, num_groups, weight, bias, 0., silu, add, scale, shift);
  STD_TORCH_CHECK(
      grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel() && grad.dim() == x.dim(),
      kOp, ": grad must have the shape and dtype of x");
  for (int64_t d = 0; d < x.dim(); ++d) check_size(kOp, "grad", grad, d, x.size(d));
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor*>{"mean", &mean}, {"rstd", &rstd}}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->dim() == 2,
                    kOp, ": ", name, " must be a contiguous float32 [N, num_groups]");
    check_size(kOp, name, *t, 0, x.size(0));
    check_size(kOp, name, *t, 1, num_groups);
  }
  Tensor dx = torch::stable::empty_like(x);
  std::vector<float> sums(in.gain.size() * 3, 0.f);
  const auto* rstd_data = static_cast<const float*>(rstd.const_data_ptr());
  if (x.numel() > 0) {
    grad = in_layout_of(x, grad);
    prefer_huge_pages(dx.mutable_data_ptr(), x.numel() * int64_t(x.element_size()));
    GroupNormBackward p{in.shape,
                        x.const_data_ptr(),
                        grad.const_data_ptr(),
                        dx.mutable_data_ptr(),
                        in.add_or_null(),
                        in.gain.data(),
                        in.offset.data(),
                        static_cast<const float*>(mean.const_data_ptr()),
                        rstd_data,
                        sums.data(),
                        nullptr,
                        in.parts};
    const GroupNormKernels& kernels = group_norm_kernels();
    if (in.parts == 0) {
      in.each_group([&](int64_t begin, int64_t end) { kernels.backward_groups(p, begin, end); });
    } else {
      std::vector<float> partial(size_t(in.shape.samples * in.parts * in.shape.channels * 3));
      p.partial = partial.data();
      in.each_part([&](int64_t begin, int64_t end) { kernels.backward_sums(p, begin, end); });
      in.each_sample([&](int64_t begin, int64_t end) { kernels.backward_merge(p, begin, end); });
      in.each_part([&](int64_t begin, int64_t end) { kernels.backward_apply(p, begin, end); });
    }
  }
  const SmallGradients small{in, sums, rstd_data};
  const auto give = [&](const std::optional<Tensor>& like, auto&& values) {
    return like ? like_of(*like, values()) : torch::stable::new_empty(x, {0});
  };
  return {dx,
          give(weight, [&] { return small.over_samples(1); }),
          give(bias, [&] { return small.over_samples(0); }),
          give(add, [&] { return small.of_add(); }),
          give(scale, [&] { return small.of_scale(); }),
          give(shift, [&] { return small.of_shift(); })};
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("group_norm_silu_fwd", TORCH_BOX(&vitkit::cpu::forward));
  m.impl("group_norm_silu_bwd", TORCH_BOX(&vitkit::cpu::backward));
}
