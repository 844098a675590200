// The scheduler. Compiled without sanitizers, whose fiber hooks it calls
// where they are linked in.
#include "scheduler.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

extern "C" {
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void __tsan_destroy_fiber(void*) __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
void __sanitizer_start_switch_fiber(void**, const void*, size_t) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) __attribute__((weak));
void emulator_swap(void** from, void* to);
}

// Saves the callee-saved registers on the stack of one fiber and takes those of another: twenty
// times cheaper than swapcontext, which asks the kernel for the signal mask.
#if defined(__x86_64__)
asm(R"(.text
.globl emulator_swap
.type emulator_swap,@function
emulator_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi); movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_swap,.-emulator_swap
)");
#else
#error "the emulator switches fibers on x86-64 only"
#endif

namespace emulator {

Thread* current = nullptr;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kMaxThreads = 1024;

enum class State { ready, at_barrier, at_collective, waits, done };

struct Fiber {
  Thread thread;
  char* stack;
  void* stack_pointer;
  void *asan = nullptr, *tsan = nullptr;
  State state = State::ready;
  Site site;
  WarpOp op;
  void* argument;
  bool (*until)(const void*);  // what it waits for, with `argument`
  std::vector<Copy> copies;    // in flight, oldest first
  std::vector<int> groups;     // how many of them each committed group holds
  size_t first_copy = 0, first_group = 0;
  int open = 0;  // in no group yet
  // Barriers, and warp operations that order memory, until now. What the thread sanitizer is told
  // of one must not be what a thread that wakes late from the one before acquires: they alternate.
  unsigned barriers = 0, ordering = 0;
  uint64_t of_warp[2];  // of the warp's first fiber
};

std::vector<std::unique_ptr<Fiber>> fibers;
size_t threads = 0;
Fiber* running = nullptr;
void *main_pointer, *main_asan, *main_tsan;
const void* main_stack;
size_t main_stack_bytes;
const std::function<void()>* body = nullptr;
unsigned char* shared = nullptr;
size_t shared_bytes = 0;
uint64_t of_block[2];
bool failed = false;
std::string message;

void switch_to(Fiber* to) {
  Fiber* const from = running;
  running = to;
  current = to ? &to->thread : nullptr;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to ? to->tsan : main_tsan, 1);  // no sync
  void** const mine = from ? &from->asan : &main_asan;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(from && from->state == State::done ? nullptr : mine,
                                   to ? to->stack : main_stack, to ? kStack : main_stack_bytes);
  emulator_swap(from ? &from->stack_pointer : &main_pointer, to ? to->stack_pointer : main_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(*mine, nullptr, nullptr);
}

void wait(State state, Site here) {
  running->state = state;
  running->site = here;
  switch_to(nullptr);
}

void enter() {
  if (__sanitizer_finish_switch_fiber) {
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (main_stack == nullptr) main_stack = stack, main_stack_bytes = bytes;
  }
  if (__tsan_acquire) __tsan_acquire(&body);
  (*body)();
  if (running->first_copy < running->copies.size())
    fail(running->site, "the thread ends with copies in flight");
  if (const char* left = left_by_thread(running->thread.thread.x)) fail(running->site, "%s", left);
  running->state = State::done;
  if (__tsan_release) __tsan_release(&body);
  switch_to(nullptr);
  std::abort();
}

void start(Fiber& f) {
  f.state = State::ready;
  f.copies.clear();
  f.groups.clear();
  f.first_copy = f.first_group = 0;
  f.open = 0;
  f.barriers = f.ordering = 0;
  f.asan = nullptr;
  f.tsan = __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr;
  void** top = reinterpret_cast<void**>(f.stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
}

// For findings of the scheduler, outside every fiber.
bool report(const Fiber& f, const char* what, const Fiber* other) {
  char text[600];
  int n = std::snprintf(text, sizeof text, "%s:%d: block %u,%u,%u thread %u %s", f.site.file,
                        f.site.line, f.thread.block.x, f.thread.block.y, f.thread.block.z,
                        f.thread.thread.x, what);
  if (other) {
    const char* does = other->state == State::done         ? "has ended"
                       : other->state == State::at_barrier ? "is at the barrier of"
                                                           : "is at";
    std::snprintf(text + n, sizeof text - size_t(n), ", thread %u %s %s:%d", other->thread.thread.x,
                  does, other->site.file, other->site.line);
  }
  message = text;
  failed = true;
  return false;
}

// Runs every lane of a warp to its next operation and performs that, if it is one of the warp.
bool step(size_t first, std::mt19937_64& random) {
  const size_t turn = random() % 32, stride = random() % 16 * 2 + 1;
  for (size_t i = 0; i < 32; ++i) {
    const size_t lane = first + (turn + i * stride) % 32;
    if (lane >= threads || fibers[lane]->state != State::ready) continue;
    switch_to(fibers[lane].get());
    if (failed) return false;
  }
  const size_t last = std::min(first + 32, threads);
  const Fiber* at = nullptr;
  bool all = true;
  for (size_t i = first; i < last; ++i) {
    if (fibers[i]->state == State::at_collective) at = fibers[i].get();
    all &= fibers[i]->state != State::waits;
  }
  if (at == nullptr || !all) return true;
  void* arguments[32];
  for (size_t i = first; i < last; ++i) {
    const Fiber& f = *fibers[i];
    if (f.state != State::at_collective || f.op != at->op || !(f.site == at->site))
      return report(*at, "is in a warp operation", &f);
    arguments[i - first] = f.argument;
  }
  if (last - first != 32) return report(*at, "is in a warp operation of a part of a warp", nullptr);
  at->op(arguments);
  for (size_t i = first; i < last; ++i) fibers[i]->state = State::ready;
  return true;
}

bool finish_block() {
  if (const char* left = left_by_block()) return report(*fibers[0], left, nullptr);
  return true;
}

bool run_block(std::mt19937_64& random, bool starve) {
  const size_t warps = (threads + 31) / 32;
  std::vector<uint64_t> priority(warps);
  for (uint64_t& p : priority) p = random();
  for (;;) {
    if (copies_under_way() && random() % 4 == 0) finish_copy(random);
    for (size_t i = 0; i < threads; ++i) {
      Fiber& f = *fibers[i];
      if (f.state == State::waits && f.until(f.argument)) f.state = State::ready;
    }
    const Fiber* ended = nullptr;
    const Fiber* waits = nullptr;
    std::vector<size_t> ready;
    for (size_t w = 0; w < warps; ++w) {
      const Fiber& f = *fibers[w * 32];
      const auto begin = fibers.begin() + long(w * 32);
      const auto end = fibers.begin() + long(std::min(w * 32 + 32, threads));
      if (std::any_of(begin, end, [](const auto& o) { return o->state == State::ready; })) {
        ready.push_back(w);
      } else {
        (f.state == State::done ? ended : waits) = &f;
      }
    }
    if (!ready.empty()) {
      const size_t drawn = ready[random() % ready.size()];
      const size_t ahead = *std::max_element(ready.begin(), ready.end(), [&](size_t a, size_t b) {
        return priority[a] < priority[b];
      });
      if (!step((starve ? ahead : drawn) * 32, random)) return false;
      continue;
    }
    if (copies_under_way() && waits != nullptr) {
      finish_copy(random);
      continue;
    }
    if (waits == nullptr) return finish_block();
    for (size_t i = 0; i < threads; ++i)
      if (fibers[i]->state == State::waits)
        return report(*fibers[i], "waits for what never comes", nullptr);
    for (size_t i = 0; i < threads; ++i)
      if (fibers[i]->state != State::at_barrier || !(fibers[i]->site == waits->site))
        return report(*waits, "waits at a barrier", fibers[i].get());
    for (size_t i = 0; i < threads; ++i) fibers[i]->state = State::ready;
  }
}

}  // namespace

void fail(Site here, const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  running->site = here;
  report(*running, text, nullptr);
  running->state = State::done;
  switch_to(nullptr);
  std::abort();
}

unsigned char* dynamic_shared() { return shared; }
uint32_t dynamic_shared_bytes() { return uint32_t(shared_bytes); }

unsigned char* shared_at(uint32_t address, uint32_t bytes, Site here) {
  if (address % bytes) fail(here, "misaligned shared address %u, %u bytes", address, bytes);
  if (uint64_t(address) + bytes > shared_bytes)
    fail(here, "shared address %u, %u bytes: the launch has %zu", address, bytes, shared_bytes);
  return shared + address;
}

void release(void* tag) {
  if (__tsan_release) __tsan_release(tag);
}
void acquire(void* tag) {
  if (__tsan_acquire) __tsan_acquire(tag);
}

void wait_until(bool (*ready)(const void*), const void* what, Site here) {
  running->until = ready;
  running->argument = const_cast<void*>(what);
  if (!ready(what)) wait(State::waits, here);
}

void barrier(Site here) {
  uint64_t* const tag = &of_block[running->barriers++ % 2];
  if (__tsan_release) __tsan_release(tag);
  wait(State::at_barrier, here);
  if (__tsan_acquire) __tsan_acquire(tag);
}

void collective(WarpOp op, void* argument, bool orders, Site here) {
  running->op = op;
  running->argument = argument;
  uint64_t* tag = nullptr;
  if (orders) {
    Fiber& first = *fibers[running->thread.thread.x / 32 * 32];
    tag = &first.of_warp[running->ordering++ % 2];
  }
  if (tag && __tsan_release) __tsan_release(tag);
  wait(State::at_collective, here);
  if (tag && __tsan_acquire) __tsan_acquire(tag);
}

void begin_copy(const Copy& copy, Site here) {
  running->site = here;
  running->copies.push_back(copy);
  ++running->open;
}

void close_copy_group() {
  running->groups.push_back(running->open);
  running->open = 0;
}

bool next_copy(int groups, Copy& copy) {
  Fiber& f = *running;
  while (f.groups.size() - f.first_group > size_t(groups)) {
    if (f.groups[f.first_group]-- > 0) {
      copy = f.copies[f.first_copy++];
      return true;
    }
    ++f.first_group;
  }
  return false;
}

bool launch(dim3 grid, dim3 block, size_t bytes, uint64_t seed,
            const std::function<void()>& kernel) {
  static char* const stacks =
      static_cast<char*>(mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  threads = size_t(block.x) * block.y * block.z;
  failed = false;
  message.clear();
  if (threads > kMaxThreads || bytes > 227 * 1024) {
    message = "the launch has more threads or shared memory than a GPU";
    return false;
  }
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack = stacks + (fibers.size() - 1) * kStack;
  }
  std::mt19937_64 random(seed);
  body = &kernel;
  main_stack = nullptr;
  main_tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  shared_bytes = bytes;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  for (size_t b = 0; b < blocks && !failed; ++b) {
    // New for every block, of the exact size: the address sanitizer guards its end.
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 128, std::max<size_t>(bytes, 1)) != 0) std::abort();
    shared = static_cast<unsigned char*>(fresh);
    std::memset(shared, 0xff, bytes);  // NaN in every float format
    if (__tsan_release) __tsan_release(&body);
    for (size_t i = 0; i < threads; ++i) {
      fibers[i]->thread = {
          {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)},
          {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)},
          block,
          grid,
          int(i % 32)};
      start(*fibers[i]);
    }
    begin_async(threads);
    run_block(random, seed % 2 == 1);
    if (__tsan_acquire) __tsan_acquire(&body);
    if (__tsan_destroy_fiber)
      for (size_t i = 0; i < threads; ++i) __tsan_destroy_fiber(fibers[i]->tsan);
    std::free(shared);
  }
  return !failed;
}

const char* error() { return message.c_str(); }

}  // namespace emulator
