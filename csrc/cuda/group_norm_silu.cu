// group_norm_silu on CUDA: checks, workspaces, the choice of path, launches.
#include "group_norm_silu.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "launch.h"
#include "rows.h"

namespace vitkit::group_norm {
namespace {

constexpr const char* kOp = "group_norm_silu";
// A group of this many bytes stays in shared memory, which every architecture grants without
// asking.
constexpr int64_t kSharedBytes = 48 * 1024;
// Groups that keep a large GPU busy with a block each; below, a group is split over blocks.
constexpr int64_t kEnoughGroups = 256;
// Groups up to this many elements are cheaper on one block than three launches for their parts.
constexpr int64_t kSmallGroup = 1 << 15;
constexpr int64_t kPartElements = 1 << 14;
// Of a group on one block, or of its channels in parts: counted in 32 bits.
constexpr int64_t kMostElements = 0x7fffffff;

SmallTensor small(const char* arg, const std::optional<Tensor>& t, const Tensor& x,
                  bool per_sample) {
  if (!t) return {nullptr, Element::f32, 0, 0};
  STD_TORCH_CHECK(t->get_device_index() == x.get_device_index(), kOp, ": ", arg,
                  " must be on the device of x");
  check_rank(kOp, arg, *t, per_sample ? 2 : 1);
  if (per_sample) check_size(kOp, arg, *t, 0, x.size(0));
  check_size(kOp, arg, *t, per_sample ? 1 : 0, x.size(1));
  return {t->const_data_ptr(), element_of(kOp, arg, *t), per_sample ? t->stride(0) : 0,
          t->stride(-1)};
}

Params make_params(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& add,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  STD_TORCH_CHECK(x.dim() >= 2, kOp, ": x must have shape [N, C, *]");
  const int64_t n = x.size(0), c = x.size(1);
  STD_TORCH_CHECK(num_groups >= 1 && c > 0 && c % num_groups == 0, kOp,
                  ": num_groups must be at least 1 and divide C = ", c, ", got ", num_groups);
  STD_TORCH_CHECK(c <= 0x7fffffff, kOp, ": C must be at most 2147483647 on CUDA, got ", c);
  STD_TORCH_CHECK(eps >= 0, kOp, ": eps must be >= 0, got ", eps);
  Params p{};
  p.x = x.const_data_ptr();
  p.weight = small("weight", weight, x, false);
  p.bias = small("bias", bias, x, false);
  p.add = small("add", add, x, true);
  p.scale = small("scale", scale, x, true);
  p.shift = small("shift", shift, x, true);
  p.samples = n;
  p.channels = c;
  p.positions = n == 0 ? 0 : x.numel() / (n * c);
  p.groups = num_groups;
  p.eps = float(eps);
  return p;
}

// Cuts the positions into parts, by the shape alone: results do not depend on the GPU.
void cut_into_parts(Params& p, bool columns) {
  constexpr int64_t kMostPack = 8;
  const auto quotient_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t wanted =
      columns ? std::max<int64_t>(64, kPartElements / p.channels) : kPartElements;
  const int64_t count = std::min<int64_t>(quotient_up(p.positions, wanted), 4096);
  p.part_length = quotient_up(quotient_up(p.positions, count), kMostPack) * kMostPack;
  p.parts = quotient_up(p.positions, p.part_length);
  STD_TORCH_CHECK(p.per_group() * p.parts <= kMostElements, kOp, ": C / num_groups times ", p.parts,
                  " parts of the positions must be at most ", kMostElements,
                  " on CUDA, got C = ", p.channels, ", num_groups = ", p.groups);
}

template <typename F>
void with_types(const Tensor& x, bool silu, bool packed, F&& f) {
  const auto with_element = [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const auto with_pack = [&](auto pack) {
      if (silu) {
        f(element, std::true_type{}, pack);
      } else {
        f(element, std::false_type{}, pack);
      }
    };
    if (packed) {
      with_pack(std::integral_constant<int, kFullPack<T>>{});
    } else {
      with_pack(std::integral_constant<int, 1>{});
    }
  };
  switch (element_of(kOp, "x", x)) {
    case Element::f32:
      return with_element(static_cast<float*>(nullptr));
    case Element::bf16:
      return with_element(static_cast<__nv_bfloat16*>(nullptr));
    case Element::f16:
      return with_element(static_cast<__half*>(nullptr));
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether 16-byte packs never cross a row and start aligned.
bool packs_fit(const Params& p, const Tensor& x, bool columns) {
  const int64_t row = columns ? p.channels : p.positions;
  return row * int64_t(x.element_size()) % 16 == 0 && aligned(p.x) && aligned(p.y) &&
         (p.grad == nullptr || aligned(p.grad));
}

unsigned grid(int64_t blocks, const char* what, int64_t limit = 0x7fffffff) {
  STD_TORCH_CHECK(blocks <= limit, kOp, ": ", what, " must be at most ", limit, " on CUDA, got ",
                  blocks);
  return unsigned(blocks);
}

// A block for each part of a row, or for each part of kWarp packs of channels.
dim3 part_blocks(const Params& p, bool columns, int pack) {
  const unsigned parts = grid(p.parts, "parts", 65535);
  if (!columns) return dim3(grid(p.samples * p.channels, "N * C"), parts);
  return dim3(grid((p.channels / pack + kWarp - 1) / kWarp, "C"), parts,
              grid(p.samples, "N", 65535));
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, int64_t num_groups,
                                           std::optional<Tensor> weight, std::optional<Tensor> bias,
                                           double eps, bool silu, std::optional<Tensor> add,
                                           std::optional<Tensor> scale,
                                           std::optional<Tensor> shift) {
  x = dense_image(x);
  Params p = make_params(x, num_groups, weight, bias, eps, add, scale, shift);
  const bool columns = is_channels_last(x);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {x.size(0), num_groups}, ScalarType::Float);
  Tensor rstd = torch::stable::empty_like(mean);
  if (x.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(rstd);
    return {y, mean, rstd};
  }
  p.y = y.mutable_data_ptr();
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  const Launch launch(x);
  const int64_t group_size = p.channels / p.groups * p.positions, groups = p.samples * p.groups;
  const bool by_group = !columns && (group_size <= kSmallGroup ||
                                     (groups >= kEnoughGroups && group_size <= kMostElements));
  if (!by_group) cut_into_parts(p, columns);
  Tensor partial = torch::stable::new_empty(
      x, {by_group ? 0 : p.samples * p.parts * p.channels * 2}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());

  with_types(x, silu, packs_fit(p, x, columns), [&](auto* element, auto silu_constant, auto pack) {
    using T = std::remove_pointer_t<decltype(element)>;
    constexpr bool kSilu = decltype(silu_constant)::value;
    constexpr int kPack = decltype(pack)::value;
    if (by_group) {
      const int64_t bytes = group_size * int64_t(sizeof(T));
      const bool cached = bytes <= kSharedBytes;
      group_norm_silu_fwd_kernel<T, kSilu, kPack>
          <<<grid(groups, "N * num_groups"), kThreads, cached ? size_t(bytes) : 0,
             launch.stream()>>>(p, cached);
      return;
    }
    const dim3 blocks = part_blocks(p, columns, kPack);
    if (columns) {
      column_statistics_kernel<T, kPack><<<blocks, kThreads, 0, launch.stream()>>>(p);
    } else {
      row_statistics_kernel<T, kPack><<<blocks, kThreads, 0, launch.stream()>>>(p);
    }
    merge_statistics_kernel<<<grid(groups, "N * num_groups"), kThreads, 0, launch.stream()>>>(p);
    if (columns) {
      apply_fwd_kernel<T, kSilu, kPack, true><<<blocks, kThreads, 0, launch.stream()>>>(p);
    } else {
      apply_fwd_kernel<T, kSilu, kPack, false><<<blocks, kThreads, 0, launch.stream()>>>(p);
    }
  });
  launch.check(kOp);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups,
    std::optional<Tensor> weight, std::optional<Tensor> bias, bool silu, std::optional<Tensor> add,
    std::optional<Tensor> scale, std::optional<Tensor> shift) {
  x = dense_image(x);
  Params p = make_params(x, num_groups, weight, bias, 0., add, scale, shift);
  const bool columns = is_channels_last(x);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim(), kOp,
                  ": grad must have the shape and dtype of x");
  for (int64_t d = 0; d < x.dim(); ++d) check_size(kOp, "grad", grad, d, x.size(d));
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor*>{"mean", &mean}, {"rstd", &rstd}}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->dim() == 2,
                    kOp, ": ", name, " must be a contiguous float32 [N, num_groups]");
    check_size(kOp, name, *t, 0, x.size(0));
    check_size(kOp, name, *t, 1, num_groups);
  }
  const auto floats = [&](int64_t count) {
    return torch::stable::new_empty(x, {count}, ScalarType::Float);
  };
  Tensor dx = torch::stable::empty_like(x);
  const int64_t per_channel = p.samples * p.channels;
  Tensor sums = floats(per_channel * 3), group_sums = floats(p.samples * p.groups * 2);
  Tensor small_out = floats(2 * p.channels + 3 * per_channel);
  auto* small_data = static_cast<float*>(small_out.mutable_data_ptr());
  const SmallGradients out{small_data, small_data + p.channels, small_data + 2 * p.channels,
                           small_data + 2 * p.channels + per_channel,
                           small_data + 2 * p.channels + 2 * per_channel};
  if (x.numel() == 0) {
    torch::stable::zero_(small_out);
  } else {
    grad = in_layout_of(x, grad);
    p.grad = grad.const_data_ptr();
    p.y = dx.mutable_data_ptr();
    p.mean = static_cast<float*>(mean.mutable_data_ptr());
    p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    p.sums = static_cast<float*>(sums.mutable_data_ptr());
    p.group_sums = static_cast<float*>(group_sums.mutable_data_ptr());
    cut_into_parts(p, columns);
    Tensor partial = floats(p.samples * p.parts * p.channels * 3);
    p.partial = static_cast<float*>(partial.mutable_data_ptr());
    const Launch launch(x);
    with_types(x, silu, packs_fit(p, x, columns),
               [&](auto* element, auto silu_constant, auto pack) {
                 using T = std::remove_pointer_t<decltype(element)>;
                 constexpr bool kSilu = decltype(silu_constant)::value;
                 constexpr int kPack = decltype(pack)::value;
                 const dim3 blocks = part_blocks(p, columns, kPack);
                 const unsigned groups = grid(p.samples * p.groups, "N * num_groups");
                 const auto stream = launch.stream();
                 if (columns) {
                   column_sums_kernel<T, kSilu, kPack><<<blocks, kThreads, 0, stream>>>(p);
                 } else {
                   row_sums_kernel<T, kSilu, kPack><<<blocks, kThreads, 0, stream>>>(p);
                 }
                 merge_sums_kernel<<<groups, kThreads, 0, stream>>>(p);
                 if (columns) {
                   apply_bwd_kernel<T, kSilu, kPack, true><<<blocks, kThreads, 0, stream>>>(p);
                 } else {
                   apply_bwd_kernel<T, kSilu, kPack, false><<<blocks, kThreads, 0, stream>>>(p);
                 }
                 small_gradients_kernel<<<grid((p.channels + kThreads - 1) / kThreads, "C"),
                                          kThreads, 0, stream>>>(p, out);
               });
    launch.check(kOp);
  }
  const auto give = [&](const std::optional<Tensor>& like, int64_t start) {
    if (!like) return torch::stable::new_empty(x, {0});
    Tensor flat = torch::stable::narrow(small_out, 0, start, like->numel());
    Tensor result = torch::stable::new_empty(*like, like->sizes());
    torch::stable::copy_(result, torch::stable::view(flat, like->sizes()));
    return result;
  };
  return {dx,
          give(weight, 0),
          give(bias, p.channels),
          give(add, 2 * p.channels),
          give(scale, 2 * p.channels + per_channel),
          give(shift, 2 * p.channels + 2 * per_channel)};
}

}  // namespace
}  // namespace vitkit::group_norm

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("group_norm_silu_fwd", TORCH_BOX(&vitkit::group_norm::forward));
  m.impl("group_norm_silu_bwd", TORCH_BOX(&vitkit::group_norm::backward));
}
