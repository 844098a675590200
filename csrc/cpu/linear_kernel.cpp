// linear for one instruction set: a group of columns of the weight is packed once and stays in the
// second-level cache; a tile of sums gets its bias and activation on the way to memory.
#include "linear.h"

#include "attention/arena.h"
#include "attention/pack.h"
#include "norm/gate.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

// Rows that meet a panel while it is in the first-level cache.
constexpr int64_t kBlockRows = 48 / kTileRows * kTileRows;

struct Scratch {
  float *panels, *rows;
  size_t bytes;

  Scratch(const LinearForward& p, void* base) {
    Arena arena{static_cast<char*>(base)};
    panels = arena.take<float>(p.group_panels * kPanel * p.depth);
    // float32 rows are read where they are, but for the last tile.
    const int64_t count = p.type == ElementType::f32 ? kTileRows : kBlockRows;
    rows = arena.take<float>(round_rows(count) * row_stride_of(p.depth));
    bytes = size_t(arena.next - static_cast<char*>(base));
  }
};

// Rows [first, first + columns) of the weight become the columns of panels. Columns up to a whole
// vector repeat the last one: their sums are not stored.
template <typename T>
void pack_weight(const LinearForward& p, int64_t first, int64_t columns, float* panels) {
  const T* weight = reinterpret_cast<const T*>(p.weight);
  for (int64_t j = 0; j < round_up(columns, kLanes < 8 ? 8 : kLanes); j += 8) {
    const T* from[8];
    for (int r = 0; r < 8; ++r)
      from[r] = weight + (first + smaller(j + r, columns - 1)) * p.weight_stride;
    pack_eight_columns(from, p.depth, panels + j / kPanel * kPanel * p.depth + j % kPanel);
  }
}

template <typename T, LinearActivation kActivation, int n>
VITKIT_INLINE void activate(f32v (&z)[n]) {
  if constexpr (kActivation != LinearActivation::none) {
    constexpr Activation kGate =
        kActivation == LinearActivation::gelu ? Activation::gelu : Activation::gelu_tanh;
    f32v w[n];
    gate_weights<T, kGate>(z, w);
    for (int i = 0; i < n; ++i) z[i] *= w[i];
  }
}

// Two rows at a time: vectors enough for the activation. A tile has an even number of rows.
template <typename T, LinearActivation kActivation, int kVecs>
VITKIT_INLINE void finish_tile(const LinearForward& p, const float* sums, int64_t row, int64_t rows,
                               int64_t column) {
  f32v bias[kVecs] = {};
  for (int v = 0; p.bias && v < kVecs; ++v) bias[v] = load(p.bias + column + v * kLanes);
  const int64_t columns = p.columns - column;
  for (int64_t r = 0; r < rows; r += 2) {
    f32v z[2 * kVecs];
    for (int i = 0; i < 2; ++i)
      for (int v = 0; v < kVecs; ++v)
        z[i * kVecs + v] = load(sums + (r + i) * kPanel + v * kLanes) + bias[v];
    activate<T, kActivation>(z);
    for (int i = 0; i < 2 && r + i < rows; ++i) {
      T* y = reinterpret_cast<T*>(p.y) + (row + r + i) * p.columns + column;
      for (int v = 0; v < kVecs; ++v)
        store_partial(y + v * kLanes, z[i * kVecs + v], int(smaller(columns - v * kLanes, kLanes)));
    }
  }
}

template <typename T, LinearActivation kActivation>
void multiply_block(const LinearForward& p, const Scratch& scratch, int64_t row, int64_t rows,
                    int64_t column, int64_t columns) {
  const T* x = reinterpret_cast<const T*>(p.x);
  const auto at = [&](int64_t r) { return x + r * p.x_stride; };
  const int64_t ld = row_stride_of(p.depth), last = (rows - 1) / kTileRows * kTileRows;
  // An odd row has a neighbour that is read with it, which the last one lacks.
  const bool lone = row + rows == p.rows && rows % 2 == 1;
  if constexpr (!std::is_same_v<T, float>)
    pack_rows<T>(at, row, rows, p.depth, 1.f, scratch.rows, ld);
  else if (lone)
    pack_rows<T>(at, row + last, rows - last, p.depth, 1.f, scratch.rows, ld);
  for (int64_t panel = 0; panel < num_panels(columns); ++panel) {
    const float* b = scratch.panels + panel * kPanel * p.depth;
    const int64_t to = column + panel * kPanel;
    const int vecs = panel_vecs(columns, panel);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const float* a = scratch.rows + r * ld;
      int64_t lda = ld;
      if constexpr (std::is_same_v<T, float>) {
        if (lone && r == last) {
          a = scratch.rows;
        } else {
          a = at(row + r);
          lda = p.x_stride;
        }
      }
      alignas(64) float sums[kTileRows * kPanel];
      const int64_t tile = smaller(rows - r, kTileRows);
      gemm_rows<false, Epilogue::overwrite>(tile, vecs, p.depth, a, lda, b, sums, kPanel);
      if (vecs == 1)
        finish_tile<T, kActivation, 1>(p, sums, row + r, tile, to);
      else
        finish_tile<T, kActivation, 2>(p, sums, row + r, tile, to);
    }
  }
}

template <typename T, LinearActivation kActivation>
void forward(const LinearForward& p, int64_t begin, int64_t end, const Scratch& scratch) {
  const int64_t ranges = p.ranges(), group_columns = p.group_panels * kPanel;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t column = item / ranges * group_columns, first = item % ranges * p.range_rows;
    const int64_t columns = smaller(group_columns, p.columns - column);
    const int64_t last = smaller(first + p.range_rows, p.rows);
    pack_weight<T>(p, column, columns, scratch.panels);
    for (int64_t row = first; row < last; row += kBlockRows)
      multiply_block<T, kActivation>(p, scratch, row, smaller(kBlockRows, last - row), column,
                                     columns);
  }
}

template <typename T>
void with_activation(const LinearForward& p, int64_t begin, int64_t end, const Scratch& scratch) {
  switch (p.activation) {
    case LinearActivation::none:
      return forward<T, LinearActivation::none>(p, begin, end, scratch);
    case LinearActivation::gelu:
      return forward<T, LinearActivation::gelu>(p, begin, end, scratch);
    case LinearActivation::gelu_tanh:
      return forward<T, LinearActivation::gelu_tanh>(p, begin, end, scratch);
  }
}

}  // namespace

const LinearKernels& linear_kernels() {
  static constexpr LinearKernels kernels{
      kPanel,
      kBlockRows,
      [](const LinearForward& p) { return Scratch(p, nullptr).bytes; },
      [](const LinearForward& p, int64_t begin, int64_t end, void* base) {
        const Scratch scratch(p, base);
        switch (p.type) {
          case ElementType::f32:
            return with_activation<float>(p, begin, end, scratch);
          case ElementType::bf16:
            return with_activation<bf16>(p, begin, end, scratch);
          case ElementType::f16:
            return with_activation<f16>(p, begin, end, scratch);
          case ElementType::boolean:
            return;  // not an element type of this op: the host refuses it
        }
      },
  };
  return kernels;
}

}  // namespace vitkit::cpu::VITKIT_ISA
