// window_attention on the CPU: tensors to WindowForward and WindowBackward, and windows to threads.
#include "window_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "attention/inputs.h"
#include "attention/schedule.h"
#include "attention/window_table.h"
#include "check.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"

VITKIT_ISA_TABLE(WindowForwardKernels, window_forward_kernels)
VITKIT_ISA_TABLE(WindowBackwardKernels, window_backward_kernels)

namespace vitkit::cpu {
namespace {

constexpr const char* kOp = "window_attention";
constexpr int64_t kMaxHeadDim = 256, kMaxPlaces = 1024;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr int64_t kUnitsPerThread = 8;
constexpr int64_t kTableGrain = 1 << 14;  // elements
// Parts of the gradient, each with its own sums: enough for as many threads, few enough that their
// sums stay small beside what is summed.
constexpr int64_t kParts = 64;
constexpr int64_t kPartsBytes = int64_t(64) << 20;

void check_small(const char* arg, const Tensor& t, std::vector<int64_t> sizes, ScalarType dtype) {
  check_rank(kOp, arg, t, int64_t(sizes.size()));
  for (size_t d = 0; d < sizes.size(); ++d) check_size(kOp, arg, t, int64_t(d), sizes[d]);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous(), kOp, ": ", arg,
                  " must be contiguous, and of the dtype that kernels are promised");
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// The checked arguments of either direction; owns the unfolded table.
class Arguments {
 public:
  WindowInputs in{};

  Arguments(const Tensor& qkv, const std::optional<Tensor>& table,
            const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad_value,
            const std::vector<int64_t>& window, const std::vector<int64_t>& shift, double scale,
            bool roll_first) {
    check_floating(kOp, "qkv", qkv);
    check_rank(kOp, "qkv", qkv, 6);
    check_size(kOp, "qkv", qkv, 3, 3);
    check_last_dim_dense(kOp, "qkv", qkv);
    STD_TORCH_CHECK(window.size() == 2 && shift.size() == 2, kOp,
                    ": window_size and shift_size must have two elements");
    in.type = element_type(qkv);
    in.batch = qkv.size(0);
    in.heads = qkv.size(4);
    in.head_dim = qkv.size(5);
    in.grid = {qkv.size(1), qkv.size(2), window[0], window[1], shift[0], shift[1], roll_first};
    const WindowGrid& g = in.grid;
    STD_TORCH_CHECK(
        g.wh > 0 && g.ww > 0 && g.wh <= kMaxPlaces && g.ww <= kMaxPlaces &&
            g.places() <= kMaxPlaces && g.sh >= 0 && g.sh < g.wh && g.sw >= 0 && g.sw < g.ww,
        kOp, ": windows must have 1 to ", kMaxPlaces, " tokens and be larger than their shift");
    STD_TORCH_CHECK(in.head_dim % 8 == 0 && in.head_dim > 0 && in.head_dim <= kMaxHeadDim, kOp,
                    ": head_dim must be a multiple of 8 up to ", kMaxHeadDim, ", got ",
                    in.head_dim);
    in.qkv = static_cast<const char*>(qkv.const_data_ptr());
    in.batch_stride = qkv.stride(0);
    in.y_stride = qkv.stride(1);
    in.x_stride = qkv.stride(2);
    in.part_stride = qkv.stride(3);
    in.head_stride = qkv.stride(4);
    in.scale = static_cast<float>(scale);
    if (pad_value) {
      check_small("pad_value", *pad_value, {3, in.heads, in.head_dim}, qkv.scalar_type());
      in.pad_value = static_cast<const char*>(pad_value->const_data_ptr());
    }
    if (logit_scale) {
      check_small("logit_scale", *logit_scale, {in.heads}, ScalarType::Float);
      in.logit_scale = floats(*logit_scale);
    }
    if (table) {
      const int64_t rows = (2 * g.wh - 1) * (2 * g.ww - 1);
      check_small("bias_table", *table, {rows, in.heads}, ScalarType::Float);
    }
    unfold(qkv, table);
  }

  bool empty() const { return in.batch * in.grid.height * in.grid.width * in.heads == 0; }
  int64_t windows() const { return in.batch * in.grid.windows(); }
  int64_t items() const { return windows() * in.heads; }
  double flops() const {
    const double places = double(in.grid.places());
    return 4. * double(items()) * places * places * double(in.head_dim);
  }

