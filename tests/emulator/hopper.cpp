// Barriers that count bytes, copies of boxes and products of a warpgroup. Compiled without
// sanitizers, like the scheduler.
#include "emulated_hopper.h"
#include "scheduler.h"

#undef threadIdx

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <vector>

namespace emulator {

namespace {

struct Phase {
  int arrivals, missing;
  int64_t bytes = 0;  // expected and not there
  unsigned number = 0;
  bool shown = false;     // to the copy engine
  size_t by;              // the thread that initialised it
  uint64_t tags[2] = {};  // for the thread sanitizer, of even and odd phases

  void settle() {
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    ++number;
  }
};

struct UnderWay {
  BoxCopy copy;
  void (*perform)(const BoxCopy&);
  uint64_t tag = 0;
};

struct Accumulators {
  float* d;
  std::vector<float> values;
};

// Of a thread.
struct Products {
  std::vector<Product> open;
  std::vector<size_t> groups;  // how many products each committed one holds, oldest first
  size_t uncommitted = 0;
  std::vector<Accumulators> accumulators;  // of products in flight
  bool fenced = false;
};

struct Meeting {
  size_t arrived = 0;
  unsigned number = 0;
  uint64_t tags[2] = {};
};

std::map<uint32_t, Phase> phases;
std::vector<std::unique_ptr<UnderWay>> under_way;
std::vector<Products> products;
std::map<int, Meeting> meetings;

Phase& phase_at(uint32_t barrier, Site here) {
  const auto found = phases.find(barrier);
  if (found == phases.end()) fail(here, "there is no barrier at shared address %u", barrier);
  return found->second;
}

struct PhaseWait {
  const Phase* phase;
  unsigned parity;
};
bool phase_over(const void* what) {
  const auto* wait = static_cast<const PhaseWait*>(what);
  return wait->phase->number % 2 != wait->parity;
}

Products& mine() { return products[current->thread.x]; }

}  // namespace

void begin_async(size_t threads) {
  phases.clear();
  under_way.clear();
  meetings.clear();
  products.assign(threads, {});
}

bool copies_under_way() { return !under_way.empty(); }

void finish_copy(std::mt19937_64& random) {
  const size_t drawn = random() % under_way.size();
  const std::unique_ptr<UnderWay> arrived = std::move(under_way[drawn]);
  under_way.erase(under_way.begin() + long(drawn));
  acquire(&arrived->tag);
  arrived->perform(arrived->copy);
  Phase& phase = phases.at(arrived->copy.barrier);
  release(&phase.tags[phase.number % 2]);
  phase.bytes -= arrived->copy.bytes();
  phase.settle();
}

const char* left_by_thread(size_t thread) {
  return products[thread].open.empty() ? nullptr : "the thread ends with products in flight";
}

const char* left_by_block() {
  return under_way.empty() ? nullptr : "the block ends with copies of boxes under way";
}

void phase_init(uint32_t barrier, int arrivals, Site here) {
  if (arrivals <= 0) fail(here, "a barrier of %d arrivals", arrivals);
  phases[barrier] = {arrivals, arrivals};
  phases[barrier].by = current->thread.x;
}

void phase_init_done() {
  for (auto& [address, phase] : phases) phase.shown |= phase.by == current->thread.x;
}

void phase_arrive(uint32_t barrier, int expected_bytes, Site here) {
  Phase& phase = phase_at(barrier, here);
  release(&phase.tags[phase.number % 2]);
  phase.bytes += expected_bytes;
  --phase.missing;
  phase.settle();
}

void phase_wait(uint32_t barrier, int parity, Site here) {
  Phase& phase = phase_at(barrier, here);
  const PhaseWait wait{&phase, unsigned(parity)};
  wait_until(phase_over, &wait, here);
  acquire(&phase.tags[parity]);
}

void check_box(const BoxCopy& copy, Site here) {
  if (!phase_at(copy.barrier, here).shown)
    fail(here, "the barrier's initialisation is not shown to the copy engine");
  // 1 KiB, where the pattern of any width begins again: less is not what the kernels mean.
  if (copy.to % 1024) fail(here, "a box at shared address %u, no multiple of 1024", copy.to);
  if (copy.to + copy.bytes() > dynamic_shared_bytes())
    fail(here, "a box of %u bytes at shared address %u: the launch has %u", copy.bytes(), copy.to,
         dynamic_shared_bytes());
  for (const auto& other : under_way)
    if (copy.to < other->copy.to + other->copy.bytes() && other->copy.to < copy.to + copy.bytes())
      fail(here, "a box where another one is under way");
}

void begin_box(const BoxCopy& copy, void (*perform)(const BoxCopy&)) {
  under_way.push_back(std::make_unique<UnderWay>(UnderWay{copy, perform}));
  release(&under_way.back()->tag);
}

void check_arrived(uint32_t address, uint32_t bytes, Site here) {
  for (const auto& other : under_way)
    if (address < other->copy.to + other->copy.bytes() && other->copy.to < address + bytes)
      fail(here, "shared address %u is read while a copy to it is under way", address);
}

void warpgroup_barrier(int barrier, Site here) {
  if (barrier < 1 || barrier > 15) fail(here, "warpgroup barrier %d: there are 1 to 15", barrier);
  Meeting& meeting = meetings[barrier];
  const unsigned number = meeting.number;
  release(&meeting.tags[number % 2]);
  if (++meeting.arrived == 128) meeting.arrived = 0, ++meeting.number;
  struct Wait {
    const Meeting* meeting;
    unsigned number;
  } const wait{&meeting, number};
  const auto met = [](const void* what) {
    const auto* w = static_cast<const Wait*>(what);
    return w->meeting->number != w->number;
  };
  wait_until(met, &wait, here);
  acquire(&meeting.tags[number % 2]);
}

// ---- products ----

namespace {

// How a matrix lies in shared memory.
struct Matrix {
  uint32_t start, panel_bytes, eight_rows, row_bytes;

