// The launches of patch_embed in order, and the memory they need between them. Host code without a
// torch header: the emulator's driver calls it, too.
#pragma once

#include <cmath>

#include "patch_embed_bwd.cuh"
#include "patch_places.cuh"

namespace vitkit::patch_embed {

struct Call {
  Geometry g;
  int images;
  Element type;  // of weight, output and floating pixels
  bool bytes;    // pixels are
  const void* pixels;
  const void* weight;  // [embed, depth], dense
  int embed;
  RowTensor bias, norm_weight, norm_bias, position, prefix;
  int prefixes;
  bool position_of_prefix;  // the first rows of position are those of the prefix
  float eps;
  const double *mean, *std;  // of bytes, [channels], on the host; null: 0 and 1

  // Of a packed call: one image without a prefix, whose patches lie where [tokens, kPlaceColumns]
  // says; null otherwise.
  const int64_t* places;
  int64_t pixel_count;
  int position_rows;  // 0 without positions

  int chunk() const { return 16 / bytes_of(type); }
  int out_rows() const { return prefixes + g.patches; }
  bool has_norm() const { return norm_weight.data != nullptr; }
  // Whether the weight is copied into the order, the length and the factors that products need.
  bool prepares() const {
    return bytes || g.pixel_order || g.depth() % chunk() != 0 ||
           reinterpret_cast<uintptr_t>(weight) % 16 != 0;
  }
};

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Takes pieces of one allocation; without one, counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}

  // Null where nothing is wanted.
  template <typename T>
  T* take(int64_t count) {
    unsigned char* const at = base_ ? base_ + bytes_ : nullptr;
    bytes_ += rounded_up(count * int64_t(sizeof(T)), 256);
    return count == 0 ? nullptr : reinterpret_cast<T*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  int64_t bytes_ = 0;
};

struct Buffers {
  int stride;  // of a prepared row
  unsigned char* prepared;
  float *tables, *shift, *sums;
  Token* tokens;
  int *units, *positions;
  Slot* by_position;

  Buffers(const Call& c, Workspace& w, bool product, bool sums_wanted, bool positions_wanted)
      : stride(int(rounded_up(c.g.depth(), c.chunk()))),
        prepared(w.take<unsigned char>(
            product && c.prepares() ? int64_t(c.embed) * stride * bytes_of(c.type) : 0)),
        tables(w.take<float>(c.bytes ? 4 * c.g.channels : 0)),
        shift(w.take<float>(product && c.bytes ? c.embed : 0)),
        sums(w.take<float>(sums_wanted ? int64_t(c.g.tokens) * c.embed : 0)),
        tokens(w.take<Token>(c.places ? c.g.tokens : 0)),
        units(w.take<int>(c.places ? (c.g.tokens + kTokensOfUnit - 1) / kTokensOfUnit : 0)),
        positions(w.take<int>(c.places ? c.g.tokens : 0)),
        by_position(w.take<Slot>(c.places && positions_wanted ? c.g.tokens : 0)) {}
};

inline double scale_of(const Call& c) {
  double scale = c.bytes ? 0 : 1;
  for (int i = 0; c.bytes && i < c.g.channels; ++i)
    scale = std::max(scale, 1 / (255 * (c.std ? c.std[i] : 1)));
  return scale;
}

// The centre is an integer, so that x - centre is exact in every type.
inline const char* launch_tables(const Call& c, float* tables, Stream stream) {
  const double scale = scale_of(c);
  const char* error = nullptr;
  for (int first = 0; c.bytes && !error && first < c.g.channels; first += 64) {
    TableParams p{};
    p.tables = tables;
    p.first = first;
    p.channels = c.g.channels;
    for (int i = 0; i < 64 && first + i < c.g.channels; ++i) {
      const double mean = c.mean ? c.mean[first + i] : 0, std = c.std ? c.std[first + i] : 1;
      const double centre = std::clamp(std::nearbyint(255 * mean), 0., 255.);
      p.values[0][i] = float(centre);
      p.values[1][i] = float(255 * mean - centre);
      p.values[2][i] = float(1 / (255 * std) / scale);
      p.values[3][i] = float((centre / 255 - mean) / std);
    }
    error = launch_kernel(&patch_table_kernel, 1, 64, 0, stream, p);
  }
  return error;
}

