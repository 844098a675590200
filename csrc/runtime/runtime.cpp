// vitkit._runtime: facts of this build. It links neither torch nor CUDA, so it can be imported
// anywhere.
#include <pybind11/pybind11.h>

#include "build_facts.h"
#include "kernel_attributes.h"

namespace py = pybind11;

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "Facts of vitkit's native build.";
  m.def(
      "build_facts", [] { return py::module_::import("json").attr("loads")(VITKIT_BUILD_FACTS); },
      "Compiler, nvcc, CPU instruction sets and CUDA architectures this build contains, and what "
      "is missing and why.");
  m.def(
      "kernel_attributes",
      [] { return py::module_::import("json").attr("loads")(VITKIT_KERNEL_ATTRIBUTES); },
      "What the compiler made of the CUDA kernels: a list of source, kernel, architecture, number "
      "of instantiations, fewest and most registers, bytes spilled, bytes of static shared "
      "memory.");
  m.def(
      "cpu_features",
      [] {
        py::dict features;
#if defined(__x86_64__)
        __builtin_cpu_init();
        features["avx2"] = bool(__builtin_cpu_supports("avx2"));
        features["fma"] = bool(__builtin_cpu_supports("fma"));
        features["avx512f"] = bool(__builtin_cpu_supports("avx512f"));
        features["avx512bw"] = bool(__builtin_cpu_supports("avx512bw"));
        features["avx512bf16"] = bool(__builtin_cpu_supports("avx512bf16"));
#endif
        return features;
      },
      "CPU features the kernels look at, by name.");
}
