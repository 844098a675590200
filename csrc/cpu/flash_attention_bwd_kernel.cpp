// flash_attention gradient: strided maps, any score term with or without its gradient.
#include "attention/backward_amx.h"
#include "attention/backward_float32.h"
#include "attention/backward_problem.h"
#include "attention/structured_bias.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

// Of row 0 of the problem, in sums [batch, heads, nq, width].
float* sums_of(const FlashBackward& p, const BackwardProblem& at, float* sums, int64_t width) {
  return sums ? sums + (at.batch * p.in.heads + at.head) * p.in.nq * width : nullptr;
}

DecomposedSink decomposed_sink(const FlashBackward& p, const BackwardProblem& at) {
  const DecomposedView& v = p.in.decomposed;
  return {sums_of(p, at, p.dstructured.rel_h, v.height),
          sums_of(p, at, p.dstructured.rel_w, v.width), v.height, v.width};
}

DistanceSink distance_sink(const FlashBackward& p, const BackwardProblem& at,
                           const DistanceTerm& term) {
  return {term, sums_of(p, at, p.dstructured.slopes, 1)};
}

template <typename Compute>
struct Run {
  static BackwardGrid grid(const FlashBackward& p, int64_t nq, int64_t nk) {
    return backward_grid<Compute>(p.in.head_dim, p.fine, nq, nk);
  }

  static int64_t sums_floats(const FlashBackward& p) {
    return Compute::sums_floats(p.in.head_dim, p.max_nq, p.max_nk);
  }

  static int64_t scratch_bytes(const FlashBackward& p) {
    Arena arena{nullptr};
    compute(p, arena);
    return arena.next - static_cast<char*>(nullptr);
  }

  static void cell(const FlashBackward& p, const BackwardProblem& at, int64_t step, int64_t lane,
                   void* scratch) {
    if (p.in.decomposed.rel_h)
      return run(p, at, decomposed_term(p.in.decomposed, at.batch, at.head), decomposed_sink(p, at),
                 step, lane, scratch);
    if (p.in.distance.slopes) {
      const DistanceTerm term = distance_term(p.in.distance, at.batch, at.head);
      return run(p, at, term, distance_sink(p, at, term), step, lane, scratch);
    }
    if (!p.in.bias.data) return run(p, at, NoTerm(), NoSink(), step, lane, scratch);
    const DenseTerm term = dense_term(p.in.bias, at);
    if (!p.dbias.data) return run(p, at, term, NoSink(), step, lane, scratch);
    run(p, at, term, dense_sink(p.dbias, at), step, lane, scratch);
  }

 private:
  // Shorter problems of a call may have longer ranges than the longest one.
  static Compute compute(const FlashBackward& p, Arena& arena) {
    const int64_t all = round_up(p.max_nk, Compute::kKeyStep),
                  most = most_keys<Compute>(p.in.head_dim, p.fine);
    return Compute(arena, p.in.head_dim, all < most ? all : most);
  }

  template <typename Term, typename Sink>
  static void run(const FlashBackward& p, const BackwardProblem& at, const Term& term,
                  const Sink& sink, int64_t step, int64_t lane, void* scratch) {
    using Map = StridedGradMap<typename Compute::Element>;
    const GradExtent e(p.in, at.batch);
    const BackwardGrid g = grid(p, e.nq, e.nk);
    if (step >= g.steps() || lane >= g.lanes()) return;
    const Map map = grad_map<typename Compute::Element>(p, at, e);
    Arena arena{static_cast<char*>(scratch)};
    Compute arithmetic = compute(p, arena);
    arithmetic.attach(at.sums, e.nq, e.nk);
    Backward<Compute, Map, Term, Sink>(map, term, sink, p.in.scale, arithmetic)
        .run(g, Cell(g, step, lane));
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

BackwardGrid grid(const FlashBackward& p, int64_t nq, int64_t nk) {
  return dispatch(p.in.type, [&](auto run) { return run.grid(p, nq, nk); });
}

int64_t sums_floats(const FlashBackward& p) {
  return dispatch(p.in.type, [&](auto run) { return round_up(run.sums_floats(p), 16); });
}

int64_t scratch_bytes(const FlashBackward& p) {
  return dispatch(p.in.type, [&](auto run) { return run.scratch_bytes(p); });
}

void cell(const FlashBackward& p, const BackwardProblem& at, int64_t step, int64_t lane,
          void* scratch) {
  const FlushDenormals flush;
#if defined(VITKIT_AMX)
  const TileUnit unit;
#endif
  dispatch(p.in.type, [&](auto run) { run.cell(p, at, step, lane, scratch); });
}

template <typename B>
void reduce_typed(const float* from, int64_t copies, int64_t copy_stride, int64_t keys,
                  int64_t count, B* to) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0.f;
    for (int64_t c = 0; c < copies; ++c)
      for (int64_t j = 0; j < keys; ++j) sum += from[c * copy_stride + i * keys + j];
    from_float(sum, to + i);
  }
}

void reduce_bias(const float* from, int64_t copies, int64_t copy_stride, int64_t keys,
                 int64_t count, ElementType type, void* to) {
  switch (type) {
    case ElementType::f32:
      return reduce_typed(from, copies, copy_stride, keys, count, static_cast<float*>(to));
    case ElementType::bf16:
      return reduce_typed(from, copies, copy_stride, keys, count, static_cast<bf16*>(to));
    case ElementType::f16:
      return reduce_typed(from, copies, copy_stride, keys, count, static_cast<f16*>(to));
    case ElementType::boolean:
      return;
  }
}

}  // namespace

const FlashBackwardKernels& flash_backward_kernels() {
  static constexpr FlashBackwardKernels table{grid, sums_floats, scratch_bytes, cell, reduce_bias};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
