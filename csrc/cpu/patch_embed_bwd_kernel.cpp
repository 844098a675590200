// patch_embed backward, in float32 for every element type: gradient of the projection (through
// LayerNorm, whose input is computed again), of the images, and of the weight as a product over
// patches gathered once more. Sums over tokens are cut into parts by the shape alone, never by the
// number of threads, and added in order.
#include "patch/project.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

constexpr int64_t kTileColumns = 256;  // of the weight's gradient in one item: elements of a patch
constexpr int64_t kTileEmbed = 384;    // and rows
constexpr int64_t kStripEmbed = 96;    // of them at a time
constexpr int64_t kTokens = 256;       // patches gathered at a time: with a strip, 360 KiB
constexpr int64_t kSumColumns = 64;    // of an item that sums a packed call's tokens

VITKIT_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
VITKIT_INLINE int64_t depth_stride(const PatchEmbed& p) { return num_panels(p.depth) * kPanel; }
VITKIT_INLINE int64_t z_stride(const PatchEmbed& p) {
  return row_stride_of(num_panels(p.embed) * kPanel);
}

template <typename T>
VITKIT_INLINE const T* grad_row(const PatchBackward& b, const Place& at) {
  return reinterpret_cast<const T*>(b.grad) + at.out * b.in.embed;
}

// ---- gradients of the projection and of the images ----

size_t rows_bytes(const PatchEmbed& p) { return size_t(depth_stride(p) * p.embed) * sizeof(float); }

// Panel by panel of a patch's elements, one row for each row of the weight.
void pack_weight_rows(const PatchEmbed& p, float* panels, int64_t begin, int64_t end) {
  with_float_type(p.type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    for (int64_t e = begin; e < end; ++e)
      for (int64_t panel = 0; panel < num_panels(p.depth); ++panel) {
        float* to = panels + (panel * p.embed + e) * kPanel;
        std::memset(to, 0, kPanel * sizeof(float));
        weight_row<T>(p, e, panel * kPanel, smaller(kPanel, p.depth - panel * kPanel), to, nullptr);
      }
  });
}

struct GradientScratch {
  float *a, *z, *dpatch;
  size_t bytes;

  GradientScratch(const PatchBackward& b, void* base) {
    Arena arena{static_cast<char*>(base)};
    const int64_t rows = round_rows(kMostRows);
    a = arena.take<float>(b.in.norm_weight ? rows * row_stride_of(b.in.depth) : 0);
    z = arena.take<float>(rows * z_stride(b.in));
    dpatch = arena.take<float>(b.dimages ? rows * row_stride_of(depth_stride(b.in)) : 0);
    bytes = size_t(arena.next - static_cast<char*>(base));
  }
};

// z becomes the gradient of the projection; adds to the gradients of gain and offset.
template <typename T>
void through_norm(const PatchBackward& b, float* z, const T* grad, float* dgain, float* doffset) {
  const PatchEmbed& p = b.in;
  float mu, rstd;
  complete_rows<1>(p, b.shift, z, 0, &mu, &rstd);
  f32v sum = {}, projected = {};
  each_vector(p.embed, [&](int64_t i, auto n) {
    // Lanes beyond the end: no gradient.
    const f32v g = load_partial(grad + i, n), x = (load_partial(z + i, n) - mu) * rstd;
    store_partial(dgain + i, fma(g, x, load_partial(dgain + i, n)), n);
    store_partial(doffset + i, g + load_partial(doffset + i, n), n);
    const f32v dx = g * load_partial(p.norm_weight + i, n);
    sum += dx;
    projected = fma(dx, x, projected);
    store_partial(z + i, x, n);
  });
  const float mean = reduce_add(sum) / float(p.embed);
  const float along = reduce_add(projected) / float(p.embed);
  each_vector(p.embed, [&](int64_t i, auto n) {
    const f32v dx = load_partial(grad + i, n) * load_partial(p.norm_weight + i, n);
    store_partial(z + i, (dx - mean - load_partial(z + i, n) * along) * rstd, n);
  });
}

