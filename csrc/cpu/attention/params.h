// What the host files of the attention ops hand to their kernels: plain data, no torch types, no
// instruction set.
#pragma once

#include <cstdint>

namespace vitkit::cpu {

enum class ElementType : int { f32 = 0, bf16 = 1, f16 = 2, boolean = 3 };

// Rows of head_dim consecutive elements; strides in elements. Packed sequences have batch_stride 0.
struct RowsView {
  char* data;
  int64_t batch_stride, token_stride, head_stride;
};

// One float32 per query of each head.
struct LseView {
  const float* data;
  int64_t batch_stride, head_stride, query_stride;
};

// Added to the scaled scores (floating types) or true where a key may be attended (boolean). A
// stride is 0 where the tensor broadcasts. data is null without bias.
struct BiasView {
  const char* data;
  ElementType type;
  int64_t batch_stride, head_stride, query_stride, key_stride;
};

// Added to the score of query i and key ih * width + iw: rel_h[b, h, i, ih] + rel_w[b, h, i, iw].
// rel_h is null without it. The last dimensions are dense.
struct DecomposedView {
  const char *rel_h, *rel_w;
  ElementType type;
  int64_t h_batch_stride, h_head_stride, h_query_stride;
  int64_t w_batch_stride, w_head_stride, w_query_stride;
  int64_t height, width;
};

// Added to a score: -slopes[h] times the distance of its query and key. Of each batch element the x
// coordinates of all tokens, then from `plane` on the y coordinates, readable a little beyond their
// end. slopes is null without it.
struct DistanceView {
  const float *slopes, *q, *k;
  int64_t q_batch_stride, q_plane, k_batch_stride, k_plane;
};

// `batch` problems of `heads` heads. Dense: problem b is batch element b with nq queries and nk
// keys. Packed: problem b has queries [starts_q[b], starts_q[b + 1]) and keys [starts_k[b],
// starts_k[b + 1]); the host has made both non-decreasing and kept them inside the tensors.
struct AttentionInputs {
  ElementType type;  // of q, k, v and of what has their shape
  RowsView q, k, v;
  BiasView bias;
  int64_t batch, heads, nq, nk, head_dim;
  const int64_t* starts_q;  // null: dense
  const int64_t* starts_k;
  float scale;
  bool causal;  // query i attends keys j <= i
  DecomposedView decomposed{};
  DistanceView distance{};
};

}  // namespace vitkit::cpu
