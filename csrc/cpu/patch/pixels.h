// From pixels to rows of patches: where a patch lies, and its lines as float32 or bfloat16.
//
// Rows are written from front to back with whole vectors: what a vector writes beyond a line, the
// next line overwrites. A row needs room for one vector more.
#pragma once

#include "patch_embed.h"
#include "simd.h"

namespace vitkit::cpu::VITKIT_ISA {

struct Place {
  int64_t origin, channel_stride, frame_stride, row_stride;
  int64_t frames, rows, run;  // of the patch, inside the image
  int64_t position, out;      // rows of the position embedding and of the output
};

// The places of consecutive tokens, without a division for each.
class Places {
 public:
  Places(const PatchEmbed& p, int64_t token) : p_(p), token_(token) {
    if (p.places) return;
    image_ = token / p.patches;
    int64_t n = token % p.patches;
    column_ = n % p.grid_columns;
    n /= p.grid_columns;
    row_ = n % p.grid_rows;
    frame_ = n / p.grid_rows;
  }

  Place get() const {
    if (p_.places) return of_table();
    const int64_t t = frame_ * p_.frames, y = row_ * p_.rows, x = column_ * p_.run;
    const int64_t patch = token_ - image_ * p_.patches;
    return {image_ * p_.image_stride + t * p_.frame_stride + y * p_.row_stride + x,
            p_.channel_stride,
            p_.frame_stride,
            p_.row_stride,
            smaller(p_.frames, p_.size_frames - t),
            smaller(p_.rows, p_.size_rows - y),
            smaller(p_.run, p_.size_columns - x),
            patch + (p_.position_of_prefix ? p_.prefixes : 0),
            image_ * p_.out_rows() + p_.prefixes + patch};
  }

  // The next tokens, `most` of them at the most, that lie side by side in one row of the grid and
  // wholly inside the image.
  int64_t whole_neighbours(int64_t most) const {
    if (p_.places || (frame_ + 1) * p_.frames > p_.size_frames ||
        (row_ + 1) * p_.rows > p_.size_rows)
      return 0;
    const int64_t last = smaller(p_.grid_columns, p_.size_columns / p_.run);
    return smaller(most, last - column_);
  }

  void next() {
    ++token_;
    if (p_.places || ++column_ < p_.grid_columns) return;
    column_ = 0;
    if (++row_ < p_.grid_rows) return;
    row_ = 0;
    if (++frame_ < p_.grid_frames) return;
    frame_ = 0;
    ++image_;
  }

 private:
  Place of_table() const {
    const int64_t* at = p_.places + token_ * kPlaceColumns;
    return {at[kOrigin],  at[kChannelStride], 0,     at[kRowStride], 1, at[kRows],
            at[kColumns], at[kPositionRow],   token_};
  }

  const PatchEmbed& p_;
  int64_t token_, image_ = 0, frame_ = 0, row_ = 0, column_ = 0;
};

VITKIT_INLINE int64_t lines_of(const PatchEmbed& p) { return p.channels * p.frames * p.rows; }

// f(line, offset of its first pixel, number of its pixels inside the image) for lines [first,
// last).
template <typename F>
VITKIT_INLINE void each_line(const PatchEmbed& p, const Place& at, int64_t first, int64_t last,
                             const F& f) {
  int64_t y = first % p.rows, t = first / p.rows % p.frames, c = first / p.rows / p.frames;
  for (int64_t line = first; line < last; ++line) {
    const bool inside = t < at.frames && y < at.rows;
    f(line, at.origin + c * at.channel_stride + t * at.frame_stride + y * at.row_stride,
      inside ? at.run : 0);
    if (++y < p.rows) continue;
    y = 0;
    if (++t < p.frames) continue;
    t = 0;
    ++c;
  }
}

// Lines [first, last) of a patch, one after the other.
template <typename Pixel, typename To>
VITKIT_INLINE void pack_lines(const PatchEmbed& p, const Place& at, int64_t first, int64_t last,
                              To* dst) {
  constexpr bool kBytes = std::is_same_v<Pixel, uint8_t>;
  const auto* pixels = reinterpret_cast<const Pixel*>(p.images);
  each_line(p, at, first, last, [&](int64_t line, int64_t offset, int64_t inside) {
    const int64_t k = line * p.run;
    const Pixel* from = pixels + offset;
    // Whole vectors may be read up to the last pixel of the tensor.
    const bool whole = p.pixel_count - offset >= inside + kLanes - 1;
    for (int64_t i = 0; i < inside; i += kLanes) {
      f32v v = whole ? load(from + i) : load_partial(from + i, int(inside - i));
      if constexpr (kBytes) v -= load(p.centre + k + i);
      store(dst + i, v);
    }
    for (int64_t i = inside; i < p.run; ++i) from_float(kBytes ? p.padding[k + i] : 0.f, dst + i);
    dst += p.run;
  });
}

// `count` whole patches side by side whose lines are one vector or less, line by line: the lines of
// neighbours follow each other in memory, and nothing is computed for each of them.
template <typename Pixel>
VITKIT_INLINE void pack_neighbours(const PatchEmbed& p, const Place& at, int64_t count, float* dst,
                                   int64_t stride) {
  const auto* pixels = reinterpret_cast<const Pixel*>(p.images);
  each_line(p, at, 0, lines_of(p), [&](int64_t line, int64_t offset, int64_t) {
    const Pixel* from = pixels + offset;
    float* to = dst + line * p.run;
    f32v centre = {};
    if constexpr (std::is_same_v<Pixel, uint8_t>) centre = load(p.centre + line * p.run);
    for (int64_t i = 0; i < count; ++i) store(to + i * stride, load(from + i * p.run) - centre);
  });
}

// Whether vectors read from the lines of such patches stay within the tensor.
VITKIT_INLINE bool vectors_fit(const PatchEmbed& p, const Place& at, int64_t count) {
  const int64_t last = at.origin + (p.channels - 1) * at.channel_stride +
                       (p.frames - 1) * at.frame_stride + (p.rows - 1) * at.row_stride;
  return last + (count - 1) * p.run + kLanes <= p.pixel_count;
}

// The other way: the lines of a patch that lie inside the image.
template <typename Pixel>
VITKIT_INLINE void unpack_lines(const PatchEmbed& p, const Place& at, const float* src,
                                Pixel* images) {
  each_line(p, at, 0, lines_of(p), [&](int64_t line, int64_t offset, int64_t inside) {
    each_vector(inside, [&](int64_t i, auto n) {
      store_partial(images + offset + i, load_partial(src + line * p.run + i, n), n);
    });
  });
}

// f(null pointer of the element type).
template <typename F>
VITKIT_INLINE void with_float_type(PatchElement type, const F& f) {
  switch (type) {
    case PatchElement::f32:
      return f(static_cast<float*>(nullptr));
    case PatchElement::bf16:
      return f(static_cast<bf16*>(nullptr));
    case PatchElement::f16:
      return f(static_cast<f16*>(nullptr));
    case PatchElement::u8:
      break;
  }
  __builtin_trap();
}

// f(null pixel, null element of weight and tokens): the same type, or bytes and any type.
template <typename F>
VITKIT_INLINE void with_types(const PatchEmbed& p, const F& f) {
  with_float_type(p.type, [&](auto* element) {
    if (p.pixels == PatchElement::u8)
      f(static_cast<uint8_t*>(nullptr), element);
    else
      f(element, element);
  });
}

}  // namespace vitkit::cpu::VITKIT_ISA
