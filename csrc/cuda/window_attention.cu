// window_attention on CUDA: checks, allocations, launches.
#include "window_attention.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "attention_tensors.h"
#include "launch.h"

namespace vitkit::attention {
namespace {

constexpr const char* kOp = "window_attention";
constexpr int64_t kMaxPlaces = 1024;

void check_small(const char* arg, const Tensor& t, std::vector<int64_t> sizes, ScalarType dtype,
                 const Tensor& qkv) {
  check_rank(kOp, arg, t, int64_t(sizes.size()));
  for (size_t d = 0; d < sizes.size(); ++d) check_size(kOp, arg, t, int64_t(d), sizes[d]);
  STD_TORCH_CHECK(
      t.scalar_type() == dtype && t.is_contiguous() &&
          t.get_device_index() == qkv.get_device_index(),
      kOp, ": ", arg,
      " must be contiguous on the device of qkv, and of the dtype that kernels are promised");
}

// [B, H, W, ...] with rows behind each other, so that a token has one index.
Tensor with_one_token_axis(const Tensor& t) {
  const bool one = t.size(1) <= 1 || t.stride(1) == t.size(2) * t.stride(2);
  return one ? with_aligned_rows(t) : dense_copy(t);
}

// q, k or v of qkv [B, H, W, 3, heads, D].
Rows part_of(const Tensor& qkv, int part) {
  auto* const data = static_cast<char*>(const_cast<void*>(qkv.const_data_ptr()));
  return {data + part * qkv.stride(3) * int64_t(qkv.element_size()), qkv.stride(0), qkv.stride(2),
          qkv.stride(4)};
}

// [B, H, W, heads * D] with dense rows.
Rows by_head(const Tensor& t, int64_t head_dim) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(2), head_dim};
}

// The arguments of both directions. Holds the tensors whose memory the parameters point to.
class Arguments {
 public:
  Tensor qkv;
  Element element;
  int64_t heads, head_dim;
  WindowMap map{};
  SwinTerm term{};
  float scale;  // times log2(e)

  Arguments(const Tensor& qkv_in, const std::optional<Tensor>& table,
            const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad_value,
            const std::vector<int64_t>& window, const std::vector<int64_t>& shift, double scale_in,
            bool roll_first)
      : scale(float(scale_in * double(kLog2e))) {
    check_floating(kOp, "qkv", qkv_in);
    check_rank(kOp, "qkv", qkv_in, 6);
    check_size(kOp, "qkv", qkv_in, 3, 3);
    check_head_dim(kOp, "qkv", qkv_in, logit_scale ? 64 : 128);
    STD_TORCH_CHECK(window.size() == 2 && shift.size() == 2, kOp,
                    ": window_size and shift_size must have two elements");
    STD_TORCH_CHECK(
        window[0] > 0 && window[1] > 0 && window[0] <= kMaxPlaces && window[1] <= kMaxPlaces &&
            window[0] * window[1] <= kMaxPlaces && shift[0] >= 0 && shift[0] < window[0] &&
            shift[1] >= 0 && shift[1] < window[1],
        kOp, ": windows must have 1 to ", kMaxPlaces, " tokens and be larger than their shift");
    element = element_of(kOp, "qkv", qkv_in);
    qkv = with_one_token_axis(qkv_in);
    heads = qkv.size(4);
    head_dim = qkv.size(5);
    set_map({int(window[0]), int(window[1])}, {int(shift[0]), int(shift[1])}, roll_first);
    if (pad_value) {
      check_small("pad_value", *pad_value, {3, heads, head_dim}, qkv.scalar_type(), qkv);
      map.pads = pad_value->const_data_ptr();
    }
    if (logit_scale) {
      check_small("logit_scale", *logit_scale, {heads}, ScalarType::Float, qkv);
      term.logit_scale = floats(*logit_scale);
    }
    if (table) set_table(*table);
  }

  bool empty() const { return qkv.numel() == 0; }
  int64_t slots() const {
    return int64_t(2 * map.window_height - 1) * (2 * map.window_width.value - 1);
  }
  int64_t tokens() const { return int64_t(map.height) * map.width; }

  Tensor new_rows() const {
    return torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), heads * head_dim});
  }
  Tensor new_statistics() const {
    return torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), heads},
                                    ScalarType::Float);
  }

 private:
  void set_map(std::array<int, 2> window, std::array<int, 2> shift, bool roll_first) {
    map.batch = as_int(kOp, "B", qkv.size(0));
    map.heads = as_int(kOp, "heads", heads);
    map.height = as_int(kOp, "H", qkv.size(1));
    map.width = as_int(kOp, "W", qkv.size(2));
    map.rows = (map.height + window[0] - 1) / window[0];
    map.columns = (map.width + window[1] - 1) / window[1];
    map.window_height = window[0];
    map.window_width = Divisor::of(window[1]);
    map.shift_y = shift[0];
    map.shift_x = shift[1];
    map.ragged = map.height % window[0] != 0 || map.width % window[1] != 0;
    map.roll_first = roll_first;
    map.pad_part = heads * head_dim;
    map.pad_head = head_dim;
    term.window_height = map.window_height;
    term.window_width = map.window_width;
    term.limit_y = map.rows * window[0] - shift[0];
    term.limit_x = map.columns * window[1] - shift[1];
    term.heads = map.heads;
    as_int(kOp, "the number of windows", map.windows());
  }

  // Slots of a head become neighbours.
  void set_table(const Tensor& table) {
    check_small("bias_table", table, {slots(), heads}, ScalarType::Float, qkv);
    table_ = torch::stable::new_empty(table, {heads, slots()});
    torch::stable::copy_(table_, torch::stable::transpose(table, 0, 1));
    term.table = floats(std::as_const(table_));
  }

  Tensor table_;
};