template <typename Pixel, typename T>
void gradient_block(const PatchBackward& b, const GradientScratch& s, int64_t first, int64_t rows,
                    float* dgain, float* doffset) {
  const PatchEmbed& p = b.in;
  const int64_t stride = z_stride(p);
  if (p.norm_weight) {
    pack_patches<Pixel>(p, first, rows, s.a, row_stride_of(p.depth));
    multiply_panels(s.a, row_stride_of(p.depth), static_cast<const float*>(b.weights), p.depth, s.z,
                    stride, rows, p.embed);
  }
  Places places(p, first);
  for (int64_t r = 0; r < rows; ++r, places.next()) {
    float* z = s.z + r * stride;
    const T* grad = grad_row<T>(b, places.get());
    if (p.norm_weight) {
      through_norm(b, z, grad, dgain, doffset);
      std::memcpy(b.dz + (first + r) * p.embed, z, size_t(p.embed) * sizeof(float));
    } else {
      each_vector(p.embed,
                  [&](int64_t i, auto n) { store_partial(z + i, load_partial(grad + i, n), n); });
    }
  }
  if constexpr (std::is_same_v<Pixel, T>) {
    if (!b.dimages) return;
    const int64_t patch_stride = row_stride_of(depth_stride(p));
    multiply_panels(s.z, stride, b.panels, p.embed, s.dpatch, patch_stride, rows, p.depth);
    Places to(p, first);
    for (int64_t r = 0; r < rows; ++r, to.next())
      unpack_lines(p, to.get(), s.dpatch + r * patch_stride, reinterpret_cast<Pixel*>(b.dimages));
  }
}

size_t gradient_scratch_bytes(const PatchBackward& b) { return GradientScratch(b, nullptr).bytes; }

void gradient_rows(const PatchBackward& b, int64_t begin, int64_t end, void* base) {
  const PatchEmbed& p = b.in;
  const GradientScratch scratch(b, base);
  with_types(p, [&](auto* pixel, auto* element) {
    using Pixel = std::remove_pointer_t<decltype(pixel)>;
    using T = std::remove_pointer_t<decltype(element)>;
    for (int64_t part = begin; part < end; ++part) {
      float* dgain = b.norm_partial + part * 2 * p.embed;
      if (p.norm_weight) std::memset(dgain, 0, size_t(2 * p.embed) * sizeof(float));
      const int64_t last = p.tokens() * (part + 1) / b.row_parts;
      for (int64_t m = p.tokens() * part / b.row_parts; m < last; m += kMostRows)
        gradient_block<Pixel, T>(b, scratch, m, smaller(kMostRows, last - m), dgain,
                                 dgain + p.embed);
    }
  });
}

// ---- gradient of the weight ----

VITKIT_INLINE int64_t embed_tiles(const PatchEmbed& p) { return divide_up(p.embed, kTileEmbed); }

int64_t weight_tiles(const PatchEmbed& p) {
  return embed_tiles(p) * divide_up(p.depth, kTileColumns);
}

size_t dweight_bytes(const PatchEmbed& p) {
  return size_t(round_rows(p.embed) * depth_stride(p)) * sizeof(float);
}

// One tile of the gradient of the weight over one part of the tokens.
struct WeightTile {
  int64_t part, e, rows, k, columns;

  WeightTile(const PatchEmbed& p, int64_t item) {
    const int64_t tiles = weight_tiles(p), tile = item % tiles;
    part = item / tiles;
    e = tile % embed_tiles(p) * kTileEmbed;
    rows = smaller(kTileEmbed, p.embed - e);
    k = tile / embed_tiles(p) * kTileColumns;
    columns = smaller(kTileColumns, p.depth - k);
  }
};

struct WeightScratch {
  float *panels, *dz, *lines;
  size_t bytes;

