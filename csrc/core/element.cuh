// Tensors whose dtype is known when a kernel runs: weights, biases, modulations, and their
// gradients.
#pragma once

#include "pack.cuh"

namespace vitkit {

// boolean: only masks.
enum class Element : int { f32, bf16, f16, boolean };

inline int bytes_of(Element element) {
  return element == Element::f32 ? 4 : element == Element::boolean ? 1 : 2;
}

// f(null pointer of the element's type).
template <typename F>
auto with_element(Element element, F&& f) {
  if (element == Element::f32) return f(static_cast<float*>(nullptr));
  if (element == Element::bf16) return f(static_cast<__nv_bfloat16*>(nullptr));
  return f(static_cast<__half*>(nullptr));
}

// Rows of dense elements, `stride` elements apart. Data is null where the tensor is absent.
struct RowTensor {
  const void* data;
  Element element;
  int64_t stride;

  // Columns [column, column + kPack) of a row; `otherwise` without a tensor.
  template <int kPack>
  __device__ __forceinline__ void load(float (&v)[kPack], int64_t row, int column,
                                       float otherwise) const {
    if (data == nullptr) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) v[i] = otherwise;
    } else if (element == Element::f32) {
      load_as<float>(v, row * stride + column);
    } else if (element == Element::bf16) {
      load_as<__nv_bfloat16>(v, row * stride + column);
    } else {
      load_as<__half>(v, row * stride + column);
    }
  }
  __device__ __forceinline__ float at(int64_t row, int column, float otherwise) const {
    float v[1];
    load(v, row, column, otherwise);
    return v[0];
  }

  // Whether load() may take packs whose columns begin at multiples of 16 bytes of any element.
  bool takes_packs() const {
    return data == nullptr ||
           (reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes_of(element) % 16 == 0);
  }

 private:
  template <typename T, int kPack>
  __device__ __forceinline__ void load_as(float (&v)[kPack], int64_t at) const {
    constexpr int kStep = kPack < kFullPack<T> ? kPack : kFullPack<T>;
#pragma unroll
    for (int i = 0; i < kPack; i += kStep) {
      const auto part = Pack<T, kStep>::load(static_cast<const T*>(data) + at + i);
#pragma unroll
      for (int k = 0; k < kStep; ++k) v[i + k] = part.get(k);
    }
  }
};

// A gradient in the dtype of its tensor; nothing is stored where data is null.
struct SmallGradient {
  void* data;
  Element element;

  // At multiples of kPack of a fresh tensor.
  template <int kPack>
  __device__ __forceinline__ void store(int64_t at, const float (&v)[kPack]) const {
    if (data == nullptr) return;
    if (element == Element::f32) {
      store_as<float>(at, v);
    } else if (element == Element::bf16) {
      store_as<__nv_bfloat16>(at, v);
    } else {
      store_as<__half>(at, v);
    }
  }
  __device__ __forceinline__ void store(int64_t at, float value) const {
    const float v[1] = {value};
    store(at, v);
  }

 private:
  template <typename T, int kPack>
  __device__ __forceinline__ void store_as(int64_t at, const float (&v)[kPack]) const {
    constexpr int kStep = kPack < kFullPack<T> ? kPack : kFullPack<T>;
#pragma unroll
    for (int i = 0; i < kPack; i += kStep) {
      Pack<T, kStep> part;
#pragma unroll
      for (int k = 0; k < kStep; ++k) part.set(k, v[i + k]);
      part.store(static_cast<T*>(data) + at + i);
    }
  }
};

}  // namespace vitkit