std::tuple<Tensor, Tensor> forward(Tensor qkv, std::optional<Tensor> table,
                                   std::optional<Tensor> logit_scale,
                                   std::optional<Tensor> pad_value, std::vector<int64_t> window,
                                   std::vector<int64_t> shift, double scale, bool roll_first) {
  const Launch launch(qkv);
  const Arguments a(qkv, table, logit_scale, pad_value, window, shift, scale, roll_first);
  Tensor out = a.new_rows(), lse = a.new_statistics();
  if (a.empty()) return {out, lse};
  const WindowForward p{
      {part_of(a.qkv, 0), part_of(a.qkv, 1), part_of(a.qkv, 2), by_head(out, a.head_dim),
       floats(lse), a.tokens() * a.heads, 1, int(a.head_dim), false, a.scale},
      a.map,
      a.term};
  check_launch(kOp, window_forward(p, a.element, launch.stream()));
  return {out, lse};
}

void check_map(const char* arg, const Tensor& t, const Tensor& qkv, int64_t last,
               ScalarType dtype) {
  check_rank(kOp, arg, t, 4);
  for (int64_t d = 0; d < 3; ++d) check_size(kOp, arg, t, d, qkv.size(d));
  check_size(kOp, arg, t, 3, last);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.get_device_index() == qkv.get_device_index(), kOp,
                  ": ", arg,
                  " must be on the device of qkv, and of the dtype that kernels are promised");
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, std::optional<Tensor> table,
                   std::optional<Tensor> logit_scale, std::optional<Tensor> pad_value,
                   std::vector<int64_t> window, std::vector<int64_t> shift, double scale,
                   bool roll_first) {
  const Launch launch(qkv);
  const Arguments a(qkv, table, logit_scale, pad_value, window, shift, scale, roll_first);
  const int64_t row = a.heads * a.head_dim;
  check_map("grad", grad, qkv, row, qkv.scalar_type());
  check_map("out", out, qkv, row, qkv.scalar_type());
  check_map("lse", lse, qkv, a.heads, ScalarType::Float);
  STD_TORCH_CHECK(lse.is_contiguous(), kOp, ": lse must be contiguous");
  const auto like = [&](const std::optional<Tensor>& t) {
    return t ? torch::stable::new_zeros(*t, t->sizes()) : torch::stable::new_empty(qkv, {0});
  };
  Gradients gradients{torch::stable::new_empty(qkv, qkv.sizes()), like(table), like(logit_scale),
                      like(pad_value)};
  auto& [dqkv, dtable, dlogit_scale, dpad_value] = gradients;
  if (a.empty()) return gradients;

  const Tensor grad_rows = with_one_token_axis(grad), out_rows = with_one_token_axis(out);
  Tensor delta = torch::stable::empty_like(lse);
  WindowBackward p{
      {part_of(a.qkv, 0), part_of(a.qkv, 1), part_of(a.qkv, 2), by_head(out_rows, a.head_dim),
       by_head(grad_rows, a.head_dim), part_of(dqkv, 0), part_of(dqkv, 1), part_of(dqkv, 2),
       floats(std::as_const(lse)), nullptr, floats(delta), a.tokens() * a.heads, 1, 0, 0, 0,
       int(a.head_dim), false, a.scale},
      a.map,
      a.term};
  const WindowPlan plan = plan_window(p, a.element);
  const auto sums = [&](int64_t count) {
    return torch::stable::new_empty(qkv, {count}, ScalarType::Float);
  };
  const auto add_up = [&](Tensor& from, Tensor& to, int64_t count) {
    check_launch(kOp, launch_partial_sums(floats(from), to.mutable_data_ptr(),
                                          element_of(kOp, "a gradient", to), plan.copies, count,
                                          launch.stream()));
  };
  Tensor of_gains = sums(logit_scale ? plan.copies * a.heads : 0);
  Tensor of_pads = sums(pad_value && a.map.ragged ? plan.copies * 2 * row : 0);
  if (logit_scale) p.term.dlogit_scale = floats(of_gains);
  if (of_pads.numel() > 0) p.map.dpads = floats(of_pads);
  check_launch(kOp, window_backward(p, a.element, launch.stream()));
  if (logit_scale) add_up(of_gains, dlogit_scale, a.heads);
  if (of_pads.numel() > 0) {
    // Pads have no query, and so no gradient of it. [heads, 2, D] to [2, heads, D].
    Tensor both = torch::stable::new_empty(qkv, {a.heads, 2, a.head_dim});
    add_up(of_pads, both, 2 * row);
    Tensor to = torch::stable::narrow(dpad_value, 0, 1, 2);
    torch::stable::copy_(to, torch::stable::transpose(both, 0, 1));
  }
  if (table) {
    const int64_t places = a.map.places();
    Tensor scores = sums(plan.scores.copies * a.heads * places * places);
    check_launch(kOp,
                 window_score_gradient(p, plan.scores, floats(scores), a.element, launch.stream()));
    check_launch(
        kOp, launch_window_dtable({floats(scores), floats(dtable), plan.scores.copies, a.map.heads,
                                   a.map.window_height, a.map.window_width.value},
                                  launch.stream()));
  }
  return gradients;
}

}  // namespace
}  // namespace vitkit::attention

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("window_attention_fwd", TORCH_BOX(&vitkit::attention::forward));
  m.impl("window_attention_bwd", TORCH_BOX(&vitkit::attention::backward));
}