  WeightScratch(const PatchBackward& b, void* base) {
    Arena arena{static_cast<char*>(base)};
    panels = arena.take<float>(kTileColumns * kTokens);
    dz = arena.take<float>(kStripEmbed * kTokens);
    lines = arena.take<float>(kTileColumns + 2 * b.in.run + 2 * kPanel);
    bytes = size_t(arena.next - static_cast<char*>(base));
  }
};

// Elements [tile.k, tile.k + tile.columns) of patches, panel by panel.
template <typename Pixel>
void pack_columns(const PatchEmbed& p, const WeightTile& tile, int64_t first, int64_t tokens,
                  const WeightScratch& s) {
  const int64_t from = tile.k / p.run, to = divide_up(tile.k + tile.columns, p.run);
  const float* elements = s.lines + (tile.k - from * p.run);
  Places places(p, first);
  for (int64_t m = 0; m < tokens; ++m, places.next()) {
    pack_lines<Pixel>(p, places.get(), from, to, s.lines);
    for (int64_t i = 0; i < tile.columns; i += kLanes)
      store(s.panels + (i / kPanel * kTokens + m) * kPanel + i % kPanel, load(elements + i));
  }
}

// Rows [e, e + rows) of the projection's gradient, tokens one after the other.
template <typename T>
void pack_gradient(const PatchBackward& b, int64_t e, int64_t rows, int64_t first, int64_t tokens,
                   float* dz, float* dbias) {
  const PatchEmbed& p = b.in;
  Places places(p, first);
  const auto copy = [&](const auto* from, float* to) {
    each_vector(rows, [&](int64_t i, auto n) {
      const f32v v = load_partial(from + i, n);
      store_partial(to + i, v, n);
      if (dbias) store_partial(dbias + i, load_partial(dbias + i, n) + v, n);
    });
  };
  for (int64_t m = 0; m < tokens; ++m, places.next()) {
    if (b.dz)
      copy(b.dz + (first + m) * p.embed + e, dz + m * kStripEmbed);
    else
      copy(grad_row<T>(b, places.get()) + e, dz + m * kStripEmbed);
  }
}

// sums (+)= strip x columns, both packed.
void multiply_strip(const WeightScratch& s, int64_t rows, int64_t columns, int64_t tokens,
                    float* sums, int64_t stride, bool first) {
  for (int64_t panel = 0; panel < num_panels(columns); ++panel)
    for (int64_t e = 0; e < rows; e += kTileRows) {
      const int64_t tile = smaller(kTileRows, rows - e);
      const int vecs = panel_vecs(columns, panel);
      const float* b = s.panels + panel * kTokens * kPanel;
      float* to = sums + e * stride + panel * kPanel;
      if (first)
        gemm_rows<true, Epilogue::overwrite>(tile, vecs, tokens, s.dz + e, kStripEmbed, b, to,
                                             stride);
      else
        gemm_rows<true, Epilogue::accumulate>(tile, vecs, tokens, s.dz + e, kStripEmbed, b, to,
                                              stride);
    }
}

template <typename Pixel, typename T>
void weight_item(const PatchBackward& b, int64_t item, const WeightScratch& s) {
  const PatchEmbed& p = b.in;
  const WeightTile tile(p, item);
  const int64_t stride = depth_stride(p);
  float* sums = b.dweight + (tile.part * round_rows(p.embed) + tile.e) * stride + tile.k;
  float* dbias = tile.k == 0 ? b.dbias + tile.part * p.embed + tile.e : nullptr;
  if (dbias) std::memset(dbias, 0, size_t(tile.rows) * sizeof(float));
  const int64_t begin = p.tokens() * tile.part / b.parts;
  const int64_t end = p.tokens() * (tile.part + 1) / b.parts;
  for (int64_t m = begin; m < end; m += kTokens) {
    const int64_t tokens = smaller(kTokens, end - m);
    pack_columns<Pixel>(p, tile, m, tokens, s);
    for (int64_t e = 0; e < tile.rows; e += kStripEmbed) {
      const int64_t rows = smaller(kStripEmbed, tile.rows - e);
      pack_gradient<T>(b, tile.e + e, rows, m, tokens, s.dz, dbias ? dbias + e : nullptr);
      multiply_strip(s, rows, tile.columns, tokens, sums + e * stride, stride, m == begin);
    }
  }
}