 private:
  // Without a table, the zeros of one head stand for all.
  void unfold(const Tensor& like, const std::optional<Tensor>& table) {
    const int64_t stride = unfolded_stride(in.grid), heads = table ? in.heads : 1;
    bias_ = torch::stable::new_empty(like, {heads * stride}, ScalarType::Float);
    auto* to = static_cast<float*>(bias_.mutable_data_ptr());
    in.bias = to;
    in.bias_stride = table ? stride : 0;
    if (!table) {
      std::fill_n(to, stride, 0.f);
      return;
    }
    const float* from = floats(*table);
    parallel_for(0, heads, std::max<int64_t>(1, kTableGrain / stride),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t h = begin; h < end; ++h)
                     unfold_table(in.grid, from + h, in.heads, kLog2e, to + h * stride);
                 });
  }

  Tensor bias_;
};

// Threads take units of consecutive items: f(begin, end, scratch).
template <typename F>
void run_units(int64_t items, int64_t unit, double flops, int64_t scratch_bytes, const F& f) {
  run_items((items + unit - 1) / unit, threads_for(flops), size_t(scratch_bytes),
            [&](int64_t index, void* scratch, int64_t) {
              f(index * unit, std::min((index + 1) * unit, items), scratch);
            });
}

std::tuple<Tensor, Tensor> window_attention_fwd(Tensor qkv, std::optional<Tensor> table,
                                                std::optional<Tensor> logit_scale,
                                                std::optional<Tensor> pad_value,
                                                std::vector<int64_t> window,
                                                std::vector<int64_t> shift, double scale,
                                                bool roll_first) {
  const Arguments arguments(qkv, table, logit_scale, pad_value, window, shift, scale, roll_first);
  const WindowInputs& in = arguments.in;
  const WindowGrid& g = in.grid;
  Tensor out = torch::stable::new_empty(qkv, {in.batch, g.height, g.width, in.heads * in.head_dim});
  Tensor lse =
      torch::stable::new_empty(qkv, {in.batch, g.height, g.width, in.heads}, ScalarType::Float);
  if (arguments.empty()) return {out, lse};
  prefer_huge_pages(out);
  const WindowForwardKernels& kernels = window_forward_kernels();
  const WindowForward p{in, static_cast<char*>(out.mutable_data_ptr()),
                        static_cast<float*>(lse.mutable_data_ptr())};
  // Whole windows where there are enough: the heads of a token are neighbours in memory.
  int64_t unit = std::max<int64_t>(1, arguments.items() / (num_threads() * kUnitsPerThread));
  if (unit > in.heads) unit = unit / in.heads * in.heads;
  run_units(
      arguments.items(), unit, arguments.flops(), kernels.scratch_bytes(p),
      [&](int64_t begin, int64_t end, void* scratch) { kernels.run(p, begin, end, scratch); });
  return {out, lse};
}

// The sums of the gradient, and what becomes of them.
class Sums {
 public:
  WindowSums view{};
  int64_t parts;

  Sums(const Tensor& like, const WindowInputs& in, int64_t windows, bool table, bool pad_value)
      : parts(std::clamp<int64_t>(
            kPartsBytes / (in.heads * unfolded_stride(in.grid) * int64_t(sizeof(float))), 1,
            std::min(windows, kParts))),
        in_(in) {
    const auto make = [&](Tensor& t, int64_t elements) {
      t = torch::stable::new_empty(like, {parts * elements}, ScalarType::Float);
      return static_cast<float*>(t.mutable_data_ptr());
    };
    if (table) view.bias = make(bias_, in.heads * in.bias_stride);
    if (in.logit_scale) view.logit = make(logit_, in.heads);
    if (pad_value) view.pad_value = make(pad_value_, in.heads * 2 * in.head_dim);
  }

  void write_table(Tensor& to) const {
    auto* data = static_cast<float*>(to.mutable_data_ptr());
    const int64_t stride = in_.bias_stride, all = in_.heads * stride;
    parallel_for(0, in_.heads, std::max<int64_t>(1, kTableGrain / (parts * stride)),
                 [&](int64_t begin, int64_t end) {
                   add_parts(view.bias, all, begin * stride, end * stride);
                   for (int64_t h = begin; h < end; ++h)
                     fold_table(in_.grid, view.bias + h * stride, in_.heads, data + h);
                 });
  }

