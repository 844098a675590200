// flash_attention forward: strided maps, any score term.
#include "flash_attention.h"

#include "attention/forward_amx.h"
#include "attention/forward_float32.h"
#include "attention/structured_bias.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

// Queries and keys of problem b: first token and count.
struct Extent {
  int64_t q, nq, k, nk;
};

Extent extent(const AttentionInputs& in, int64_t b) {
  if (!in.starts_q) return {0, in.nq, 0, in.nk};
  return {in.starts_q[b], in.starts_q[b + 1] - in.starts_q[b], in.starts_k[b],
          in.starts_k[b + 1] - in.starts_k[b]};
}

template <typename T>
StridedMap<T> strided_map(const FlashForward& p, const Extent& e, int64_t b, int64_t h) {
  const AttentionInputs& in = p.in;
  return {row_pointer<const T>(in.q, b, h, e.q),
          row_pointer<const T>(in.k, b, h, e.k),
          row_pointer<const T>(in.v, b, h, e.k),
          row_pointer<T>(p.out, b, h, e.q),
          p.lse + b * p.lse_batch_stride + h * p.lse_head_stride + e.q,
          in.q.token_stride,
          in.k.token_stride,
          in.v.token_stride,
          p.out.token_stride,
          e.nq,
          e.nk,
          in.causal};
}

int64_t element_size(ElementType type) {
  return type == ElementType::f32 ? 4 : (type == ElementType::boolean ? 1 : 2);
}

DenseTerm dense_term(const BiasView& bias, int64_t b, int64_t h) {
  const int64_t offset = b * bias.batch_stride + h * bias.head_stride;
  return {bias.data + offset * element_size(bias.type), bias.type, bias.query_stride,
          bias.key_stride};
}

// Part of one batch element: blocks [begin, end) of heads [h, h + heads); of several heads always
// all blocks.
struct Part {
  int64_t b, h, heads, begin, end;
};

// The part that starts at `item`: up to max_heads whole heads, or what is left of one.
template <typename Compute>
Part part_at(const FlashForward& p, int64_t item, int64_t end, int64_t max_heads) {
  int64_t b = 0, first = 0, blocks;
  if (p.first_item) {
    while (p.first_item[b + 1] <= item) ++b;
    first = p.first_item[b];
    blocks = (p.first_item[b + 1] - first) / p.in.heads;
  } else {
    blocks = tiling<Compute>(p.in.nq, p.in.nk).blocks;
    b = item / (blocks * p.in.heads);
    first = b * blocks * p.in.heads;
  }
  const int64_t h = (item - first) / blocks, block = (item - first) % blocks;
  const int64_t whole = smaller(smaller((end - item) / blocks, p.in.heads - h), max_heads);
  if (block == 0 && whole > 1) return {b, h, whole, 0, blocks};
  return {b, h, 1, block, smaller(block + (end - item), blocks)};
}

DenseTerm make_term(const FlashForward& p, int64_t b, int64_t h, DenseTerm*) {
  return dense_term(p.in.bias, b, h);
}
DecomposedTerm make_term(const FlashForward& p, int64_t b, int64_t h, DecomposedTerm*) {
  return decomposed_term(p.in.decomposed, b, h);
}
DistanceTerm make_term(const FlashForward& p, int64_t b, int64_t h, DistanceTerm*) {
  return distance_term(p.in.distance, b, h);
}
NoTerm make_term(const FlashForward&, int64_t, int64_t, NoTerm*) { return {}; }

template <typename Compute, typename Term>
void run_with(const FlashForward& p, int64_t begin, int64_t end, void* scratch) {
  using T = typename Compute::Element;
  static_assert(Compute::kSingleChunk <= kMostRowKeys && Compute::kChunk <= kMostRowKeys);
  const Workspace<Compute> workspace(static_cast<char*>(scratch), p.in.head_dim, p.max_nk,
                                     p.in.heads);
  for (int64_t item = begin; item < end;) {
    const Part part = part_at<Compute>(p, item, end, workspace.sweep_heads);
    Head<StridedMap<T>, Term> heads[kMaxSweepHeads];
    for (int64_t i = 0; i < part.heads; ++i)
      heads[i] = {strided_map<T>(p, extent(p.in, part.b), part.b, part.h + i),
                  make_term(p, part.b, part.h + i, static_cast<Term*>(nullptr))};
    Forward<Compute, StridedMap<T>, Term>(heads, part.heads, p.in.scale, workspace)
        .run(part.begin, part.end);
    item += part.heads * (part.end - part.begin);
  }
}

template <typename Compute>
struct Run {
  static int64_t blocks(int64_t nq, int64_t nk) { return tiling<Compute>(nq, nk).blocks; }

  static int64_t scratch_bytes(const FlashForward& p) {
    return Workspace<Compute>(nullptr, p.in.head_dim, p.max_nk, p.in.heads).bytes;
  }

  static void run(const FlashForward& p, int64_t begin, int64_t end, void* scratch) {
    if (p.in.bias.data)
      run_with<Compute, DenseTerm>(p, begin, end, scratch);
    else if (p.in.decomposed.rel_h)
      run_with<Compute, DecomposedTerm>(p, begin, end, scratch);
    else if (p.in.distance.slopes)
      run_with<Compute, DistanceTerm>(p, begin, end, scratch);
    else
      run_with<Compute, NoTerm>(p, begin, end, scratch);
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

int64_t blocks(const AttentionInputs& in, int64_t nq, int64_t nk) {
  return dispatch(in.type, [&](auto run) { return run.blocks(nq, nk); });
}

int64_t scratch_bytes(const FlashForward& p) {
  return dispatch(p.in.type, [&](auto run) { return run.scratch_bytes(p); });
}

void run(const FlashForward& p, int64_t begin, int64_t end, void* scratch) {
  const FlushDenormals flush;
#if defined(VITKIT_AMX)
  const TileUnit unit;
#endif
  dispatch(p.in.type, [&](auto run) { run.run(p, begin, end, scratch); });
}

}  // namespace

const FlashForwardKernels& flash_forward_kernels() {
  static constexpr FlashForwardKernels table{blocks, scratch_bytes, run};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
