// vitkit._runtime: facts of this build. It links neither torch nor CUDA, so it can be imported
// anywhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "attention/hopper_rule.h"
#include "build_facts.h"
#include "kernel_attributes.h"

namespace py = pybind11;

namespace {

// Address, sizes and strides of [B, N, H, D].
using TensorFacts = std::tuple<uint64_t, std::array<int64_t, 4>, std::array<int64_t, 4>>;

vitkit::attention::HopperTensor hopper_tensor(const TensorFacts& facts) {
  const auto& [address, sizes, strides] = facts;
  vitkit::attention::HopperTensor t{address, {}, {}};
  std::copy(sizes.begin(), sizes.end(), t.sizes);
  std::copy(strides.begin(), strides.end(), t.strides);
  return t;
}

}  // namespace

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
      "why_not_hopper",
      [](bool built, int capability, int bytes_of_element, bool packed, bool with_bias,
         const TensorFacts& q, const TensorFacts& k,
         const TensorFacts& v) -> std::optional<std::string> {
        const char* reason = vitkit::attention::why_not_hopper(built, capability, bytes_of_element,
                                                               packed, with_bias, hopper_tensor(q),
                                                               hopper_tensor(k), hopper_tensor(v));
        return reason ? std::optional<std::string>(reason) : std::nullopt;
      },
      py::arg("built"), py::arg("capability"), py::arg("bytes_of_element"), py::arg("packed"),
      py::arg("with_bias"), py::arg("q"), py::arg("k"), py::arg("v"),
      "Why the forward pass of flash_attention does not take its kernel for Hopper GPUs, None if "
      "it does. Tensors are (address, sizes, strides) of [B, N, H, D].");
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