  void write_logit_scale(Tensor& to) const {
    add_parts(view.logit, in_.heads, 0, in_.heads);
    std::copy_n(view.logit, in_.heads, static_cast<float*>(to.mutable_data_ptr()));
  }

  // [3, heads, D], of q zero, in the type of qkv.
  void write_pad_value(Tensor& to) const {
    const int64_t d = in_.head_dim, row = in_.heads * d;
    add_parts(view.pad_value, 2 * row, 0, 2 * row);
    Tensor sums = torch::stable::new_zeros(to, {3, in_.heads, d}, ScalarType::Float);
    auto* data = static_cast<float*>(sums.mutable_data_ptr());
    for (int64_t h = 0; h < in_.heads; ++h)
      for (int64_t part = 0; part < 2; ++part)
        std::copy_n(view.pad_value + (2 * h + part) * d, d, data + (part + 1) * row + h * d);
    torch::stable::copy_(to, sums);
  }

 private:
  // Elements [begin, end) of the first part become the sum over all parts, `stride` apart.
  void add_parts(float* sums, int64_t stride, int64_t begin, int64_t end) const {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = begin; i < end; ++i) sums[i] += sums[part * stride + i];
  }

  const WindowInputs& in_;
  Tensor bias_, logit_, pad_value_;
};

void check_map(const char* arg, const Tensor& t, const Tensor& qkv, int64_t last,
               ScalarType dtype) {
  check_small(arg, t, {qkv.size(0), qkv.size(1), qkv.size(2), last}, dtype);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients window_attention_bwd(Tensor grad, Tensor qkv, Tensor out, Tensor lse,
                               std::optional<Tensor> table, std::optional<Tensor> logit_scale,
                               std::optional<Tensor> pad_value, std::vector<int64_t> window,
                               std::vector<int64_t> shift, double scale, bool roll_first) {
  const Arguments arguments(qkv, table, logit_scale, pad_value, window, shift, scale, roll_first);
  const WindowInputs& in = arguments.in;
  grad = torch::stable::contiguous(grad);
  check_map("grad", grad, qkv, in.heads * in.head_dim, qkv.scalar_type());
  check_map("out", out, qkv, in.heads * in.head_dim, qkv.scalar_type());
  check_map("lse", lse, qkv, in.heads, ScalarType::Float);

  const auto like = [&](const std::optional<Tensor>& t) {
    return t ? torch::stable::new_zeros(*t, t->sizes()) : torch::stable::new_empty(qkv, {0});
  };
  Gradients gradients{torch::stable::new_empty(qkv, qkv.sizes()), like(table), like(logit_scale),
                      like(pad_value)};
  auto& [dqkv, dtable, dlogit_scale, dpad_value] = gradients;
  if (arguments.empty()) return gradients;
  prefer_huge_pages(dqkv);

  const bool pads = pad_value && !in.grid.divides();
  const Sums sums(qkv, in, arguments.windows(), table.has_value(), pads);
  const WindowBackwardKernels& kernels = window_backward_kernels();
  const WindowBackward p{in,
                         static_cast<const char*>(out.const_data_ptr()),
                         static_cast<const char*>(grad.const_data_ptr()),
                         floats(lse),
                         static_cast<char*>(dqkv.mutable_data_ptr()),
                         sums.parts,
                         sums.view};
  const int64_t items = sums.parts * in.heads;
  // Whole parts where there are enough: the heads of a token are neighbours in memory.
  const int64_t unit = sums.parts >= num_threads() ? in.heads : 1;
  run_units(
      items, unit, 2.5 * arguments.flops(), kernels.scratch_bytes(p),
      [&](int64_t begin, int64_t end, void* scratch) { kernels.run(p, begin, end, scratch); });
  if (table) sums.write_table(dtable);
  if (logit_scale) sums.write_logit_scale(dlogit_scale);
  if (pads) sums.write_pad_value(dpad_value);
  return gradients;
}

}  // namespace
}  // namespace vitkit::cpu

STABLE_TORCH_LIBRARY_IMPL(vitkit, CPU, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&vitkit::cpu::window_attention_fwd));
  m.impl("window_attention_bwd", TORCH_BOX(&vitkit::cpu::window_attention_bwd));
}
