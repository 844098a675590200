// window_attention forward: the heads of a window together, its places computed once.
#include "attention/forward_amx.h"
#include "attention/forward_float32.h"
#include "attention/window_term.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

template <typename Compute>
class Run {
 public:
  Run(const WindowForward& p, char* scratch)
      : p_(p),
        workspace_(scratch, p.in.head_dim, p.in.grid.places(), p.in.heads),
        arena_{scratch + workspace_.bytes},
        window_(arena_, p.in) {
    for (int64_t i = 0; p.in.logit_scale && i < workspace_.sweep_heads; ++i)
      cosine_[i] = CosineFactors(arena_, p.in.grid.places());
    bytes = arena_.next - scratch;
  }

  void run(int64_t begin, int64_t end) {
    const int64_t heads = p_.in.heads;
    for (int64_t item = begin; item < end;) {
      const int64_t h = item % heads;
      if (item == begin || h == 0) window_.move_to(item / heads);
      const int64_t count = smaller(smaller(heads - h, end - item), workspace_.sweep_heads);
      attend(h, count);
      item += count;
    }
  }

  int64_t bytes;

 private:
  using T = typename Compute::Element;

  void attend(int64_t first, int64_t count) const {
    Head<WindowMap<T>, WindowTerm> heads[kMaxSweepHeads];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t h = first + i;
      heads[i].map = window_map<T>(p_.in, window_, h, p_.out, p_.lse);
      heads[i].term = {&window_, p_.in.bias + h * p_.in.bias_stride, cosine_[i]};
      if (p_.in.logit_scale) cosine_[i].set(heads[i].map, p_.in.logit_scale[h], p_.in.head_dim);
    }
    const Tiling t = tiling<Compute>(window_.queries, window_.places());
    Forward<Compute, WindowMap<T>, WindowTerm>(heads, count, p_.in.scale, workspace_)
        .run(0, t.blocks);
  }

  const WindowForward& p_;
  Workspace<Compute> workspace_;
  Arena arena_;
  Window window_;
  CosineFactors cosine_[kMaxSweepHeads];
};

// f(Compute*) with the arithmetic for a type.
template <typename F>
auto dispatch(ElementType type, const F& f) {
  switch (type) {
    case ElementType::f32:
      return f(static_cast<Float32Compute<float>*>(nullptr));
    case ElementType::bf16:
#if defined(VITKIT_AMX)
      return f(static_cast<AmxCompute*>(nullptr));
#else
      return f(static_cast<Float32Compute<bf16>*>(nullptr));
#endif
    case ElementType::f16:
      return f(static_cast<Float32Compute<f16>*>(nullptr));
    case ElementType::boolean:
      break;
  }
  __builtin_trap();
}

int64_t scratch_bytes(const WindowForward& p) {
  return dispatch(p.in.type, [&](auto* compute) {
    return Run<std::remove_pointer_t<decltype(compute)>>(p, nullptr).bytes;
  });
}

void run(const WindowForward& p, int64_t begin, int64_t end, void* scratch) {
  const FlushDenormals flush;
#if defined(VITKIT_AMX)
  const TileUnit unit;
#endif
  dispatch(p.in.type, [&](auto* compute) {
    Run<std::remove_pointer_t<decltype(compute)>>(p, static_cast<char*>(scratch)).run(begin, end);
  });
}

}  // namespace

const WindowForwardKernels& window_forward_kernels() {
  static constexpr WindowForwardKernels table{scratch_bytes, run};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
