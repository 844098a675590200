// Entry points for ctypes: the launches of csrc/cuda/group_norm_silu.cu, on the emulator.
#include "emulator.h"
// The kernels, by the same file nvcc compiles.
#include "group_norm_silu.cuh"

using namespace vitkit;
using namespace vitkit::group_norm;

namespace {

template <typename F>
bool with_types(int element, bool silu, bool packed, F&& f) {
  const auto with_element = [&](auto* e) {
    using T = std::remove_pointer_t<decltype(e)>;
    const auto with_pack = [&](auto pack) {
      return silu ? f(e, std::true_type{}, pack) : f(e, std::false_type{}, pack);
    };
    if (packed) return with_pack(std::integral_constant<int, kFullPack<T>>{});
    return with_pack(std::integral_constant<int, 1>{});
  };
#ifndef EMULATED_F32_ONLY  // mutants make do with one dtype
  if (element == 1) return with_element(static_cast<__nv_bfloat16*>(nullptr));
  if (element == 2) return with_element(static_cast<__half*>(nullptr));
#endif
  return element == 0 && with_element(static_cast<float*>(nullptr));
}

dim3 part_blocks(const Params& p, bool columns, int pack) {
  if (!columns) return dim3(unsigned(p.samples * p.channels), unsigned(p.parts));
  return dim3(unsigned((p.channels / pack + kWarp - 1) / kWarp), unsigned(p.parts),
              unsigned(p.samples));
}

}  // namespace

extern "C" {

struct Call {
  Params params;
  SmallGradients small;
  int element;
  bool silu, packed, columns, by_group, cached;
  uint64_t seed;
};

const char* emulated_error() { return emulator::error(); }
size_t emulated_call_size() { return sizeof(Call); }

bool emulated_forward(const Call* call) {
  const Params& p = call->params;
  const uint64_t seed = call->seed;
  return with_types(call->element, call->silu, call->packed, [&](auto* e, auto silu, auto pack) {
    using T = std::remove_pointer_t<decltype(e)>;
    constexpr bool kSilu = decltype(silu)::value;
    constexpr int kPack = decltype(pack)::value;
    const unsigned groups = unsigned(p.samples * p.groups);
    if (call->by_group) {
      const size_t bytes = call->cached ? size_t(p.per_group() * p.positions) * sizeof(T) : 0;
      return emulator::launch(groups, kThreads, bytes, seed, [&] {
        group_norm_silu_fwd_kernel<T, kSilu, kPack>(p, call->cached);
      });
    }
    const dim3 blocks = part_blocks(p, call->columns, kPack);
    return emulator::launch(blocks, kThreads, 0, seed,
                            [&] {
                              if (call->columns) {
                                column_statistics_kernel<T, kPack>(p);
                              } else {
                                row_statistics_kernel<T, kPack>(p);
                              }
                            }) &&
           emulator::launch(groups, kThreads, 0, seed, [&] { merge_statistics_kernel(p); }) &&
           emulator::launch(blocks, kThreads, 0, seed, [&] {
             if (call->columns) {
               apply_fwd_kernel<T, kSilu, kPack, true>(p);
             } else {
               apply_fwd_kernel<T, kSilu, kPack, false>(p);
             }
           });
  });
}

bool emulated_backward(const Call* call) {
  const Params& p = call->params;
  const uint64_t seed = call->seed;
  return with_types(call->element, call->silu, call->packed, [&](auto* e, auto silu, auto pack) {
    using T = std::remove_pointer_t<decltype(e)>;
    constexpr bool kSilu = decltype(silu)::value;
    constexpr int kPack = decltype(pack)::value;
    const dim3 blocks = part_blocks(p, call->columns, kPack);
    return emulator::launch(blocks, kThreads, 0, seed,
                            [&] {
                              if (call->columns) {
                                column_sums_kernel<T, kSilu, kPack>(p);
                              } else {
                                row_sums_kernel<T, kSilu, kPack>(p);
                              }
                            }) &&
           emulator::launch(unsigned(p.samples * p.groups), kThreads, 0, seed,
                            [&] { merge_sums_kernel(p); }) &&
           emulator::launch(blocks, kThreads, 0, seed,
                            [&] {
                              if (call->columns) {
                                apply_bwd_kernel<T, kSilu, kPack, true>(p);
                              } else {
                                apply_bwd_kernel<T, kSilu, kPack, false>(p);
                              }
                            }) &&
           emulator::launch(unsigned((p.channels + kThreads - 1) / kThreads), kThreads, 0, seed,
                            [&] { small_gradients_kernel(p, call->small); });
  });
}
}
