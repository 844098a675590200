// The gathered operand of patch_embed: where the pixels of a patch lie, and tiles of them in shared
// memory.
//
// Element k of a patch of token m is pixel origin(m) + offset(k): neither images nor patches are
// copied, whatever the strides. Tokens of a packed call (patch_places.cuh) bring strides of their
// own. Neighbours in memory are moved in units, the largest that every line of every patch is a
// multiple of; a unit of 16 bytes goes by an asynchronous copy. Bytes enter as x - centre, which is
// exact in every type.
#pragma once

#include <algorithm>
#include <type_traits>

#include "element.cuh"
#include "mma.cuh"
#include "reduce.cuh"

namespace vitkit::patch_embed {

// Of a packed call: one image of as many patches, the strides of channels and rows are 0.
struct Geometry {
  int64_t image, channel, frame, row, column;  // strides, in elements
  int frames, rows, columns;                   // of an image
  int channels, patch_frames, patch_rows, patch_columns;
  int grid_rows, grid_columns;
  int patches;       // of an image
  int tokens;        // patches of all images
  bool pixel_order;  // elements of a patch with channels innermost, as the images have them

  __host__ __device__ int depth() const {
    return channels * patch_frames * patch_rows * patch_columns;
  }
};

// Where element k of a patch stands, whatever the order.
struct Place {
  int channel, frame, row, column;

  __device__ __forceinline__ Place(const Geometry& g, int k) {
    const int of_plane = g.patch_frames * g.patch_rows * g.patch_columns;
    channel = g.pixel_order ? k % g.channels : k / of_plane;
    k = g.pixel_order ? k / g.channels : k % of_plane;
    column = k % g.patch_columns;
    row = k / g.patch_columns % g.patch_rows;
    frame = k / g.patch_columns / g.patch_rows;
  }
  // k in the order of a weight's elements.
  __device__ __forceinline__ int of_weight(const Geometry& g) const {
    return ((channel * g.patch_frames + frame) * g.patch_rows + row) * g.patch_columns + column;
  }
};

// Of the first element of each unit of a tile's columns. No token has the frame of a unit that does
// not exist.
struct Unit {
  int64_t offset;
  uint16_t frame, row, column, channel;
};
constexpr int kNoFrame = 65535;

template <int kColumns>
struct Columns {
  Unit unit[kColumns];
  float centre[kColumns], padding[kColumns];  // of bytes
};

// The pixel where a token's patch begins, strides beside those of the geometry, and how much of the
// patch lies inside the image: nothing of a token that does not exist.
struct alignas(16) Token {
  int64_t origin, channel, row;
  uint16_t frames, rows, columns;
};

constexpr int kTokensOfUnit = 128;

struct Images {
  Geometry g;
  const void* data;
  const float* bytes;   // [2, channels], centre and padding of bytes; null for other pixels
  int unit;             // elements, at most
  const Token* tokens;  // of a packed call, [tokens]; null otherwise
  const int* units;     // of each kTokensOfUnit of them

  __device__ __forceinline__ int64_t offset(const Unit& u, const Token& t) const {
    const int64_t at = t.origin + u.offset;
    return tokens ? at + u.channel * t.channel + u.row * t.row : at;
  }

  // The largest unit for tokens [first, end), by whole warps.
  __device__ __forceinline__ int unit_for(int first, int end) const {
    if (!tokens) return unit;
    int least = unit;
    for (int i = first / kTokensOfUnit + lane_id(); i * kTokensOfUnit < end; i += kWarp)
      least = min(least, units[i]);
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      least = min(least, __shfl_xor_sync(0xffffffffu, least, offset));
    return least;
  }
};

// Columns [first, first + kColumns) of the operand, by the whole block.
template <int kColumns>
__device__ __forceinline__ void fill_columns(Columns<kColumns>& to, const Images& p, int unit,
                                             int first) {
  const Geometry& g = p.g;
  const int depth = g.depth();
  for (int i = int(threadIdx.x); i < kColumns; i += int(blockDim.x)) {
    const bool exists = first + i < depth;
    const Place at(g, exists ? first + i : 0);
    if (p.bytes) {
      to.centre[i] = exists ? p.bytes[at.channel] : 0.f;
      to.padding[i] = exists ? p.bytes[g.channels + at.channel] : 0.f;
    }
    if (i % unit == 0)
      to.unit[i / unit] = {
          at.channel * g.channel + at.frame * g.frame + at.row * g.row + at.column * g.column,
          uint16_t(exists ? at.frame : kNoFrame), uint16_t(at.row), uint16_t(at.column),
          uint16_t(at.channel)};
  }
}

// Tokens [first, first + count), those from `end` on do not exist.
__device__ __forceinline__ void fill_tokens(Token* to, const Images& p, int first, int count,
                                            int end) {
  const Geometry& g = p.g;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const int m = first + i, n = m % g.patches;
    if (m >= end) {
      to[i] = {};
      continue;
    }
    if (p.tokens) {
      to[i] = p.tokens[m];
      continue;
    }
    const int column = n % g.grid_columns * g.patch_columns;
    const int row = n / g.grid_columns % g.grid_rows * g.patch_rows;
    const int frame = n / g.grid_columns / g.grid_rows * g.patch_frames;
    to[i].origin = m / g.patches * g.image + frame * g.frame + row * g.row + column * g.column;
    to[i].frames = uint16_t(min(g.frames - frame, g.patch_frames));
    to[i].rows = uint16_t(min(g.rows - row, g.patch_rows));
    to[i].columns = uint16_t(min(g.columns - column, g.patch_columns));
  }
}