inline const char* launch_places(const Call& c, const Buffers& b, Stream stream) {
  if (!c.places) return nullptr;
  const PlacesParams p{c.places, c.g,     c.pixel_count, c.position_rows,
                       b.tokens, b.units, b.positions,   b.by_position};
  const unsigned tiles = unsigned(c.g.tokens + kTokensOfUnit - 1) / kTokensOfUnit;
  return launch_kernel(&patch_places_kernel, tiles, kTokensOfUnit, 0, stream, p);
}

// What the products need of bytes, of packed tokens and of the weight.
inline const char* launch_prepare(const Call& c, const Buffers& b, Stream stream) {
  const char* error = launch_tables(c, b.tables, stream);
  if (!error) error = launch_places(c, b, stream);
  if (error || !b.prepared) return error;
  const PrepareParams p{c.g, c.weight, b.prepared, b.stride, c.bias, b.tables, b.shift};
  return with_element(c.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_kernel(&patch_prepare_kernel<T>, unsigned(c.embed), kThreads, 0, stream, p);
  });
}

inline Images images_of(const Call& c, const Buffers& b, const void* data) {
  const int bytes = c.bytes ? 1 : bytes_of(c.type);
  return {c.g, data, b.tables, unit_of(c.g, data, bytes, c.chunk()), b.tokens, b.units};
}

inline Params params_of(const Call& c, const Buffers& b, void* out) {
  Params p{};
  p.images = images_of(c, b, c.pixels);
  p.weight = b.prepared ? b.prepared : c.weight;
  p.weight_stride = b.prepared ? b.stride : c.g.depth();
  p.embed = c.embed;
  p.scale = float(scale_of(c));
  p.shift = c.bytes ? RowTensor{b.shift, Element::f32, 0} : c.bias;
  p.norm_weight = c.norm_weight;
  p.norm_bias = c.norm_bias;
  p.position = c.position;
  p.prefix = c.prefix;
  p.eps = c.eps;
  p.norm = c.has_norm() && c.embed <= kTile;
  p.packs = c.embed % 4 == 0;
  for (const RowTensor& t : {p.shift, p.norm_weight, p.norm_bias, p.position})
    p.packs = p.packs && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  p.prefixes = c.prefixes;
  p.position_first = c.position_of_prefix ? c.prefixes : 0;
  p.positions = b.positions;
  p.out = out;
  return p;
}

template <typename T>
constexpr int kProjectShared =
    kProductBytes + 2 * int(sizeof(Columns<kDepth<T>>)) + kTile * int(sizeof(Token));
template <typename T>
constexpr int kWeightShared =
    kProductBytes + int(sizeof(Columns<kTile>)) + 2 * kDepth<T> * int(sizeof(Token));
constexpr int kImageShared =
    kProductBytes + int(sizeof(Columns<kTile>)) + kTile * int(sizeof(Token));

// f(null T, null pixel).
template <typename F>
const char* with_pixels(const Call& c, F&& f) {
  return with_element(c.type, [&](auto* type) -> const char* {
    return c.bytes ? f(type, static_cast<uint8_t*>(nullptr)) : f(type, type);
  });
}

// Into p.sums, or the output with its prefix.
inline const char* launch_project(const Call& c, const Params& p, Stream stream) {
  const int64_t blocks =
      int64_t(p.token_tiles()) * p.embed_tiles() + (!p.sums && c.prefixes > 0 ? c.images : 0);
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  return with_pixels(c, [&](auto* type, auto* pixel) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Pixel = std::remove_pointer_t<decltype(pixel)>;
    return launch_kernel(&patch_project_kernel<T, Pixel>, unsigned(blocks), kThreads,
                         kProjectShared<T>, stream, p);
  });
}

// ---- forward ----

struct ForwardBuffers : Workspace, Buffers {
  ForwardBuffers(const Call& c, void* base)
      : Workspace(base),
        Buffers(c, static_cast<Workspace&>(*this), true, c.has_norm() && c.embed > kTile, false) {}
};

