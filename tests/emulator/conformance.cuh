// Every primitive of csrc/core on seeded random bits: one program for the emulator and for a GPU,
// whose outputs must agree (tests/conformance.py).
//
// Products are taken of small integers, whose sums are exact in any order, and of fractions, where
// the order of a tensor core's sums is its own. Prints JSON.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "conformance_hopper.cuh"
#include "launch_kernel.cuh"
#include "reduce.cuh"

namespace vitkit::conformance {

template <bool kTransposed>
__global__ void load_matrices_kernel(const __grid_constant__ Params p) {
  VITKIT_DYNAMIC_SHARED(memory);
  unsigned char* const row = memory + threadIdx.x * 16;
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = random_word(p, i);
    memcpy(row + i * 4, &w, 4);
  }
  __syncwarp();
  uint32_t r[4];
  if constexpr (kTransposed) {
    ptx::load_matrices_transposed(r, ptx::shared_address(row));
  } else {
    ptx::load_matrices(r, ptx::shared_address(row));
  }
  Output out(p);
  for (const uint32_t w : r) out.word(w);
}

template <typename T, bool kWhole>
__global__ void multiply_kernel(const __grid_constant__ Params p) {
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 6; ++i) {
    uint32_t& to = i < 4 ? a[i] : b[i - 4];
    const uint32_t w = random_word(p, i);
    if constexpr (sizeof(T) == 4) {
      const float x = small_number(w, kWhole);
      memcpy(&to, &x, 4);
      to |= w >> 20;  // bits that a tensor core must not read
    } else {
      to = pack_pair<T>(small_number(w, kWhole), small_number(w >> 11, kWhole));
    }
  }
  for (int i = 0; i < 4; ++i) d[i] = small_number(random_word(p, 6 + i), kWhole);
  if constexpr (sizeof(T) == 4) {
    ptx::multiply_tf32_1688(d, a, b);
  } else {
    ptx::multiply_16816<T>(d, a, b);
  }
  Output out(p);
  for (const float x : d) out.number(x);
}

// Fragments of a tile, and their products.
template <typename T>
__global__ void tile_kernel(const __grid_constant__ Params p) {
  using M = Mma<T>;
  constexpr int kColumns = 48;
  VITKIT_DYNAMIC_SHARED(memory);
  const SharedTile<T, kColumns> tile{memory};
  for (int i = int(threadIdx.x); i < 32 * kColumns; i += kThreads)
    from_float(small_number(p.in[i % kInputs], true), tile.at(i / kColumns, i % kColumns));
  __syncthreads();
  const auto a = M::load_a(tile, 16, 32);
  const auto rows = M::load_rows(tile, 16, 32);
  float d[2][4] = {}, e[2][4] = {};
  M::multiply(d, a, rows);
  const auto a_columns = M::load_a_columns(tile, 16, 32);
  const auto columns = M::load_columns(tile, 16, 16);
  M::multiply(e, a_columns, columns);
  Output out(p);
  out.bits(a);
  out.bits(rows);
  out.bits(a_columns);
  out.bits(columns);
  out.bits(d);
  out.bits(e);
}

// Two groups of copies; odd threads copy zeros.
static __global__ void copy_kernel(const __grid_constant__ Params p) {
  VITKIT_DYNAMIC_SHARED(memory);
  const uint32_t thread = threadIdx.x, to = ptx::shared_address(memory) + thread * 16;
  ptx::copy_async(to, p.in + thread * 4, thread % 2 == 0);
  ptx::copy_commit();
  ptx::copy_async(to + kThreads * 16, p.in + (kThreads + thread) * 4, thread % 2 == 0);
  ptx::copy_commit();
  ptx::copy_wait<1>();
  __syncthreads();
  Output out(p);
  const uint32_t other = (thread + 37) % kThreads;
  uint32_t w[4];
  memcpy(w, memory + other * 16, 16);
  for (const uint32_t i : w) out.word(i);
  ptx::copy_wait<0>();
  __syncthreads();
  memcpy(w, memory + (kThreads + other) * 16, 16);
  for (const uint32_t i : w) out.word(i);
}

static __global__ void shuffle_kernel(const __grid_constant__ Params p) {
  const uint32_t w = random_word(p, 0);
  Output out(p);
  out.word(__shfl_xor_sync(0xffffffffu, w, 1));
  out.word(__shfl_xor_sync(0xffffffffu, w, 18));
  out.word(__shfl_down_sync(0xffffffffu, w, 5));
  out.word(__shfl_sync(0xffffffffu, w, int(threadIdx.x * 7)));
}

