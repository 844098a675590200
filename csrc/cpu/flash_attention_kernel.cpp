// flash_attention forward: strided maps, no term or a dense one.
#include "flash_attention.h"

#include "attention/forward.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

// Queries and keys of problem b: first token and count.
struct Extent {
  int64_t q, nq, k, nk;
};

Extent extent(const AttentionInputs& in, int64_t b) {
  if (!in.starts_q) return {0, in.nq, 0, in.nk};
  return {in.starts_q[b], in.starts_q[b + 1] - in.starts_q[b], in.starts_k[b], in.starts_k[b + 1] - in.starts_k[b]};
}

template <typename T>
T* rows(const RowsView& view, int64_t b, int64_t h, int64_t token) {
  return reinterpret_cast<T*>(view.data) + b * view.batch_stride + h * view.head_stride + token * view.token_stride;
}

template <typename T>
StridedMap<T> strided_map(const FlashForward& p, const Extent& e, int64_t b, int64_t h) {
  const AttentionInputs& in = p.in;
  return {rows<const T>(in.q, b, h, e.q), rows<const T>(in.k, b, h, e.k), rows<const T>(in.v, b, h, e.k),
          rows<T>(p.out, b, h, e.q),      p.lse + b * p.lse_batch_stride + h * p.lse_head_stride + e.q,
          in.q.token_stride,              in.k.token_stride,
          in.v.token_stride,              p.out.token_stride,
          e.nq,                           e.nk,
          in.causal};
}

int64_t element_size(ElementType type) { return type == ElementType::f32 ? 4 : (type == ElementType::boolean ? 1 : 2); }

DenseTerm dense_term(const BiasView& bias, int64_t b, int64_t h) {
  const int64_t offset = b * bias.batch_stride + h * bias.head_stride;
  return {bias.data + offset * element_size(bias.type), bias.type, bias.query_stride, bias.key_stride};
}

// Calls f(b, h, extent, first block, last block) for each head that items [begin, end) touch.
template <typename F>
void for_each_head(const FlashForward& p, int64_t begin, int64_t end, const F& f) {
  int64_t b = 0, item = begin;
  while (item < end) {
    int64_t first = 0, blocks;
    if (p.first_item) {
      while (p.first_item[b + 1] <= item) ++b;
      first = p.first_item[b];
      blocks = (p.first_item[b + 1] - first) / p.in.heads;
    } else {
      blocks = Tiling(p.in.nq, p.in.nk).blocks;
      b = item / (blocks * p.in.heads);
      first = b * blocks * p.in.heads;
    }
    const int64_t h = (item - first) / blocks, block = (item - first) % blocks;
    const int64_t stop = block + (end - item) < blocks ? block + (end - item) : blocks;
    f(b, h, extent(p.in, b), block, stop);
    item += stop - block;
  }
}

template <typename T>
void run_typed(const FlashForward& p, int64_t begin, int64_t end, void* scratch) {
  const ForwardWorkspace workspace(static_cast<char*>(scratch), p.in.head_dim, p.max_nk);
  for_each_head(p, begin, end, [&](int64_t b, int64_t h, const Extent& e, int64_t first, int64_t last) {
    const StridedMap<T> map = strided_map<T>(p, e, b, h);
    if (p.in.bias.data) {
      const DenseTerm term = dense_term(p.in.bias, b, h);
      Forward<T, StridedMap<T>, DenseTerm>(map, term, p.in.scale, workspace).run(first, last);
    } else {
      const NoTerm term;
      Forward<T, StridedMap<T>, NoTerm>(map, term, p.in.scale, workspace).run(first, last);
    }
  });
}

int64_t blocks(const AttentionInputs&, int64_t nq, int64_t nk) { return Tiling(nq, nk).blocks; }

int64_t scratch_bytes(const FlashForward& p) { return ForwardWorkspace(nullptr, p.in.head_dim, p.max_nk).bytes; }

void run(const FlashForward& p, int64_t begin, int64_t end, void* scratch) {
  const FlushDenormals flush;
  switch (p.in.type) {
    case ElementType::f32:
      return run_typed<float>(p, begin, end, scratch);
    case ElementType::bf16:
      return run_typed<bf16>(p, begin, end, scratch);
    case ElementType::f16:
      return run_typed<f16>(p, begin, end, scratch);
    case ElementType::boolean:
      break;
  }
  __builtin_trap();
}

}  // namespace

const FlashForwardKernels& flash_forward_kernels() {
  static constexpr FlashForwardKernels table{blocks, scratch_bytes, run};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