// out [images, prefixes + patches, embed]; workspace of ForwardBuffers(c, nullptr).bytes().
inline const char* patch_forward(const Call& c, void* out, void* workspace, Stream stream) {
  const ForwardBuffers b(c, workspace);
  const char* error = launch_prepare(c, b, stream);
  if (error) return error;
  Params p = params_of(c, b, out);
  if (!b.sums) return launch_project(c, p, stream);
  p.sums = b.sums;
  error = launch_project(c, p, stream);
  if (error) return error;
  const unsigned blocks = unsigned(rounded_up(c.g.tokens, kThreads / kWarp) / (kThreads / kWarp));
  return with_element(c.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const unsigned prefix = c.prefixes > 0 ? unsigned(c.images) : 0;
    return launch_kernel(&patch_norm_kernel<T>, blocks + prefix, kThreads, 0, stream, p);
  });
}

// ---- backward ----

struct Gradients {
  void* images;  // like the images, of a packed call zeros; null: not wanted
  void* weight;  // [embed, depth]; null: neither it nor bias is wanted
  SmallGradient bias, norm_weight, norm_bias, position, prefix;
};

// Blocks enough for any GPU of today, of at least so many tokens; constants, so that results do not
// depend on which it is.
constexpr int kWeightBlocks = 256, kLeastTokens = 512;

struct BackwardBuffers : Workspace, Buffers {
  int dz_stride, norm_blocks, tokens_of_split, splits;
  unsigned char* dz;  // null: the gradient of the output is read where it lies
  float *norm_partial, *partial, *partial_bias;

  BackwardBuffers(const Call& c, const Gradients& to, const void* grad, void* base)
      : Workspace(base),
        Buffers(c, static_cast<Workspace&>(*this), c.has_norm() || to.images, c.has_norm(),
                to.position.data),
        dz_stride(int(rounded_up(c.embed, c.chunk()))),
        norm_blocks((c.g.tokens + kNormTokens - 1) / kNormTokens) {
    const int64_t tiles =
        rounded_up(c.embed, kTile) / kTile * (rounded_up(c.g.depth(), kTile) / kTile);
    const int64_t most = (c.g.tokens + kLeastTokens - 1) / kLeastTokens;
    const int64_t wanted = std::clamp<int64_t>(kWeightBlocks / tiles, 1, most);
    tokens_of_split = int(rounded_up((c.g.tokens + wanted - 1) / wanted, 32));
    splits = (c.g.tokens + tokens_of_split - 1) / tokens_of_split;
    const bool copies =
        c.has_norm() || c.embed % c.chunk() != 0 || reinterpret_cast<uintptr_t>(grad) % 16 != 0;
    dz = take<unsigned char>(copies ? int64_t(c.g.tokens) * dz_stride * bytes_of(c.type) : 0);
    norm_partial = take<float>(c.has_norm() ? int64_t(norm_blocks) * 2 * c.embed : 0);
    partial = take<float>(to.weight ? int64_t(splits) * c.embed * c.g.depth() : 0);
    partial_bias = take<float>(to.weight ? int64_t(splits) * c.embed : 0);
  }
};

// The gradient of the projection, where it is not that of the output; those of the norm.
template <typename T>
const char* launch_dz(const Call& c, const Gradients& to, const BackwardBuffers& b,
                      const void* grad, Stream stream) {
  NormBackwardParams p{params_of(c, b, nullptr), grad, b.dz, b.dz_stride, b.norm_partial};
  p.forward.sums = b.sums;
  if (!c.has_norm()) {
    const int64_t count = int64_t(c.g.tokens) * b.dz_stride;
    const unsigned blocks = unsigned(std::min<int64_t>((count + kThreads - 1) / kThreads, 1 << 16));
    return launch_kernel(&patch_pad_kernel<T>, blocks, kThreads, 0, stream, p);
  }
  const char* error = launch_project(c, p.forward, stream);
  if (!error)
    error =
        launch_kernel(&patch_norm_bwd_kernel<T>, unsigned(b.norm_blocks), kThreads, 0, stream, p);
  const NormSumParams sum{b.norm_partial, b.norm_blocks, c.embed, to.norm_weight, to.norm_bias};
  if (!error)
    error = launch_kernel(&patch_norm_sum_kernel, unsigned(c.embed + kWarp - 1) / kWarp,
                          kColumnThreads, 0, stream, sum);
  return error;
}