// Conversions of any bits, NaN and subnormal ones too.
static __global__ void convert_kernel(const __grid_constant__ Params p) {
  Output out(p);
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = random_word(p, i);
    Pack<__nv_bfloat16, 2> bf16;
    Pack<__half, 2> f16;
    memcpy(&bf16, &w, 4);
    memcpy(&f16, &w, 4);
    out.number(bf16.get(0));
    out.number(f16.get(1));
    out.word(pack_pair<__nv_bfloat16>(as_float(w), as_float(w ^ 0x80008000u)));
    // Half of the range of a float16, its subnormals too.
    const float near = as_float((w & 0x87ffffffu) | 0x30000000u);
    out.word(pack_pair<__half>(near, as_float(w)));
    out.word(ptx::to_tf32(as_float(w)));
  }
}

static __global__ void pack_kernel(const __grid_constant__ Params p) {
  Output out(p);
  const uint32_t* const from = p.in + threadIdx.x * 8;
  out.bits(Pack<__nv_bfloat16, 8>::load(reinterpret_cast<const __nv_bfloat16*>(from)));
  out.bits(Pack<float, 4>::load(reinterpret_cast<const float*>(from + 4)));
}

// Sums in their fixed order; fractions, whose rounding shows it.
static __global__ void sum_kernel(const __grid_constant__ Params p) {
  const float x = float(random_word(p, 0)) / 65536.f;
  Output out(p);
  out.number(warp_sum(x));
  out.number(block_sum<kThreads>(x));
  float v[2] = {x, -x * 0.5f};
  group_sum<16>(v);
  out.number(v[0]);
  group_sum<kThreads>(v);
  out.number(v[1]);
}

// What hardware approximates, and where it fuses a product and a sum.
static __global__ void approximate_kernel(const __grid_constant__ Params p) {
  Output out(p);
  out.number(ptx::exp2_approx(float(random_word(p, 0) % 4096) / 16.f - 150.f));  // to 2^106
  out.number(ptx::exp2_approx(threadIdx.x % 2 ? -INFINITY : 0.f));
  out.number(rsqrtf(small_number(random_word(p, 1), false) + 2.f));
  out.number(__expf(small_number(random_word(p, 2), true)));
  Moments m{1.f, small_number(random_word(p, 3), false), 0.f};
  m = block_moments<kThreads>(m);
  out.number(m.mean);
  out.number(m.m2);
}

// ---- the program ----

struct Primitive {
  const char* name;
  void (*kernel)(const Params);
  int words;
  // 0: every bit agrees. Otherwise of numbers: |difference| <= tolerance * max(1, |number|).
  double tolerance;
  bool hopper = false;  // for compute capability 9.0 alone
};

constexpr double kNear = 1. / (1 << 18);

static const Primitive kPrimitives[] = {
    {"load_matrices", &load_matrices_kernel<false>, 4, 0},
    {"load_matrices_transposed", &load_matrices_kernel<true>, 4, 0},
    {"multiply_bf16_integers", &multiply_kernel<__nv_bfloat16, true>, 4, 0},
    {"multiply_bf16_fractions", &multiply_kernel<__nv_bfloat16, false>, 4, kNear},
    {"multiply_f16_integers", &multiply_kernel<__half, true>, 4, 0},
    {"multiply_f16_fractions", &multiply_kernel<__half, false>, 4, kNear},
    {"multiply_tf32_integers", &multiply_kernel<float, true>, 4, 0},
    {"multiply_tf32_fractions", &multiply_kernel<float, false>, 4, kNear},
    {"tile_bf16", &tile_kernel<__nv_bfloat16>, 32, 0},
    {"tile_f16", &tile_kernel<__half>, 32, 0},
    {"tile_f32", &tile_kernel<float>, 40, 0},
    {"copies", &copy_kernel, 8, 0},
    {"shuffles", &shuffle_kernel, 4, 0},
    {"conversions", &convert_kernel, 20, 0},
    {"packs", &pack_kernel, 8, 0},
    {"sums", &sum_kernel, 4, 0},
    {"approximations", &approximate_kernel, 6, kNear},
    {"hopper_box_16", &hopper_box_kernel<0>, 4, 0, true},
    {"hopper_box_32", &hopper_box_kernel<1>, 8, 0, true},
    {"hopper_box_64", &hopper_box_kernel<2>, 16, 0, true},
    {"hopper_rows_bf16_16", &hopper_rows_kernel<__nv_bfloat16, 0>, 64, 0, true},
    {"hopper_rows_f16_32", &hopper_rows_kernel<__half, 1>, 64, 0, true},
    {"hopper_rows_bf16_64", &hopper_rows_kernel<__nv_bfloat16, 2>, 64, 0, true},
    {"hopper_columns_f16_80", &hopper_columns_kernel<__half, 0, 10>, 40, 0, true},
    {"hopper_columns_bf16_96", &hopper_columns_kernel<__nv_bfloat16, 1, 12>, 48, 0, true},
    {"hopper_columns_bf16_64", &hopper_columns_kernel<__nv_bfloat16, 2, 8>, 32, 0, true},
    {"hopper_columns_f16_128", &hopper_columns_kernel<__half, 2, 16>, 64, 0, true},
};

