// The twin of csrc/core/hopper.cuh and tensor_map.h: the same functions, for the emulator.
//
// A copy arrives at a drawn time, until which its target is NaN. A product reads its operands when
// it begins and once more when it is waited for, which is when its accumulators, NaN until then,
// get their values. Touching what a copy in flight writes is an error.
#pragma once

#include "emulator.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace vitkit {

struct TensorMap {
  const unsigned char* data;
  uint64_t sizes[4], strides[3];  // strides in bytes
  int columns, rows;              // of a box
};

// Refuses what the driver would.
template <typename Boxed>
const char* encode(TensorMap& map, const Boxed& t) {
  map.data = static_cast<const unsigned char*>(t.data);
  map.columns = t.box_columns;
  map.rows = t.box_rows;
  t.shape(map.sizes, map.strides);
  if (reinterpret_cast<uintptr_t>(t.data) % 16) return "a tensor map of a misaligned base";
  for (const uint64_t stride : map.strides)
    if (stride % 16 || stride == 0 || stride >= uint64_t(1) << 40)
      return "a tensor map of a stride that no map has";
  for (const uint64_t size : map.sizes)
    if (size == 0 || size > uint64_t(1) << 32) return "a tensor map of a size that no map has";
  if ((map.columns != 16 && map.columns != 32 && map.columns != 64) || map.rows < 1 ||
      map.rows > 256)
    return "a tensor map of a box that no map has";
  return nullptr;
}

}  // namespace vitkit

namespace emulator {

struct BoxCopy {
  vitkit::TensorMap map;
  uint32_t to, barrier;
  int64_t first[4];  // column, row, head, batch
  uint32_t row_bytes() const { return uint32_t(map.columns) * 2; }
  uint32_t bytes() const { return uint32_t(map.rows) * row_bytes(); }
};

// Where byte `address` of rows of 32, 64 or 128 bytes really lies.
inline uint32_t mixed(uint32_t address, uint32_t row_bytes) {
  return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

void phase_init(uint32_t barrier, int arrivals, Site here);
void phase_init_done();
void phase_arrive(uint32_t barrier, int expected_bytes, Site here);
void phase_wait(uint32_t barrier, int parity, Site here);
void check_box(const BoxCopy& copy, Site here);
void begin_box(const BoxCopy& copy, void (*perform)(const BoxCopy&));
void warpgroup_barrier(int barrier, Site here);

// One warp's part of a product: rows 16 w to 16 w + 15 of 64.
struct Product {
  float* d;
  int tiles;          // of 8 columns
  const uint32_t* a;  // registers, null: `a_matrix`
  uint32_t held[4];   // the registers when the product began
  uint64_t a_matrix, b_matrix;
  bool of_rows;  // b's rows are the product's columns
  bool add;
  bool half;  // float16
  Site here;
};
void product_fence();
void begin_product(const Product& product, Site here);
void end_group();
// The i-th product in flight, null behind the last.
const Product* product_in_flight(size_t i);
// Retires all but `groups` groups.
void finish_products(int groups, Site here);

// 16 bytes of an operand by number, of those that a warp's part of a product reads; false behind
// the last. They may not be on their way.
bool operand_chunk(const Product& product, int number, uint32_t& address);
void check_arrived(uint32_t address, uint32_t bytes, Site here);

}  // namespace emulator

namespace vitkit::ptx {

inline void phase_init(uint32_t barrier, int arrivals, EMULATED_HERE) {
  emulator::shared_at(barrier, 8, here);
  emulator::phase_init(barrier, arrivals, here);
}
inline void phase_init_done() { emulator::phase_init_done(); }
inline void phase_arrive(uint32_t barrier, EMULATED_HERE) {
  emulator::phase_arrive(barrier, 0, here);
}
inline void phase_arrive_expecting(uint32_t barrier, int bytes, EMULATED_HERE) {
  emulator::phase_arrive(barrier, bytes, here);
}
inline void phase_wait(uint32_t barrier, int parity, EMULATED_HERE) {
  emulator::phase_wait(barrier, parity, here);
}

// Runs as the copy engine. Compiled with the kernel, for the sanitizers to see.
inline void perform_box(const emulator::BoxCopy& copy) {
  const TensorMap& map = copy.map;
  const auto inside = [&](int d, int64_t i) { return i >= 0 && i < int64_t(map.sizes[d]); };
  const bool plane = inside(2, copy.first[2]) && inside(3, copy.first[3]);
  const unsigned char* const from =
      map.data + copy.first[2] * int64_t(map.strides[1]) + copy.first[3] * int64_t(map.strides[2]);
  for (int row = 0; row < map.rows; ++row)
    for (int column = 0; column < map.columns; ++column) {
      const int64_t r = copy.first[1] + row, c = copy.first[0] + column;
      uint16_t element = 0;
      if (plane && inside(0, c) && inside(1, r))
        element = *reinterpret_cast<const uint16_t*>(from + r * int64_t(map.strides[0]) + c * 2);
      const uint32_t at = copy.to + uint32_t(row) * copy.row_bytes() + uint32_t(column) * 2;
      *reinterpret_cast<uint16_t*>(emulator::dynamic_shared() +
                                   emulator::mixed(at, copy.row_bytes())) = element;
    }
}

inline void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row,
                     int head, int batch, EMULATED_HERE) {
  const emulator::BoxCopy copy{map, to, barrier, {column, row, head, batch}};
  emulator::check_box(copy, here);
  for (uint32_t at = 0; at < copy.bytes(); at += 8)  // poison until it arrives
    *reinterpret_cast<uint64_t*>(emulator::dynamic_shared() + to + at) = ~0ull;
  emulator::begin_box(copy, perform_box);
}

inline void product_fence() { emulator::product_fence(); }
inline void product_commit() { emulator::end_group(); }

// A lane's share of the operands, read where the sanitizers see it.
inline void touch(const emulator::Product& product, emulator::Site here) {
  uint32_t address;
  for (int i = emulator::current->lane; emulator::operand_chunk(product, i, address); i += 32) {
    const unsigned char* const chunk = emulator::shared_at(address, 16, here);
    emulator::check_arrived(address, 16, here);
    volatile unsigned char first = chunk[0];
    (void)first;
  }
}

template <int kGroups>
inline void product_wait(EMULATED_HERE) {
  for (size_t i = 0; const emulator::Product* p = emulator::product_in_flight(i); ++i)
    touch(*p, here);
  emulator::finish_products(kGroups, here);
}

template <int kTiles>
inline void product_done(float (&)[kTiles][4]) {}

inline void begin(const emulator::Product& product, emulator::Site here) {
  touch(product, here);
  emulator::begin_product(product, here);
}

template <typename T>
inline void product_of_rows(float (&d)[16][4], uint64_t a, uint64_t b, bool add, EMULATED_HERE) {
  begin({&d[0][0], 16, nullptr, {}, a, b, true, add, std::is_same_v<T, __half>, here}, here);
}

template <typename T, int kTiles>
inline void product_of_columns(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b,
                               EMULATED_HERE) {
  static_assert(kTiles == 8 || kTiles == 10 || kTiles == 12 || kTiles == 16);
  begin({&d[0][0],
         kTiles,
         a,
         {a[0], a[1], a[2], a[3]},
         0,
         b,
         false,
         true,
         std::is_same_v<T, __half>,
         here},
        here);
}

template <int kRegisters>
inline void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
inline void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void warpgroup_barrier(int barrier, EMULATED_HERE) {
  emulator::warpgroup_barrier(barrier, here);
}

}  // namespace vitkit::ptx