size_t weight_scratch_bytes(const PatchBackward& b) { return WeightScratch(b, nullptr).bytes; }

void weight_gradient(const PatchBackward& b, int64_t begin, int64_t end, void* base) {
  const WeightScratch scratch(b, base);
  with_types(b.in, [&](auto* pixel, auto* element) {
    using Pixel = std::remove_pointer_t<decltype(pixel)>;
    using T = std::remove_pointer_t<decltype(element)>;
    for (int64_t item = begin; item < end; ++item) weight_item<Pixel, T>(b, item, scratch);
  });
}

// Pixels entered as x - centre: their true value is (x - centre) * factor * scale + offset.
void finish_weight(const PatchBackward& b, int64_t begin, int64_t end) {
  const PatchEmbed& p = b.in;
  const int64_t stride = depth_stride(p), part = round_rows(p.embed) * stride;
  with_float_type(p.type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    for (int64_t e = begin; e < end; ++e) {
      T* to = reinterpret_cast<T*>(b.dweight_out) + e * p.depth;
      each_vector(p.depth, [&](int64_t k, auto n) {
        const float* from = b.dweight + e * stride + k;
        f32v v = load_partial(from, n);
        for (int64_t i = 1; i < b.parts; ++i) v += load_partial(from + i * part, n);
        if (p.factor)
          v = fma(v, load_partial(p.factor + k, n) * p.scale,
                  load_partial(p.offset + k, n) * b.dbias_sum[e]);
        if (!p.order) return store_partial(to + k, v, n);
        for (int j = 0; j < n; ++j) from_float(v[j], to + p.order[k + j]);
      });
    }
  });
}

// ---- sums over images ----

template <typename T>
void sum_images(const PatchBackward& b, int64_t row) {
  const PatchEmbed& p = b.in;
  float* to = b.drows + row * p.embed;
  std::memset(to, 0, size_t(p.embed) * sizeof(float));
  for (int64_t image = 0; image < p.batch; ++image) {
    const T* grad = reinterpret_cast<const T*>(b.grad) + (image * p.out_rows() + row) * p.embed;
    each_vector(p.embed, [&](int64_t i, auto n) {
      store_partial(to + i, load_partial(to + i, n) + load_partial(grad + i, n), n);
    });
  }
}

// Columns of every token of a packed call, each to its row of the position embedding, which the
// host has set to zero.
template <typename T>
void sum_positions(const PatchBackward& b, int64_t item) {
  const PatchEmbed& p = b.in;
  const int64_t first = item * kSumColumns, columns = smaller(kSumColumns, p.embed - first);
  for (int64_t m = 0; m < p.tokens(); ++m) {
    float* to = b.drows + p.places[m * kPlaceColumns + kPositionRow] * p.embed + first;
    const T* grad = reinterpret_cast<const T*>(b.grad) + m * p.embed + first;
    each_vector(columns, [&](int64_t i, auto n) {
      store_partial(to + i, load_partial(to + i, n) + load_partial(grad + i, n), n);
    });
  }
}

void sum_rows(const PatchBackward& b, int64_t begin, int64_t end) {
  with_float_type(b.in.type, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    for (int64_t item = begin; item < end; ++item)
      b.in.places ? sum_positions<T>(b, item) : sum_images<T>(b, item);
  });
}

}  // namespace

const PatchBackwardKernels& patch_embed_bwd_kernels() {
  static constexpr PatchBackwardKernels table{float32_weight_panels,
                                              float32_weight_bytes,
                                              pack_weight_float32,
                                              rows_bytes,
                                              pack_weight_rows,
                                              gradient_scratch_bytes,
                                              gradient_rows,
                                              weight_tiles,
                                              dweight_bytes,
                                              weight_scratch_bytes,
                                              weight_gradient,
                                              finish_weight,
                                              sum_rows,
                                              kMostRows,
                                              kSumColumns};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
