// A program for the sanitizers: layer_norm_modulate and patch_embed on the emulator, over memory of
// exact size.
#include "emulator.h"
// The kernels and launches, by the same files nvcc compiles.
#include "layer_norm_modulate.cuh"
#include "patch_embed_launch.cuh"

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

using namespace vitkit;

namespace {

std::mt19937 random_numbers(1);

// bfloat16 or float32 of exact size, NaN until it is written.
template <typename T>
struct Memory {
  std::unique_ptr<T[]> data;
  size_t count;

  explicit Memory(size_t n) : data(new T[n]), count(n) {
    std::memset(data.get(), 0xff, n * sizeof(T));
  }
  static Memory normal(size_t n) {
    std::normal_distribution<float> draw;
    Memory m(n);
    for (size_t i = 0; i < n; ++i) from_float(draw(random_numbers), &m.data[i]);
    return m;
  }
  T* get() const { return data.get(); }
  RowTensor rows(int64_t stride) const { return {get(), element(), stride}; }
  SmallGradient gradient() const { return {get(), element()}; }
  static Element element() { return sizeof(T) == 4 ? Element::f32 : Element::bf16; }
  bool finite() const { return finite(count); }
  bool finite(size_t first) const {
    for (size_t i = 0; i < first; ++i)
      if (!std::isfinite(to_float(data[i]))) return false;
    return true;
  }
};
using Half = Memory<__nv_bfloat16>;
using Float = Memory<float>;

bool report(const char* name, const char* error, bool written) {
  if (error) std::printf("%s: %s\n", name, error);
  if (!written) std::printf("%s: not all was written\n", name);
  return !error && written;
}

// Two samples with their modulation, rows of the last block and parts that are not whole. The
// thread sanitizer pays for every thread of every block: wide rows do without the sums over them.
bool normalise_rows(int width, int64_t rows, bool sums_wanted, uint64_t seed) {
  namespace ln = vitkit::layer_norm;
  const size_t w = size_t(width), total = 2 * size_t(rows);
  const Half x = Half::normal(total * w), grad = Half::normal(total * w), y(total * w),
             dx(total * w), weight = Half::normal(w), bias = Half::normal(w),
             shift = Half::normal(2 * w), scale = Half::normal(2 * w);
  const Half dweight(w), dbias(w), dshift(2 * w), dscale(2 * w);
  const int64_t part_rows = 3, parts = (rows + 2) / 3;
  const Float mean(total), rstd(total), partial(size_t(2 * parts) * 2 * w), sums(4 * w);
  const ln::Shape shape{
      2, rows, width, false, weight.rows(0), bias.rows(0), shift.rows(width), scale.rows(width)};
  const char* error = ln::layer_norm_forward(
      {shape, x.get(), y.get(), mean.get(), rstd.get(), 1e-6f, 0}, Element::bf16, {seed});
  if (!error)
    error = ln::layer_norm_backward({shape,
                                     x.get(),
                                     grad.get(),
                                     dx.get(),
                                     mean.get(),
                                     rstd.get(),
                                     {nullptr, Element::f32},
                                     partial.get(),
                                     parts,
                                     part_rows},
                                    Element::bf16, {seed});
  if (!error)
    error =
        ln::layer_norm_small_gradients({shape, partial.get(), sums.get(), parts, dshift.gradient(),
                                        dscale.gradient(), dweight.gradient(), dbias.gradient()},
                                       {seed});
  const bool small = dweight.finite() && dbias.finite() && dshift.finite() && dscale.finite();
  return report("layer_norm", error, y.finite() && dx.finite() && (small || !sums_wanted));
}

// Three images of 2 x 3 patches, a class token; embed is one tile. Packed: without it, and with
// three tokens of broken places behind them, whose rows are NaN.
bool embed_patches(int embed, bool bytes, bool norm, bool packed, uint64_t seed) {
  namespace pe = vitkit::patch_embed;
  constexpr int kImages = 3, kRows = 8, kColumns = 12, kPatch = 4, kDepth = 3 * kPatch * kPatch;
  constexpr int kPatches = kRows * kColumns / (kPatch * kPatch), kBroken = 3;
  const size_t e = size_t(embed), pixels = kImages * 3 * kRows * kColumns;
  const Half images = Half::normal(pixels), dimages(pixels), weight = Half::normal(e * kDepth),
             dweight(e * kDepth), bias = Half::normal(e), position = Half::normal(7 * e),
             prefix = Half::normal(e), out(kImages * 7 * e), grad = Half::normal(kImages * 7 * e);
  const Half dbias(e), dnorm_weight(e), dnorm_bias(e), dposition(7 * e), dprefix(e);
  const Memory<uint8_t> raw(pixels);
  pe::Call c{};
  c.g = {3 * kRows * kColumns,
         kRows * kColumns,
         0,
         kColumns,
         1,
         1,
         kRows,
         kColumns,
         3,
         1,
         kPatch,
         kPatch,
         2,
         3,
         6,
         18,
         false};
  c.images = kImages;
  c.type = Element::bf16;
  c.bytes = bytes;
  c.pixels = bytes ? static_cast<const void*>(raw.get()) : images.get();
  c.weight = weight.get();
  c.embed = embed;
  c.bias = bias.rows(embed);
  c.position = position.rows(embed);
  c.prefix = prefix.rows(embed);
  if (norm) c.norm_weight = c.norm_bias = bias.rows(embed);
  c.prefixes = 1;
  c.position_of_prefix = true;
  c.eps = 1e-6f;
  std::vector<int64_t> places;
  if (packed) {
    for (int64_t m = 0; m < kImages * kPatches; ++m) {
      const int64_t patch = m % kPatches, row = patch / 3 * kPatch, column = patch % 3 * kPatch;
      const int64_t origin = m / kPatches * 3 * kRows * kColumns + row * kColumns + column;
      places.insert(places.end(), {origin, kRows * kColumns, kColumns, 99, kPatch, patch});
    }
    places.insert(places.end(), {int64_t(pixels) - 1, 0, 0, 1, 2, 0});
    places.insert(places.end(), {0, int64_t(1) << 60, kColumns, kPatch, kPatch, 0});
    places.insert(places.end(), {0, kRows * kColumns, kColumns, kPatch, kPatch, kPatches + 1});
    c.g = pe::packed_geometry(kImages * kPatches + kBroken, 3, kPatch, kPatch);
    c.images = 1;
    c.places = places.data();
    c.pixel_count = int64_t(pixels);
    c.prefixes = 0;
    c.position_of_prefix = false;
    c.position_rows = kPatches + 1;
    std::memset(dimages.get(), 0, pixels * sizeof(__nv_bfloat16));
  }
  const Memory<unsigned char> workspace(size_t(pe::ForwardBuffers(c, nullptr).bytes()));
  const char* error = pe::patch_forward(c, out.get(), workspace.get(), {seed});
  const SmallGradient none{nullptr, Element::f32};
  const pe::Gradients to{bytes ? nullptr : dimages.get(),
                         dweight.get(),
                         dbias.gradient(),
                         norm ? dnorm_weight.gradient() : none,
                         norm ? dnorm_bias.gradient() : none,
                         dposition.gradient(),
                         packed ? none : dprefix.gradient()};
  const Memory<unsigned char> more(size_t(pe::BackwardBuffers(c, to, grad.get(), nullptr).bytes()));
  if (!error) error = pe::patch_backward(c, to, grad.get(), more.get(), {seed});
  const bool finite = packed ? out.finite(kImages * kPatches * e) : out.finite();
  return report("patch_embed", error,
                finite && (bytes || dimages.finite()) && dweight.finite() && dbias.finite() &&
                    (!norm || dnorm_weight.finite()) && dposition.finite() &&
                    (packed || dprefix.finite()));
}

}  // namespace

int main() {
  bool ok = normalise_rows(40, 11, true, 1);
  ok &= normalise_rows(1152, 2, false, 2);
  ok &= embed_patches(8, false, true, false, 3);
  ok &= embed_patches(5, true, false, false, 4);
  ok &= embed_patches(8, false, false, true, 5);
  std::printf(ok ? "done\n" : "failed\n");
  return ok ? 0 : 1;
}
