// window_attention forward: one head of a window at a time, while the rows of the next are fetched.
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
        workspace_(scratch, p.in.head_dim, p.in.grid.places(), 1),
        arena_{scratch + workspace_.bytes},
        windows_{Window(arena_, p.in), Window(arena_, p.in)} {
    if (p.in.logit_scale) cosine_ = CosineFactors(arena_, p.in.grid.places());
    bytes = arena_.next - scratch;
  }

  void run(int64_t begin, int64_t end) {
    const int64_t heads = p_.in.heads;
    window_of(begin).move_to(begin / heads);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t next = item + 1 < end ? item + 1 : item;
      if (next / heads != item / heads) window_of(next).move_to(next / heads);
      WindowAhead<T> ahead(p_.in, window_of(next), next % heads);
      attend(window_of(item), item % heads, &ahead);
    }
  }

  int64_t bytes;

 private:
  using T = typename Compute::Element;

  Window& window_of(int64_t item) { return windows_[item / p_.in.heads % 2]; }

  void attend(const Window& window, int64_t h, WindowAhead<T>* ahead) const {
    Head<WindowMap<T>, WindowTerm> head;
    head.map = window_map<T>(p_.in, window, h, p_.out, p_.lse);
    head.map.ahead = ahead;
    head.term = {&window, p_.in.bias + h * p_.in.bias_stride, cosine_};
    if (p_.in.logit_scale) cosine_.set(head.map, p_.in.logit_scale[h], p_.in.head_dim);
    const Tiling t = tiling<Compute>(window.queries, window.places());
    Forward<Compute, WindowMap<T>, WindowTerm>(&head, 1, p_.in.scale, workspace_).run(0, t.blocks);
  }

  const WindowForward& p_;
  Workspace<Compute> workspace_;
  Arena arena_;
  Window windows_[2];  // the present one and the next
  CosineFactors cosine_;
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
