// A tile of rows in shared memory, swizzled so that reads down a column of 16-byte chunks do not
// meet in a bank.
#pragma once

#include "pack.cuh"
#include "ptx.cuh"

namespace vitkit {

// Where 16-byte chunk `chunk` of row `row` lies, in chunks. Eight chunks span the 32 banks; eight
// rows at one chunk fall on eight different ones, for every even number of chunks a row: the
// largest power of two that divides it (up to 8) is what consecutive rows leave to be mixed by
// hand.
template <int kChunks>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int kPower = kChunks & -kChunks;
  constexpr int kSpan = kPower < 8 ? kPower : 8;
  return row * kChunks + (chunk ^ (row / (8 / kSpan) % kSpan));
}

// The same for float32, which is read as pairs of rows and pairs of columns: in units of two
// chunks, four of which span the banks. Rows 0 to 3, and rows 0, 2, 4, 6, fall on different ones.
template <int kChunks>
__device__ __forceinline__ int swizzled_pairs(int row, int chunk) {
  constexpr int kUnits = kChunks / 2;
  constexpr int kPower = kUnits & -kUnits;
  constexpr int kSpan = kPower < 4 ? kPower : 4;
  const int mixed = (row ^ (row >> 2 & 1)) & 3;
  return row * kChunks + (chunk ^ (mixed / (4 / kSpan) % kSpan * 2));
}

template <typename T, int kColumns>
struct SharedTile {
  static constexpr int kChunk = 16 / sizeof(T);  // elements of one
  static constexpr int kChunks = kColumns / kChunk;
  static_assert(kColumns % 16 == 0);

  unsigned char* data;

  __host__ __device__ static constexpr int bytes(int rows) {
    return rows * kColumns * int(sizeof(T));
  }

  __device__ __forceinline__ T* chunk(int row, int index) const {
    const int at =
        sizeof(T) == 4 ? swizzled_pairs<kChunks>(row, index) : swizzled<kChunks>(row, index);
    return reinterpret_cast<T*>(data + at * 16);
  }
  __device__ __forceinline__ uint32_t address(int row, int index) const {
    return ptx::shared_address(chunk(row, index));
  }
  // `column` is even where the pair that begins with it is read.
  __device__ __forceinline__ T* at(int row, int column) const {
    return chunk(row, column / kChunk) + column % kChunk;
  }
};

}  // namespace vitkit
