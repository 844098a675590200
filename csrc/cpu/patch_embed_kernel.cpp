// patch_embed forward: a block of patches is gathered from the image, multiplied with all weights
// while it is in cache, and leaves as finished tokens. The image is read once and never copied.
#include "patch_embed.h"

#include "amx_gemm.h"
#include "patch/project.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

// f(first token, number of tokens) for blocks [begin, end).
template <typename F>
void each_block(const PatchForward& forward, int64_t begin, int64_t end, const F& f) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * forward.block_rows;
    f(first, smaller(forward.block_rows, forward.in.tokens() - first));
  }
}

// ---- float32 ----

struct FloatScratch {
  float *a, *z;
  size_t bytes;

  FloatScratch(const PatchForward& p, void* base) {
    Arena arena{static_cast<char*>(base)};
    const int64_t rows = round_rows(p.block_rows);
    a = arena.take<float>(rows * row_stride_of(p.in.depth));
    z = arena.take<float>(rows * row_stride_of(num_panels(p.in.embed) * kPanel));
    bytes = size_t(arena.next - static_cast<char*>(base));
  }
};

template <typename Pixel, typename T>
void forward_float32(const PatchForward& forward, int64_t begin, int64_t end, void* base) {
  const PatchEmbed& p = forward.in;
  const FloatScratch scratch(forward, base);
  const int64_t a_stride = row_stride_of(p.depth);
  const int64_t z_stride = row_stride_of(num_panels(p.embed) * kPanel);
  each_block(forward, begin, end, [&](int64_t first, int64_t rows) {
    pack_patches<Pixel>(p, first, rows, scratch.a, a_stride);
    multiply_panels(scratch.a, a_stride, static_cast<const float*>(forward.weights), p.depth,
                    scratch.z, z_stride, rows, p.embed);
    finish_block<T>(forward, first, rows, z_stride,
                    [&](int64_t r) { return scratch.z + r * z_stride; });
  });
}

// ---- bfloat16 on AMX tiles ----

#if defined(VITKIT_AMX)

VITKIT_INLINE int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Tile (s, j): pairs of elements 32 s ... of a patch as rows, columns 16 j ... of the projection.
void pack_weight_tiles(const PatchEmbed& p, void* weights, float* shift, int64_t begin,
                       int64_t end) {
  const int64_t steps = tiles(p.depth, kTileK);
  for (int64_t j = begin; j < end; ++j) {
    f32v sums[kTile] = {};
    for (int64_t s = 0; s < steps; ++s) {
      f32v v[kTile];
      for (int r = 0; r < kTile; ++r) {
        alignas(64) bf16 row[kTileK] = {};
        if (j * kTile + r < p.embed)
          weight_row<bf16>(p, j * kTile + r, s * kTileK, smaller(kTileK, p.depth - s * kTileK), row,
                           &sums[r]);
        std::memcpy(&v[r], row, sizeof(row));
      }
      transpose16(v);
      std::memcpy(static_cast<bf16*>(weights) + (j * steps + s) * kTileSize, v, sizeof(v));
    }
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t e = j * kTile + r;
      shift[e] = (p.bias && e < p.embed ? p.bias[e] : 0.f) + reduce_add(sums[r]);
    }
  }
}

struct TileScratch {
  bf16 *a, *row;
  float *z, *z_row;
  size_t bytes;

  TileScratch(const PatchForward& p, void* base) {
    Arena arena{static_cast<char*>(base)};
    const int64_t rows = tiles(p.block_rows, kTile);
    const int64_t steps = tiles(p.in.depth, kTileK), columns = tiles(p.in.embed, kTile);
    a = arena.take<bf16>(rows * steps * kTileSize);
    row = arena.take<bf16>(steps * kTileK + kTileK);
    z = arena.take<float>(rows * columns * kTileSums);
    z_row = arena.take<float>(columns * kTile);
    bytes = size_t(arena.next - static_cast<char*>(base));
  }
};

