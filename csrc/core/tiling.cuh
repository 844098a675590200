// [segments, rows, columns] cut into tiles for kernels that take each element once: a thread takes
// one pack of a row.
#pragma once

#include <type_traits>

#include "element.cuh"

namespace vitkit {

constexpr int kTileThreads = 256;

// Units are packs of columns. Threads that are neighbours take neighbouring units, in as many rows
// as a block then reaches.
struct Tiling {
  int64_t segments, rows, units;  // rows and units of a segment
  int shift;                      // 1 << shift threads lie side by side in a row
  unsigned row_blocks, unit_blocks;

  struct Place {
    int64_t segment, row, unit;
    bool exists;
  };

  __host__ __device__ int lanes() const { return 1 << shift; }

  __device__ __forceinline__ Place place(unsigned block) const {
    const unsigned of_rows = block / unit_blocks;
    const int64_t unit =
        int64_t(block % unit_blocks) << shift | int64_t(threadIdx.x & unsigned(lanes() - 1));
    const int64_t row =
        int64_t(of_rows % row_blocks) * (kTileThreads >> shift) + int64_t(threadIdx.x >> shift);
    return {of_rows / row_blocks, row, unit, row < rows && unit < units};
  }

  // 64 bytes or more of a row side by side. Of the threads of a row of 32 units or more, and of
  // multiples of 4, at most one in nine is idle.
  static int shift_of(int64_t units) {
    int shift = 8;
    while (shift > 2 && units % (1 << shift) != 0 && units < int64_t(8) << shift) --shift;
    return shift;
  }
};

// Null, or why not.
inline const char* make_tiling(Tiling& t, int64_t segments, int64_t rows, int64_t units) {
  const int shift = Tiling::shift_of(units);
  const auto blocks = [](int64_t n, int64_t of_block) { return (n + of_block - 1) / of_block; };
  const int64_t row_blocks = blocks(rows, kTileThreads >> shift);
  const int64_t unit_blocks = blocks(units, int64_t(1) << shift), limit = 0x7fffffff;
  if (segments > limit || row_blocks > limit || unit_blocks > limit ||
      row_blocks * unit_blocks > limit / segments)
    return "more than 2^31 - 1 blocks";
  t = {segments, rows, units, shift, unsigned(row_blocks), unsigned(unit_blocks)};
  return nullptr;
}

inline unsigned blocks_of(const Tiling& t) {
  return unsigned(t.segments) * t.row_blocks * t.unit_blocks;
}

// The first `count` elements of a pack, which ends a row where that is less than kPack.
template <typename T, int kPack>
__device__ __forceinline__ Pack<T, kPack> load_part(const T* p, int64_t count) {
  if (count >= kPack) return Pack<T, kPack>::load(p);
  Pack<T, kPack> v;
#pragma unroll
  for (int k = 0; k < kPack; ++k) v.element[k] = k < count ? p[k] : T(0.f);
  return v;
}

template <typename T, int kPack>
__device__ __forceinline__ void store_part(const Pack<T, kPack>& v, T* p, int64_t count) {
  if (count >= kPack) return v.store(p);
#pragma unroll
  for (int k = 0; k < kPack; ++k)
    if (k < count) p[k] = v.element[k];
}

// f(null T, std::integral_constant<int, elements of a pack>): of 16 bytes, or single elements.
template <typename F>
const char* with_pack(Element element, bool packs, F&& f) {
  return with_element(element, [&](auto* type) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    if (packs) return f(type, std::integral_constant<int, kFullPack<T>>{});
    return f(type, std::integral_constant<int, 1>{});
  });
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace vitkit