  explicit Matrix(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4),
        panel_bytes(uint32_t(bits >> 16 & 0x3fff) << 4),
        eight_rows(uint32_t(bits >> 32 & 0x3fff) << 4),
        row_bytes(16u << (4 - (bits >> 62))) {}

  // Rows of 16 columns from the start on, in one panel.
  uint32_t of_row(uint32_t row, uint32_t column) const {
    return mixed(start + row % 8 * row_bytes + row / 8 * eight_rows + column * 2, row_bytes);
  }
  // 16 rows of panels side by side.
  uint32_t across(uint32_t row, uint32_t column) const {
    const uint32_t wide = row_bytes / 2;
    return mixed(start + row % 8 * row_bytes + row / 8 * eight_rows + column % wide * 2 +
                     column / wide * panel_bytes,
                 row_bytes);
  }
};

float element_at(uint32_t address, bool half) {
  uint16_t bits;
  std::memcpy(&bits, dynamic_shared() + address, 2);
  return half ? widen<__half>(bits) : widen<__nv_bfloat16>(bits);
}

// What a lane brings to its warp's part of a product.
struct WarpPart {
  const Product* product;
  float* d;
  int warp;  // of the warpgroup
};

void multiply_op(void* const (&lanes)[32]) {
  const auto argument = [&](int lane) { return static_cast<WarpPart*>(lanes[lane]); };
  const Product& p = *argument(0)->product;
  const int columns = p.tiles * 8;
  float a[16][16];
  std::vector<float> b(size_t(16 * columns));
  if (p.a) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int high = 0; high < 2; ++high) {
          const uint32_t bits = argument(lane)->product->held[i] >> 16 * high & 0xffff;
          a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + high] =
              p.half ? widen<__half>(bits) : widen<__nv_bfloat16>(bits);
        }
  } else {
    const Matrix matrix(p.a_matrix);
    for (uint32_t row = 0; row < 16; ++row)
      for (uint32_t k = 0; k < 16; ++k)
        a[row][k] = element_at(matrix.of_row(uint32_t(argument(0)->warp) * 16 + row, k), p.half);
  }
  const Matrix matrix(p.b_matrix);
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < 16; ++k)
      b[size_t(k * columns + n)] = element_at(p.of_rows ? matrix.of_row(uint32_t(n), uint32_t(k))
                                                        : matrix.across(uint32_t(k), uint32_t(n)),
                                              p.half);
  std::vector<float> c(size_t(16 * columns));
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < columns; ++n)
        c[size_t(m * columns + n)] += a[m][k] * b[size_t(k * columns + n)];
  for (int lane = 0; lane < 32; ++lane)
    for (int n = 0; n < p.tiles; ++n)
      for (int i = 0; i < 4; ++i) {
        float& to = argument(lane)->d[n * 4 + i];
        const int row = lane / 4 + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
        to = (p.add ? to : 0.f) + c[size_t(row * columns + column)];
      }
}

}  // namespace