template <typename T, typename Pixel>
const char* launch_dweight(const Call& c, const Gradients& to, const BackwardBuffers& b,
                           const TokenRows& dz, Stream stream) {
  const WeightParams p{images_of(c, b, c.pixels), dz,        c.embed,       c.g.depth(),
                       b.tokens_of_split,         b.partial, b.partial_bias};
  const int64_t tiles =
      rounded_up(c.embed, kTile) / kTile * (rounded_up(c.g.depth(), kTile) / kTile);
  if (tiles * b.splits > 0x7fffffff) return "more than 2^31 - 1 blocks";
  const char* error = launch_kernel(&patch_dweight_kernel<T, Pixel>, unsigned(tiles * b.splits),
                                    kThreads, kWeightShared<T>, stream, p);
  if (error) return error;
  const WeightSumParams sum{c.g,      b.partial, b.partial_bias,
                            b.splits, c.embed,   float(scale_of(c)),
                            b.tables, to.weight, to.bias};
  return launch_kernel(&patch_dweight_sum_kernel<T>, unsigned(c.embed), kThreads, 0, stream, sum);
}

template <typename T>
const char* launch_dimages(const Call& c, const Gradients& to, const BackwardBuffers& b,
                           const TokenRows& dz, Stream stream) {
  const ImageParams p{images_of(c, b, to.images), dz, b.prepared ? b.prepared : c.weight,
                      b.prepared ? b.stride : c.g.depth(), c.embed};
  const int64_t blocks =
      rounded_up(c.g.tokens, kTile) / kTile * (rounded_up(c.g.depth(), kTile) / kTile);
  if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
  return launch_kernel(&patch_dimages_kernel<T>, unsigned(blocks), kThreads, kImageShared, stream,
                       p);
}

// Gradients of positions and prefix tokens.
template <typename T>
const char* launch_token_sums(const Call& c, const Gradients& to, const BackwardBuffers& b,
                              const void* grad, Stream stream) {
  if (c.places) {
    const bool aligned = reinterpret_cast<uintptr_t>(grad) % (kPositionPack * sizeof(T)) == 0;
    const PositionSumParams p{
        grad,       b.by_position, c.g.tokens, c.embed, aligned && c.embed % kPositionPack == 0,
        to.position};
    const int64_t blocks = int64_t(c.position_rows) * p.column_blocks();
    if (blocks > 0x7fffffff) return "more than 2^31 - 1 blocks";
    return launch_kernel(&patch_position_sum_kernel<T>, unsigned(blocks), kPositionThreads, 0,
                         stream, p);
  }
  const int64_t count = int64_t(c.out_rows()) * c.embed;
  const TokenSumParams p{grad,        c.images,   c.out_rows(),
                         c.embed,     c.prefixes, c.position_of_prefix ? 0 : c.prefixes,
                         to.position, to.prefix};
  return launch_kernel(&patch_token_sum_kernel<T>, unsigned((count + kThreads - 1) / kThreads),
                       kThreads, 0, stream, p);
}

// grad [images, prefixes + patches, embed], dense.
inline const char* patch_backward(const Call& c, const Gradients& to, const void* grad,
                                  void* workspace, Stream stream) {
  const BackwardBuffers b(c, to, grad, workspace);
  const char* error = launch_prepare(c, b, stream);
  if (error) return error;
  return with_pixels(c, [&](auto* type, auto* pixel) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    using Pixel = std::remove_pointer_t<decltype(pixel)>;
    const T* const patches = static_cast<const T*>(grad) + int64_t(c.prefixes) * c.embed;
    const bool products = to.weight || to.images;
    TokenRows dz{patches, int64_t(c.out_rows()) * c.embed, c.embed, c.g.patches};
    const char* failed = nullptr;
    if (b.dz && (c.has_norm() || products)) {
      failed = launch_dz<T>(c, to, b, grad, stream);
      dz = {b.dz, 0, b.dz_stride, c.g.tokens};
    }
    if (!failed && to.weight) failed = launch_dweight<T, Pixel>(c, to, b, dz, stream);
    if constexpr (std::is_same_v<T, Pixel>) {
      if (!failed && to.images) failed = launch_dimages<T>(c, to, b, dz, stream);
    }
    if (!failed && (to.position.data || to.prefix.data))
      failed = launch_token_sums<T>(c, to, b, grad, stream);
    return failed;
  });
}

}  // namespace vitkit::patch_embed
