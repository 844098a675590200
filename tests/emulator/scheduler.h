// Between the scheduler and what of the emulated GPU runs beside the threads: hopper.cpp.
#pragma once

#include "emulator.h"

#include <random>

namespace emulator {

// Called by a fiber: it goes on once `ready(what)` is true.
void wait_until(bool (*ready)(const void*), const void* what, Site here);

// What the block of before left is forgotten.
void begin_async(size_t threads);
// A copy that is under way, drawn by `random`, arrives; false if there is none.
bool copies_under_way();
void finish_copy(std::mt19937_64& random);
// Null, or what a thread that ends, or a block, left behind.
const char* left_by_thread(size_t thread);
const char* left_by_block();

// Happens-before for the thread sanitizer, where it is linked in.
void release(void* tag);
void acquire(void* tag);

}  // namespace emulator
