// dilated_attention forward: every branch on its own, then their mixture token by token.
#include "dilated_attention.h"

#include "attention/dilated_map.h"
#include "attention/forward_amx.h"
#include "attention/forward_float32.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

// Where the results of a head in flight begin; first_head is not 0 only where the heads of one
// batch element follow those of another at the same distance.
template <typename T>
T* result_row(const DilatedForward& p, int64_t batch, int64_t head, int64_t row) {
  return row_pointer<T>(p.rows, batch, head - p.first_head, row);
}

float* result_lse(const DilatedForward& p, int64_t batch, int64_t head) {
  return p.row_lse + (batch * p.in.heads + head - p.first_head) * p.row_count;
}

template <typename Compute>
struct Run {
  using T = typename Compute::Element;
  using Map = DilatedMap<T>;

  static int64_t blocks(int64_t nq, int64_t nk) { return tiling<Compute>(nq, nk).blocks; }

  static Workspace<Compute> workspace(const DilatedForward& p, const DilatedBranch& b,
                                      void* scratch) {
    return {static_cast<char*>(scratch), p.in.head_dim, b.slots, 1};
  }

  static int64_t scratch_bytes(const DilatedForward& p) {
    int64_t most = p.branch_count * int64_t(sizeof(Place));
    for (int64_t b = 0; b < p.branch_count; ++b) {
      const int64_t bytes = workspace(p, p.branches[b], nullptr).bytes;
      most = bytes > most ? bytes : most;
    }
    return most;
  }

  static void attend(const DilatedForward& p, const DilatedUnit& unit, void* scratch) {
    const DilatedBranch& b = p.branches[unit.branch];
    const Workspace<Compute> space = workspace(p, b, scratch);
    for (int64_t i = unit.segment; i < unit.segment + unit.segments; ++i) {
      const DilatedSegment s = dilated_segment(b, p.in.nq, i, unit.head);
      Head<Map, NoTerm> head;
      Map& map = head.map;
      set_tokens<T>(p.in, b, s, unit.batch, unit.head, &map);
      map.out = result_row<T>(p, unit.batch, unit.head, s.row);
      map.out_stride = p.rows.token_stride;
      map.lse_row = result_lse(p, unit.batch, unit.head) + s.row;
      const int64_t count = blocks(s.nq, s.nk), begin = count * unit.part / unit.parts,
                    end = count * (unit.part + 1) / unit.parts;
      if (begin < end) Forward<Compute, Map, NoTerm>(&head, 1, p.in.scale, space).run(begin, end);
      if (!p.keep_rows || unit.part > 0) continue;
      const int64_t rows = smaller(b.slots, b.first_row + b.rows - s.row);
      for (int64_t r = s.nq; r < rows; ++r)
        std::memset(map.out_row(r), 0, p.in.head_dim * sizeof(T));
    }
  }

  // Of a token: its row in a branch, and the heads that keep it there.
  struct Place {
    int64_t row, head, end;
  };

  static void mix(const DilatedForward& p, int64_t batch, int64_t head, int64_t heads,
                  int64_t begin, int64_t end, void* scratch) {
    Place* places = static_cast<Place*>(scratch);
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t i = 0; i < p.branch_count; ++i) {
        const DilatedBranch& b = p.branches[i];
        const int64_t segment = token / b.pitch, place = token - segment * b.pitch;
        const int64_t slot = place / b.ratio, phase = place - slot * b.ratio;
        places[i] = {b.first_row + segment * b.slots + slot, phase * b.heads_per_phase,
                     (phase + 1) * b.heads_per_phase};
      }
      for (int64_t h = head; h < head + heads; ++h) mix_row(p, batch, h, token, places);
    }
  }

 private:
  static void mix_row(const DilatedForward& p, int64_t batch, int64_t h, int64_t token,
                      const Place* places) {
    const auto kept = [&](int64_t i) { return places[i].head <= h && h < places[i].end; };
    const float* lse = result_lse(p, batch, h);
    float top = -INFINITY;
    for (int64_t i = 0; i < p.branch_count; ++i)
      if (kept(i) && lse[places[i].row] > top) top = lse[places[i].row];
    const float shift = top == -INFINITY ? 0.f : top;
    alignas(64) float sum[kMaxHeadDim] = {};
    float total = 0.f;
    for (int64_t i = 0; i < p.branch_count; ++i) {
      if (!kept(i)) continue;
      const float weight = __builtin_expf(lse[places[i].row] - shift);
      const T* row = result_row<const T>(p, batch, h, places[i].row);
      for (int64_t d = 0; d < p.in.head_dim; d += kLanes) {
        const int n = int(smaller(kLanes, p.in.head_dim - d));
        store(sum + d, fma(load_partial(row + d, n), splat(weight), load(sum + d)));
      }
      total += weight;
    }
    write_row(sum, p.in.head_dim, total == 0.f ? 0.f : 1.f / total,
              row_pointer<T>(p.out, batch, h, token));
    p.lse[(batch * p.in.heads + h) * p.in.nq + token] = shift + __builtin_logf(total);
  }
};

// f(Run<Compute>()) with the arithmetic for a type.
template <typename F>
auto dispatch(ElementType type, const F& f) {
  switch (type) {
    case ElementType::f32:
      return f(Run<Float32Compute<float>>());
    case ElementType::bf16:
#if defined(VITKIT_AMX)
      return f(Run<AmxCompute>());
#else
      return f(Run<Float32Compute<bf16>>());
#endif
    case ElementType::f16:
      return f(Run<Float32Compute<f16>>());
    case ElementType::boolean:
      break;
  }
  __builtin_trap();
}

int64_t blocks(const DilatedForward& p, int64_t nq, int64_t nk) {
  return dispatch(p.in.type, [&](auto run) { return run.blocks(nq, nk); });
}

int64_t scratch_bytes(const DilatedForward& p) {
  return dispatch(p.in.type, [&](auto run) { return run.scratch_bytes(p); });
}

void attend(const DilatedForward& p, const DilatedUnit& unit, void* scratch) {
  const FlushDenormals flush;
#if defined(VITKIT_AMX)
  const TileUnit tiles;
#endif
  dispatch(p.in.type, [&](auto run) { run.attend(p, unit, scratch); });
}

void mix(const DilatedForward& p, int64_t batch, int64_t head, int64_t heads, int64_t begin,
         int64_t end, void* scratch) {
  dispatch(p.in.type, [&](auto run) { run.mix(p, batch, head, heads, begin, end, scratch); });
}

}  // namespace

const DilatedForwardKernels& dilated_forward_kernels() {
  static constexpr DilatedForwardKernels table{blocks, scratch_bytes, attend, mix};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
