#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulator {

Thread* current = nullptr;

namespace {

constexpr size_t kStack = 128 * 1024;

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
  Thread thread;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ready;
  uint64_t given = 0, taken = 0;
  int source = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* running = nullptr;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
std::vector<unsigned char> shared;
std::string message;

void enter() {
  (*body)();
  running->state = State::done;
  swapcontext(&running->context, &scheduler);
}

void wait(State state) {
  running->state = state;
  swapcontext(&running->context, &scheduler);
}

void start(Fiber& f) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, enter, 0);
  f.state = State::ready;
}

// Completes the shuffles of warps whose 32 lanes have all arrived.
bool finish_shuffles(size_t count) {
  bool any = false;
  for (size_t first = 0; first < count; first += 32) {
    const size_t last = std::min(first + 32, count);
    const bool all = std::all_of(fibers.begin() + long(first), fibers.begin() + long(last),
                                 [](const auto& f) { return f->state == State::at_shuffle; });
    if (!all || last - first != 32) continue;
    for (size_t i = first; i < last; ++i)
      fibers[i]->taken = fibers[first + size_t(fibers[i]->source)]->given;
    for (size_t i = first; i < last; ++i) fibers[i]->state = State::ready;
    any = true;
  }
  return any;
}

bool run_block(size_t count, std::mt19937_64& random) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (const size_t i : order) {
      if (fibers[i]->state != State::ready) continue;
      running = fibers[i].get();
      current = &running->thread;
      swapcontext(&scheduler, &running->context);
      progress = true;
    }
    progress |= finish_shuffles(count);
    size_t done = 0, waiting = 0;
    for (size_t i = 0; i < count; ++i) {
      done += fibers[i]->state == State::done;
      waiting += fibers[i]->state == State::at_barrier;
    }
    if (done == count) return true;
    if (waiting == count) {
      for (size_t i = 0; i < count; ++i) fibers[i]->state = State::ready;
      continue;
    }
    if (!progress) {
      message = "deadlock: " + std::to_string(waiting) + " threads at a barrier, " +
                std::to_string(done) + " ended, the others in a shuffle their warp does not share";
      return false;
    }
  }
}

}  // namespace

unsigned char* dynamic_shared() { return shared.data(); }

void barrier() { wait(State::at_barrier); }

uint64_t exchange(uint64_t value, int source) {
  running->given = value;
  running->source = source;
  wait(State::at_shuffle);
  return running->taken;
}

bool launch(dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed,
            const std::function<void()>& kernel) {
  const size_t count = size_t(block.x) * block.y * block.z;
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  std::mt19937_64 random(seed);
  body = &kernel;
  message.clear();
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        shared.assign(shared_bytes, 0xff);  // NaN in every float format
        for (size_t i = 0; i < count; ++i) {
          fibers[i]->thread = {{unsigned(i % block.x), unsigned(i / block.x % block.y),
                                unsigned(i / block.x / block.y)},
                               {x, y, z},
                               block,
                               grid,
                               int(i % 32)};
          start(*fibers[i]);
        }
        if (!run_block(count, random)) return false;
      }
  return true;
}

const char* error() { return message.c_str(); }

}  // namespace emulator
