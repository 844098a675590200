// dilated_attention gradient: one segment of one branch at a time, added to the sums over branches.
// Its probabilities are relative to the log-sum-exp over all branches, its delta to its own result.
#include "attention/backward_amx.h"
#include "attention/backward_float32.h"
#include "attention/dilated_map.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

template <typename Compute>
struct Run {
  using T = typename Compute::Element;
  using Map = DilatedGradMap<T>;

  static BackwardGrid grid(const DilatedBackward& p, const DilatedProblem& at) {
    const DilatedSegment s = segment(p, at);
    return backward_grid<Compute>(p.in.head_dim, at.fine, s.nq, s.nk);
  }

  static int64_t sums_floats(const DilatedBackward& p, int64_t branch) {
    const int64_t slots = p.branches[branch].slots;
    return round_up(Compute::sums_floats(p.in.head_dim, slots, slots), 16);
  }

  static int64_t scratch_bytes(const DilatedBackward& p) {
    int64_t most = 0;
    for (int64_t b = 0; b < p.branch_count; ++b) {
      Arena arena{nullptr};
      compute(p, b, false, arena);
      const int64_t bytes = arena.next - static_cast<char*>(nullptr);
      most = bytes > most ? bytes : most;
    }
    return most;
  }

  static void cell(const DilatedBackward& p, const DilatedProblem& at, int64_t step, int64_t lane,
                   void* scratch) {
    const BackwardGrid g = grid(p, at);
    if (step >= g.steps() || lane >= g.lanes()) return;
    const Map map = grad_map(p, at);
    Arena arena{static_cast<char*>(scratch)};
    Compute arithmetic = compute(p, at.branch, at.fine, arena);
    arithmetic.attach(at.sums, map.nq, map.nk);
    Backward<Compute, Map, NoTerm, NoSink>(map, NoTerm(), NoSink(), p.in.scale, arithmetic)
        .run(g, Cell(g, step, lane));
  }

  static void round(const float* from, void* to, int64_t count) {
    T* out = static_cast<T*>(to);
    each_vector(count, [&](int64_t i, auto n) {
      store_partial(out + i, load_partial(from + i, int(n)), int(n));
    });
  }

 private:
  static DilatedSegment segment(const DilatedBackward& p, const DilatedProblem& at) {
    return dilated_segment(p.branches[at.branch], p.in.nq, at.segment, at.head);
  }

  // Shorter segments may have longer ranges than full ones.
  static Compute compute(const DilatedBackward& p, int64_t branch, bool fine, Arena& arena) {
    const int64_t all = round_up(p.branches[branch].slots, Compute::kKeyStep),
                  most = most_keys<Compute>(p.in.head_dim, fine);
    return Compute(arena, p.in.head_dim, all < most ? all : most);
  }

  static Map grad_map(const DilatedBackward& p, const DilatedProblem& at) {
    const DilatedBranch& b = p.branches[at.branch];
    const DilatedSegment s = segment(p, at);
    const int64_t in_flight = at.head - p.first_head;
    Map map;
    set_tokens<T>(p.in, b, s, at.batch, at.head, &map);
    map.out = row_pointer<T>(p.rows, at.batch, at.head, s.row);
    map.out_stride = p.rows.token_stride;
    map.lse_row = const_cast<float*>(lse_at(p.lse, at, s.out_token));
    map.lse_stride = b.ratio * p.lse.query_stride;
    map.grad = row_pointer<T>(p.grad, at.batch, at.head, s.out_token);
    map.grad_stride = b.ratio * p.grad.token_stride;
    map.grad_dim_stride = p.grad_dim_stride;
    map.head_dim = p.in.head_dim;
    map.grad_lse_row = p.grad_lse.data ? lse_at(p.grad_lse, at, s.out_token) : nullptr;
    map.grad_lse_stride = b.ratio * p.grad_lse.query_stride;
    map.dq = row_pointer<float>(p.dq, at.batch, in_flight, s.token);
    map.dk = row_pointer<float>(p.dk, at.batch, in_flight, s.token);
    map.dv = row_pointer<float>(p.dv, at.batch, in_flight, s.token);
    map.dq_stride = b.ratio * p.dq.token_stride;
    map.dk_stride = b.ratio * p.dk.token_stride;
    map.dv_stride = b.ratio * p.dv.token_stride;
    return map;
  }

  static const float* lse_at(const LseView& view, const DilatedProblem& at, int64_t token) {
    return view.data + at.batch * view.batch_stride + at.head * view.head_stride +
           token * view.query_stride;
  }
};

// f(Run<Compute>()) with the arithmetic for a type.
template <typename F>
auto dispatch(ElementType type, const F& f) {
  switch (type) {
    case ElementType::f32:
      return f(Run<Float32Gradient<float>>());
    case ElementType::bf16:
#if defined(VITKIT_AMX)
      return f(Run<AmxGradient>());
#else
      return f(Run<Float32Gradient<bf16>>());
#endif
    case ElementType::f16:
      return f(Run<Float32Gradient<f16>>());
    case ElementType::boolean:
      break;
  }
  __builtin_trap();
}

BackwardGrid grid(const DilatedBackward& p, const DilatedProblem& at) {
  return dispatch(p.in.type, [&](auto run) { return run.grid(p, at); });
}

int64_t sums_floats(const DilatedBackward& p, int64_t branch) {
  return dispatch(p.in.type, [&](auto run) { return run.sums_floats(p, branch); });
}

int64_t scratch_bytes(const DilatedBackward& p) {
  return dispatch(p.in.type, [&](auto run) { return run.scratch_bytes(p); });
}

void cell(const DilatedBackward& p, const DilatedProblem& at, int64_t step, int64_t lane,
          void* scratch) {
  const FlushDenormals flush;
#if defined(VITKIT_AMX)
  const TileUnit tiles;
#endif
  dispatch(p.in.type, [&](auto run) { run.cell(p, at, step, lane, scratch); });
}

void round(const float* from, ElementType type, void* to, int64_t count) {
  dispatch(type, [&](auto run) { run.round(from, to, count); });
}

}  // namespace

const DilatedBackwardKernels& dilated_backward_kernels() {
  static constexpr DilatedBackwardKernels table{grid, sums_floats, scratch_bytes, cell, round};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