template <typename Pixel>
void forward_tiles(const PatchForward& forward, int64_t begin, int64_t end, void* base) {
  const PatchEmbed& p = forward.in;
  const TileScratch scratch(forward, base);
  const int64_t steps = tiles(p.depth, kTileK), columns = tiles(p.embed, kTile);
  const auto* weights = static_cast<const bf16*>(forward.weights);
  each_block(forward, begin, end, [&](int64_t first, int64_t rows) {
    const int64_t row_tiles = tiles(rows, kTile);
    Places places(p, first);
    for (int64_t r = 0; r < row_tiles * kTile; ++r, places.next()) {
      if (r < rows) pack_lines<Pixel>(p, places.get(), 0, lines_of(p), scratch.row);
      std::memset(scratch.row + p.depth, 0, size_t(steps * kTileK - p.depth) * sizeof(bf16));
      bf16* to = scratch.a + r / kTile * steps * kTileSize + r % kTile * kTileK;
      for (int64_t s = 0; s < steps; ++s)
        std::memcpy(to + s * kTileSize, scratch.row + s * kTileK, kTileRowBytes);
    }
    for (int64_t j = 0; j < columns; j += 2)
      for (int64_t i = 0; i < row_tiles; i += 2)
        tile_product(row_tiles - i, columns - j,
                     {scratch.a + i * steps * kTileSize, steps * kTileSize,
                      weights + j * steps * kTileSize, steps * kTileSize, kTileSize, steps,
                      scratch.z + (i * columns + j) * kTileSums, columns * kTileSums},
                     false);
    finish_block<bf16>(forward, first, rows, 0, [&](int64_t r) {
      const float* from = scratch.z + r / kTile * columns * kTileSums + r % kTile * kTile;
      for (int64_t j = 0; j < columns; ++j)
        store(scratch.z_row + j * kTile, load(from + j * kTileSums));
      return scratch.z_row;
    });
  });
}

bool on_tiles(const PatchEmbed& p) { return p.type == PatchElement::bf16; }

#endif

// ---- the table ----

int64_t weight_panels(const PatchEmbed& p) {
#if defined(VITKIT_AMX)
  if (on_tiles(p)) return tiles(p.embed, kTile);
#endif
  return float32_weight_panels(p);
}

size_t weight_bytes(const PatchEmbed& p) {
#if defined(VITKIT_AMX)
  if (on_tiles(p))
    return size_t(tiles(p.embed, kTile) * tiles(p.depth, kTileK) * kTileSize) * sizeof(bf16);
#endif
  return float32_weight_bytes(p);
}

void pack_weight(const PatchEmbed& p, void* weights, float* shift, int64_t begin, int64_t end) {
#if defined(VITKIT_AMX)
  if (on_tiles(p)) return pack_weight_tiles(p, weights, shift, begin, end);
#endif
  pack_weight_float32(p, weights, shift, begin, end);
}

size_t scratch_bytes(const PatchForward& p) {
#if defined(VITKIT_AMX)
  if (on_tiles(p.in)) return TileScratch(p, nullptr).bytes;
#endif
  return FloatScratch(p, nullptr).bytes;
}

void forward(const PatchForward& p, int64_t begin, int64_t end, void* scratch) {
#if defined(VITKIT_AMX)
  if (on_tiles(p.in)) {
    const TileUnit unit;
    if (p.in.pixels == PatchElement::u8) return forward_tiles<uint8_t>(p, begin, end, scratch);
    return forward_tiles<bf16>(p, begin, end, scratch);
  }
#endif
  with_types(p.in, [&](auto* pixel, auto* element) {
    using Pixel = std::remove_pointer_t<decltype(pixel)>;
    forward_float32<Pixel, std::remove_pointer_t<decltype(element)>>(p, begin, end, scratch);
  });
}

}  // namespace

const PatchKernels& patch_embed_kernels() {
#if defined(VITKIT_AMX)
  constexpr int64_t kStep = kTile * 2;
#else
  constexpr int64_t kStep = kTileRows;
#endif
  static constexpr PatchKernels table{weight_panels, weight_bytes,  pack_weight, kMostRows,
                                      kStep,         scratch_bytes, forward};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