__device__ __forceinline__ bool inside(const Unit& u, const Token& t) {
  return u.frame < t.frames && u.row < t.rows && u.column < t.columns;
}

// f(std::integral_constant<int, unit>) for a unit of at most kMost elements.
template <int kMost, typename F>
__device__ __forceinline__ void with_unit(int unit, F&& f) {
  if (unit == 1) return f(std::integral_constant<int, 1>{});
  if (unit == 2) return f(std::integral_constant<int, 2>{});
  if (kMost <= 4 || unit == 4) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, kMost>{});
}

// A thread's part of a tile of kRows tokens: fetch() starts its loads, store() writes what came to
// shared memory, some work later.
template <typename T, typename Pixel, int kRows, int kColumns, int kThreads>
struct Gather {
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kColumns / kChunk;
  static constexpr int kItems = kRows * kChunks / kThreads;
  static_assert(kItems * kThreads == kRows * kChunks);

  alignas(16) Pixel raw[kItems][kChunk];
  unsigned present = 0;  // a bit for each unit of raw
  const int unit;        // elements

  __device__ __forceinline__ explicit Gather(int unit) : unit(unit) {}

  static __device__ __forceinline__ int row(int i) {
    return int(threadIdx.x) / kChunks + i * (kThreads / kChunks);
  }
  static __device__ __forceinline__ int chunk() { return int(threadIdx.x) % kChunks; }
  __device__ __forceinline__ bool asynchronous() const {
    return std::is_same_v<T, Pixel> && unit == kChunk;
  }

  __device__ __forceinline__ void fetch(const SharedTile<T, kColumns>& tile, const Images& p,
                                        const Token* tokens, const Columns<kColumns>& columns) {
    const Pixel* const pixels = static_cast<const Pixel*>(p.data);
    if (asynchronous()) {
      const Unit u = columns.unit[chunk()];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const Token& t = tokens[row(i)];
        const bool exists = inside(u, t);
        ptx::copy_async(tile.address(row(i), chunk()), exists ? pixels + p.offset(u, t) : pixels,
                        exists);
      }
      return;
    }
    present = 0;
    with_unit<kChunk>(unit, [&](auto constant) {
      constexpr int kUnit = decltype(constant)::value;
      using P = Pack<Pixel, kUnit>;
#pragma unroll
      for (int j = 0; j < kChunk / kUnit; ++j) {
        const Unit u = columns.unit[chunk() * (kChunk / kUnit) + j];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const Token& t = tokens[row(i)];
          if (!inside(u, t)) continue;
          const P v = P::load(pixels + p.offset(u, t));
#pragma unroll
          for (int k = 0; k < kUnit; ++k) raw[i][j * kUnit + k] = v.element[k];
          present |= 1u << (i * kChunk + j);
        }
      }
    });
  }

  __device__ __forceinline__ void store(const SharedTile<T, kColumns>& tile,
                                        const Columns<kColumns>& columns) const {
    if (asynchronous()) return;
    with_unit<kChunk>(unit, [&](auto constant) {
      constexpr int kUnit = decltype(constant)::value;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        Pack<T, kChunk> out;
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const bool exists = present >> (i * kChunk + k / kUnit) & 1;
          if constexpr (std::is_same_v<T, Pixel>) {
            out.element[k] = exists ? raw[i][k] : T(0.f);
          } else {
            const int column = chunk() * kChunk + k;
            out.set(k,
                    exists ? float(raw[i][k]) - columns.centre[column] : columns.padding[column]);
          }
        }
        out.store(tile.chunk(row(i), chunk()));
      }
    });
  }
};

// The largest unit: a divisor of every line, aligned wherever one begins or the image ends.
inline int unit_of(const Geometry& g, const void* data, int bytes, int most) {
  const int64_t per_pixel = g.pixel_order ? g.channels : 1;
  const bool dense = g.column == per_pixel || g.patch_columns == 1;
  const int64_t run = dense ? g.patch_columns * per_pixel : per_pixel;
  const auto fits = [&](int64_t unit) {
    bool fit = run % unit == 0 && reinterpret_cast<uintptr_t>(data) % uintptr_t(unit * bytes) == 0;
    for (const int64_t stride : {g.image, g.frame, g.row, g.pixel_order ? 0 : g.channel})
      fit = fit && stride % unit == 0;
    fit = fit && g.column * g.patch_columns % unit == 0;
    return fit && (g.columns % g.patch_columns == 0 || g.columns * per_pixel % unit == 0);
  };
  int unit = most;
  while (unit > 1 && !fits(unit)) unit /= 2;
  return unit;
}

}  // namespace vitkit::patch_embed