bool operand_chunk(const Product& product, int number, uint32_t& address) {
  const uint32_t of_a = product.a ? 0 : 32, n = uint32_t(number);
  const Matrix a(product.a_matrix), b(product.b_matrix);
  if (n < of_a) {
    const uint32_t warp = current->thread.x / 32 % 4;
    address = a.of_row(warp * 16 + n / 2, n % 2 * 8);
    return true;
  }
  const uint32_t rest = n - of_a, tiles = uint32_t(product.tiles);
  if (rest >= tiles * 16) return false;
  address =
      product.of_rows ? b.of_row(rest / 2, rest % 2 * 8) : b.across(rest / tiles, rest % tiles * 8);
  return true;
}

void product_fence() { mine().fenced = true; }

void begin_product(const Product& product, Site here) {
  Products& p = mine();
  if (!p.fenced) fail(here, "a product without a fence since its registers may have been written");
  const int count = product.tiles * 4;
  const auto known = [&](const Accumulators& a) { return a.d == product.d; };
  if (std::none_of(p.accumulators.begin(), p.accumulators.end(), known)) {
    p.accumulators.push_back({product.d, {product.d, product.d + count}});
    std::memset(product.d, 0xff, size_t(count) * 4);
  }
  p.open.push_back(product);
  ++p.uncommitted;
}

void end_group() {
  mine().groups.push_back(mine().uncommitted);
  mine().uncommitted = 0;
}

const Product* product_in_flight(size_t i) {
  return i < mine().open.size() ? &mine().open[i] : nullptr;
}

void finish_products(int groups, Site here) {
  Products& p = mine();
  collective(nothing_op, nullptr, true, here);  // the warp waits as one
  while (p.groups.size() > size_t(groups)) {
    for (size_t i = 0; i < p.groups.front(); ++i) {
      Product product = p.open.front();
      const auto a = std::find_if(p.accumulators.begin(), p.accumulators.end(),
                                  [&](const Accumulators& x) { return x.d == product.d; });
      if (product.a && std::memcmp(product.a, product.held, 16) != 0)
        fail(product.here, "registers of a product were written before it was waited for");
      for (int k = 0; k < product.tiles * 4; ++k) {
        uint32_t bits;
        std::memcpy(&bits, product.d + k, 4);
        if (bits != ~0u) fail(product.here, "accumulators were written before the wait");
      }
      WarpPart part{&product, a->values.data(), int(current->thread.x / 32 % 4)};
      collective(multiply_op, &part, false, product.here);
      p.open.erase(p.open.begin());
      const auto same = [&](const Product& x) { return x.d == product.d; };
      if (std::none_of(p.open.begin(), p.open.end(), same)) {
        std::memcpy(product.d, a->values.data(), a->values.size() * 4);
        p.accumulators.erase(a);
      }
    }
    p.groups.erase(p.groups.begin());
  }
  p.fenced = false;
}

}  // namespace emulator
