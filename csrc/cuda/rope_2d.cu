// rope_2d on CUDA: checks, allocations, the launch.
#include "rope_2d.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "launch.h"
#include "rows.h"

namespace vitkit::rope {
namespace {

constexpr const char* kOp = "rope_2d";
using Optional = std::optional<Tensor>;

// The heads of x, and memory for them turned. Without elements there are none.
Heads heads_of(const char* arg, const Tensor& x, Tensor& y) {
  constexpr int64_t kMost = int64_t(1) << 30;
  STD_TORCH_CHECK(x.size(2) * x.size(3) <= kMost, kOp, ": ", arg, " must have H * D up to ", kMost);
  if (x.numel() == 0) return {};
  check_last_dim_dense(kOp, arg, x);
  const auto stride = [&](int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d); };
  return {x.const_data_ptr(), y.mutable_data_ptr(), stride(0), stride(1),
          stride(2),          int(x.size(2)),       0,         Tiling{}};
}

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const Optional& k, const Tensor& cos,
                                  const Tensor& sin, bool interleaved, bool inverse) {
  check_floating(kOp, "q", q);
  check_rank(kOp, "q", q, 4);
  STD_TORCH_CHECK(q.size(3) % 2 == 0, kOp, ": q must have an even head dim, got ", q.size(3));
  if (k) {
    check_rank(kOp, "k", *k, 4);
    STD_TORCH_CHECK(k->scalar_type() == q.scalar_type(), kOp, ": k must have the dtype of q");
    STD_TORCH_CHECK(k->get_device_index() == q.get_device_index(), kOp,
                    ": k must be on the device of q");
    for (const int64_t d : {0, 1, 3}) check_size(kOp, "k", *k, d, q.size(d));
  }
  check_size(kOp, "sin", sin, 1, cos.size(1));
  Params p{};
  p.cos = angle_table<Table>(kOp, "cos", cos, q);
  p.sin = angle_table<Table>(kOp, "sin", sin, q);
  STD_TORCH_CHECK(!k || k->size(2) == q.size(2) || (cos.size(2) == 1 && sin.size(2) == 1), kOp,
                  ": k must have the heads of q where the tables have heads");
  Tensor turned_q = torch::stable::new_empty(q, q.sizes());
  Tensor turned_k = k ? torch::stable::new_empty(*k, k->sizes()) : torch::stable::new_empty(q, {0});
  p.q = heads_of("q", q, turned_q);
  if (k) p.k = heads_of("k", *k, turned_k);
  if (p.q.heads == 0 && p.k.heads == 0) return {turned_q, turned_k};
  p.batch = q.size(0);
  p.tokens = q.size(1);
  p.prefix = p.tokens - cos.size(1);
  p.head_dim = int(q.size(3));
  p.inverse = inverse;
  const Launch launch(q);
  check_launch(kOp, rope_2d(p, element_of(kOp, "q", q), interleaved, launch.stream()));
  return {turned_q, turned_k};
}

std::tuple<Tensor, Tensor> forward(Tensor q, Optional k, Tensor cos, Tensor sin, bool interleaved) {
  return rotate(q, k, cos, sin, interleaved, false);
}

std::tuple<Tensor, Tensor> backward(Tensor grad_q, Optional grad_k, Tensor cos, Tensor sin,
                                    bool interleaved) {
  return rotate(grad_q, grad_k, cos, sin, interleaved, true);
}

}  // namespace
}  // namespace vitkit::rope

STABLE_TORCH_LIBRARY_IMPL(vitkit, CUDA, m) {
  m.impl("rope_2d_fwd", TORCH_BOX(&vitkit::rope::forward));
  m.impl("rope_2d_bwd", TORCH_BOX(&vitkit::rope::backward));
}