inline std::vector<uint32_t> random_bits() {
  std::vector<uint32_t> bits(kInputs);
  uint64_t state = 20240229;
  for (uint32_t& w : bits) {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    w = uint32_t((z ^ (z >> 31)) >> 16);
  }
  return bits;
}

// Where the program runs: memory of that place, and its name.
struct Place {
#ifdef VITKIT_EMULATED
  static uint32_t* make(size_t words, const uint32_t* from) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, words * 4) != 0) std::abort();
    if (from) std::memcpy(memory, from, words * 4);
    return static_cast<uint32_t*>(memory);
  }
  static void read(uint32_t* to, const uint32_t* from, size_t words) {
    std::memcpy(to, from, words * 4);
  }
  static std::string name() { return "emulator"; }
  static bool is_hopper() { return true; }
#else
  static uint32_t* make(size_t words, const uint32_t* from) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, words * 4));
    if (from) check(cudaMemcpy(memory, from, words * 4, cudaMemcpyHostToDevice));
    return static_cast<uint32_t*>(memory);
  }
  static void read(uint32_t* to, const uint32_t* from, size_t words) {
    check(cudaMemcpy(to, from, words * 4, cudaMemcpyDeviceToHost));
  }
  static std::string name() {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, 0));
    return properties.name;
  }
  static bool is_hopper() {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    return major == 9;
  }
  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(1);
  }
#endif
};

// The maps of Params, over numbers that `bits` become.
inline const char* encode_maps(Params& p, const std::vector<uint32_t>& bits) {
  for (int half = 0; half < 2; ++half) {
    std::vector<uint16_t> numbers(kNumberRows * kNumberColumns);
    for (size_t i = 0; i < numbers.size(); ++i) {
      const float x = small_number(bits[i * 7 % kInputs] >> 5, true);
      const __half f16 = __float2half_rn(x);
      const __nv_bfloat16 bf16 = __float2bfloat16_rn(x);
      std::memcpy(&numbers[i], half ? static_cast<const void*>(&f16) : &bf16, 2);
    }
    const uint32_t* const data =
        Place::make(numbers.size() / 2, reinterpret_cast<const uint32_t*>(numbers.data()));
    for (int width = 0; width < 3; ++width) {
      const BoxedTensor t{data, kNumberColumns, kNumberRows, 1, 1, kNumberColumns, 0,
                          0,    16 << width,    kBoxRows};
      if (const char* error = encode(p.maps[half][width], t)) return error;
    }
  }
  return nullptr;
}

constexpr int kSharedBytes = 34 * 1024;

inline int run(Stream stream) {
  const std::vector<uint32_t> bits = random_bits();
  Params p{Place::make(bits.size(), bits.data())};
  const char* const no_maps = Place::is_hopper() ? encode_maps(p, bits) : nullptr;
  if (no_maps) {
    std::fprintf(stderr, "%s\n", no_maps);
    return 1;
  }
  std::printf("{\"hardware\": \"%s\", \"primitives\": {", Place::name().c_str());
  const char* separator = "";
  for (const Primitive& primitive : kPrimitives) {
    if (primitive.hopper && !Place::is_hopper()) continue;
    const size_t words = size_t(kThreads) * size_t(primitive.words);
    std::vector<uint32_t> out(words, 0xdeadbeefu);
    p.out = Place::make(words, out.data());
    p.words = primitive.words;
    const char* error = launch_kernel(primitive.kernel, 1, kThreads, kSharedBytes, stream, p);
    if (error) {
      std::fprintf(stderr, "%s: %s\n", primitive.name, error);
      return 1;
    }
    Place::read(out.data(), p.out, words);
    std::printf("%s\n\"%s\": {\"tolerance\": %g, \"words\": \"", separator, primitive.name,
                primitive.tolerance);
    for (const uint32_t w : out) std::printf("%08x", w);
    std::printf("\"}");
    separator = ",";
  }
  std::printf("\n}}\n");
  return 0;
}

}  // namespace vitkit::conformance
