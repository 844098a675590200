// What the stand-alone kernel drivers share: elements of any type, tensors with a canary behind
// them, random numbers, and the project's tolerance rule.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attention/params.h"
#include "simd.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace driver {

using vitkit::cpu::ElementType;
namespace isa = vitkit::cpu::VITKIT_ISA;

constexpr double kInf = std::numeric_limits<double>::infinity();
inline const char* const kTypeNames[] = {"f32", "bf16", "f16", "bool"};
constexpr double kEps[] = {0x1p-23, 0x1p-7, 0x1p-10};

inline size_t size_of(ElementType t) {
  return t == ElementType::f32 ? 4 : (t == ElementType::boolean ? 1 : 2);
}

inline double get(const char* p, ElementType t, int64_t i) {
  switch (t) {
    case ElementType::f32:
      return reinterpret_cast<const float*>(p)[i];
    case ElementType::bf16:
      return isa::to_float(reinterpret_cast<const isa::bf16*>(p)[i]);
    case ElementType::f16:
      return isa::to_float(reinterpret_cast<const isa::f16*>(p)[i]);
    case ElementType::boolean:
      return p[i];
  }
  std::abort();
}

inline void set(char* p, ElementType t, int64_t i, double x) {
  if (t == ElementType::f32) reinterpret_cast<float*>(p)[i] = float(x);
  if (t == ElementType::bf16) isa::from_float(float(x), reinterpret_cast<isa::bf16*>(p) + i);
  if (t == ElementType::f16) isa::from_float(float(x), reinterpret_cast<isa::f16*>(p) + i);
  if (t == ElementType::boolean) p[i] = x > 0;
}

inline double round_to(ElementType t, double x) {
  alignas(4) char buffer[4];
  set(buffer, t, 0, x);
  return get(buffer, t, 0);
}

inline uint64_t random_state = 1;
inline double uniform() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return double(random_state >> 11) * 0x1p-53;
}
inline double normal() {
  return std::sqrt(-2 * std::log(uniform() + 1e-300)) * std::cos(6.283185307179586 * uniform());
}

// Elements of any type with bytes behind them that must stay as they are.
class Array {
 public:
  Array(ElementType type, int64_t elements)
      : type(type), bytes_(size_t(elements) * size_of(type) + kCanary, char(0xa5)) {}
  template <typename Fill>
  Array(ElementType type, int64_t elements, const Fill& fill) : Array(type, elements) {
    for (int64_t i = 0; i < elements; ++i) set(i, fill());
  }

  char* data() { return bytes_.data(); }
  double at(int64_t i) const { return get(bytes_.data(), type, i); }
  void set(int64_t i, double x) { driver::set(bytes_.data(), type, i, x); }
  bool intact() const {
    for (size_t i = 1; i <= kCanary; ++i)
      if (bytes_[bytes_.size() - i] != char(0xa5)) return false;
    return true;
  }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

  ElementType type;

 private:
  static constexpr size_t kCanary = 64;
  std::vector<char> bytes_;
};

// Distances of a result from the exact one, in maximum and L2.
struct Error {
  double max = 0, square = 0, peak = 0, norm = 0;
  bool wrong = false;  // a NaN or infinity where there should be none, or the reverse

  void add(double got, double exact) {
    if (std::isnan(exact) || std::isinf(exact)) {
      wrong |= !(std::isnan(exact) ? std::isnan(got) : got == exact);
      return;
    }
    wrong |= !std::isfinite(got);
    const double d = std::fabs(got - exact);
    max = std::fmax(max, d);
    square += d * d;
    peak = std::fmax(peak, std::fabs(exact));
    norm += exact * exact;
  }

  // At most twice the error of the plain computation, plus rounding.
  bool within(const Error& plain, double eps, double terms) const {
    const double slack = eps + std::sqrt(terms) * 0x1p-23;
    return !wrong && max <= 2 * plain.max + slack * peak &&
           std::sqrt(square) <= 2 * std::sqrt(plain.square) + slack * std::sqrt(norm);
  }
};

// Memory that starts as NaN.
class Poisoned {
 public:
  explicit Poisoned(size_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {
    std::memset(data_, 0xff, bytes);
  }
  Poisoned(const Poisoned&) = delete;
  ~Poisoned() { std::free(data_); }
  char* get() const { return data_; }

 private:
  char* data_;
};

// Whether a result keeps the rule; says so if not.
inline bool report(const char* name, const Error& ours, const Error& plain, double eps,
                   double terms) {
  if (ours.within(plain, eps, terms)) return true;
  std::printf("  %s: max error %.3g (plain %.3g, largest value %.3g), L2 %.3g (plain %.3g)%s\n",
              name, ours.max, plain.max, ours.peak, std::sqrt(ours.square), std::sqrt(plain.square),
              ours.wrong ? ", NaN or infinity" : "");
  return false;
}

// Asks the operating system for the tile registers.
inline void request_tiles() {
#if defined(__AMX_BF16__) && defined(__linux__)
  syscall(SYS_arch_prctl, 0x1023, 18);
#endif
}

// Runs the cases whose name contains the argument, all without one; with --first-failure before it,
// up to the first that fails. Returns the exit code.
template <typename Run, typename Cases>
int run_all(int argc, char** argv, const Cases& cases) {
  request_tiles();
  const bool first_failure = argc > 1 && !std::strcmp(argv[1], "--first-failure");
  const std::string filter = argc > 1 + first_failure ? argv[1 + first_failure] : "";
  int run = 0, failed = 0;
  for (ElementType type : {ElementType::f32, ElementType::bf16, ElementType::f16})
    for (const auto& c : cases(type)) {
      if (c.name.find(filter) == std::string::npos) continue;
      ++run;
      if (Run(c).check()) continue;
      ++failed;
      std::printf("FAILED %s\n", c.name.c_str());
      if (first_failure) return 1;
    }
  std::printf("%d cases, %d failed\n", run, failed);
  return failed || !run;
}

}  // namespace driver
