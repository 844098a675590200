// flash_attention gradient: strided maps, no term or a dense one, with or without its gradient.
#include "attention/backward_float32.h"
#include "attention/backward_problem.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

int64_t range_of(int64_t tokens, int64_t limit, int64_t multiple) {
  if (tokens <= 0) return multiple;
  const int64_t ranges = (tokens + limit - 1) / limit;
  return round_up((tokens + ranges - 1) / ranges, multiple);
}

int64_t most_keys(const FlashBackward& p) {
  int64_t keys = kCellBytes / (3 * int64_t(sizeof(float)) * p.in.head_dim);
  keys = keys < kMinCellKeys ? kMinCellKeys : (keys > kMaxCellKeys ? kMaxCellKeys : keys);
  return round_up(p.fine && keys > kFineCellKeys ? kFineCellKeys : keys, kPanel);
}

// Ranges are multiples of the tiles, which are even: only the last one is padded.
BackwardGrid grid(const FlashBackward& p, int64_t nq, int64_t nk) {
  const int64_t keys = most_keys(p);
  BackwardGrid g;
  g.key_range = range_of(nk, keys, kPanel);
  g.query_range = range_of(nq, round_up(kQueriesPerCell * keys, kTileRows), kTileRows);
  g.key_ranges = nk > 0 ? (nk + g.key_range - 1) / g.key_range : 1;
  g.query_ranges = nq > 0 ? (nq + g.query_range - 1) / g.query_range : 1;
  return g;
}

int64_t slot_floats(const FlashBackward& p) {
  return round_up(GradSums(nullptr, p.in.head_dim, p.max_nq, p.max_nk).floats, 16);
}

int64_t scratch_bytes(const FlashBackward& p) {
  const int64_t all = round_up(p.max_nk, kPanel), most = most_keys(p);
  return GradWorkspace<float>(nullptr, p.in.head_dim, all < most ? all : most).bytes;
}

// The cell of a step and lane, and whether it is the first or last one that its rows meet.
struct Cell {
  int64_t query, key;
  bool first_of_query, last_of_query, first_of_key, last_of_key;

  Cell(const BackwardGrid& g, int64_t step, int64_t lane) {
    const int64_t steps = g.steps(), lanes = g.lanes(), across = (lane + step) % steps;
    // Ranges across meet lanes downwards from the first that reaches them, cyclically.
    const bool first_across = lane == (across < lanes ? across : lanes - 1);
    const bool last_across = lane == (across + 1 < lanes ? across + 1 : 0);
    const bool by_key = g.key_ranges <= g.query_ranges;
    key = by_key ? lane : across;
    query = by_key ? across : lane;
    first_of_key = by_key ? step == 0 : first_across;
    last_of_key = by_key ? step == steps - 1 : last_across;
    first_of_query = by_key ? first_across : step == 0;
    last_of_query = by_key ? last_across : step == steps - 1;
  }
};

template <typename T, typename Term, typename Sink>
void run_cell(const FlashBackward& p, const BackwardProblem& at, const GradExtent& e,
              const BackwardGrid& g, const Cell& cell, const Term& term, const Sink& sink,
              void* scratch) {
  const StridedGradMap<T> map = grad_map<T>(p, at, e);
  const GradWorkspace<T> workspace(static_cast<char*>(scratch), p.in.head_dim, g.key_range);
  const GradSums sums(at.slot, p.in.head_dim, e.nq, e.nk);
  const BackwardFloat32<T, StridedGradMap<T>, Term, Sink> core(map, term, sink, p.in.scale,
                                                               workspace, sums);
  const int64_t q0 = cell.query * g.query_range, k0 = cell.key * g.key_range;
  const int64_t nq = e.nq - q0 < g.query_range ? e.nq - q0 : g.query_range;
  const int64_t nk = e.nk - k0 < g.key_range ? e.nk - k0 : g.key_range;
  if (cell.first_of_query) core.clear_queries(q0, nq);
  if (cell.first_of_key) core.clear_keys(k0, nk);
  core.cell(q0, nq, k0, nk);
  if (cell.last_of_query) core.write_queries(q0, nq);
  if (cell.last_of_key) core.write_keys(k0, nk);
}

template <typename T>
void cell_typed(const FlashBackward& p, const BackwardProblem& at, int64_t step, int64_t lane,
                void* scratch) {
  const GradExtent e(p.in, at.batch);
  const BackwardGrid g = grid(p, e.nq, e.nk);
  if (step >= g.steps() || lane >= g.lanes()) return;
  const Cell cell(g, step, lane);
  if (!p.in.bias.data) return run_cell<T>(p, at, e, g, cell, NoTerm(), NoSink(), scratch);
  const DenseTerm term = dense_term(p.in.bias, at);
  if (!p.dbias.data) return run_cell<T>(p, at, e, g, cell, term, NoSink(), scratch);
  run_cell<T>(p, at, e, g, cell, term, dense_sink(p.dbias, at), scratch);
}

void cell(const FlashBackward& p, const BackwardProblem& at, int64_t step, int64_t lane,
          void* scratch) {
  const FlushDenormals flush;
  switch (p.in.type) {
    case ElementType::f32:
      return cell_typed<float>(p, at, step, lane, scratch);
    case ElementType::bf16:
      return cell_typed<bf16>(p, at, step, lane, scratch);
    case ElementType::f16:
      return cell_typed<f16>(p, at, step, lane, scratch);
    case ElementType::boolean:
      break;
  }
  __builtin_trap();
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
  static constexpr FlashBackwardKernels table{grid, slot_floats, scratch_bytes, cell, reduce_bias};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
