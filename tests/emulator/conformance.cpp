// The conformance program on the emulator. Its argument is the seed of the threads' order.
#include "emulator.h"
// The primitives, by the same file nvcc compiles.
#include "conformance.cuh"

int main(int count, char** arguments) {
  return vitkit::conformance::run({count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1});
}
