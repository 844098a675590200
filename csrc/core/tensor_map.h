// Descriptions of tensors for the copies of boxes (hopper.cuh), made on the host.
//
// The driver's encoder is found at run time: nothing links libcuda, and encoding neither allocates
// nor waits, so that a launch can be captured into a graph.
#pragma once

#include <stdint.h>

namespace vitkit {

// A tensor of 16-bit elements by strides, columns dense, cut in boxes of `box_rows` rows of
// `box_columns` columns: 32, 64 or 128 bytes, which are also what is swizzled. Elements outside the
// sizes are read as zeros.
struct BoxedTensor {
  const void* data;
  int64_t columns, rows, heads, batch;
  int64_t row_stride, head_stride, batch_stride;  // in elements; not looked at where the size is 1
  int box_columns, box_rows;

  // In the order of coordinates: column, row, head, batch. A dimension of one has any stride, and
  // gets one that a map may have.
  void shape(uint64_t (&sizes)[4], uint64_t (&byte_strides)[3]) const {
    const int64_t all[4] = {columns, rows, heads, batch};
    const int64_t strides[3] = {row_stride, head_stride, batch_stride};
    for (int d = 0; d < 4; ++d) sizes[d] = uint64_t(all[d]);
    for (int d = 0; d < 3; ++d) byte_strides[d] = all[d + 1] == 1 ? 16 : uint64_t(strides[d]) * 2;
  }
};

}  // namespace vitkit

#ifdef VITKIT_EMULATED
#include "emulated_hopper.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

namespace vitkit {

using TensorMap = CUtensorMap;

// Null, or what went wrong.
inline const char* encode(TensorMap& map, const BoxedTensor& t) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &status);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    const bool ok = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encoder == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  cuuint64_t sizes[4], strides[3];
  uint64_t of_sizes[4], of_strides[3];
  t.shape(of_sizes, of_strides);
  for (int d = 0; d < 4; ++d) sizes[d] = of_sizes[d];
  for (int d = 0; d < 3; ++d) strides[d] = of_strides[d];
  const cuuint32_t box[4] = {cuuint32_t(t.box_columns), cuuint32_t(t.box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = t.box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : t.box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  // Bits are only moved: of the two formats of 16 bits, either will do.
  const CUresult result =
      encoder(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(t.data), sizes, strides,
              box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the tensor";
}

}  // namespace vitkit

#endif
