// Parameters of the patch_embed kernels, shared by the host files and every instruction set.
//
// A patch is channels x frames x rows lines of `run` neighbouring elements. Where the channels of a
// pixel are neighbours (channels_last, decoded bytes), a line holds them too: channels is 1 and run
// is columns times channels. `depth` is the number of elements of a patch, in that order; `order`
// says which element of a weight's row each of them meets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "place_columns.h"

namespace vitkit::cpu {

enum class PatchElement : int { f32 = 0, bf16 = 1, f16 = 2, u8 = 3 };

// A [rows, embed] tensor without gaps; data is null without it.
struct TokenRows {
  const char* data;
  PatchElement type;
};

struct PatchEmbed {
  PatchElement pixels, type;  // of the images; of weight, tokens and gradients
  const char* images;
  int64_t pixel_count;  // elements that may be read from `images` on
  int64_t channels, frames, rows, run, depth;
  int64_t image_stride, channel_stride, frame_stride, row_stride;
  int64_t grid_frames, grid_rows, grid_columns;
  int64_t size_frames, size_rows, size_columns;  // of an image; columns in elements of a line
  const int64_t* places;                         // [tokens, kPlaceColumns]; null: dense
  int64_t batch, patches, prefixes;              // images, patches of each, tokens before them
  int64_t embed;

  // Of uint8 pixels, by element of a patch; null for others. A pixel enters the product as x -
  // centre, one beyond the image as padding; weights are multiplied by factor, sums by scale.
  const float *centre, *padding, *factor, *offset;
  float scale;
  const int64_t* order;  // null: the weight's own order

  const char* weight;                    // [embed, depth]
  const float* bias;                     // [embed] or null
  const float *norm_weight, *norm_bias;  // [embed], without LayerNorm null
  float norm_eps;
  TokenRows position, prefix;
  bool position_of_prefix;  // the first rows of position are those of the prefix

  int64_t tokens() const { return batch * patches; }
  int64_t out_rows() const { return patches + prefixes; }
};

struct PatchForward {
  PatchEmbed in;
  char* out;            // [batch, prefixes + patches, embed]
  const void* weights;  // as pack_weight left them
  const float* shift;   // [embed]
  int64_t block_rows;   // tokens of a block
};

struct PatchBackward {
  PatchEmbed in;
  const char* grad;     // like the output
  const void* weights;  // as pack_weight_float32 left them: LayerNorm only
  const float* shift;
  const float* panels;  // as pack_weight_rows left them: gradient of the images only
  float* dz;            // [tokens, embed], gradient of the projection: LayerNorm only
  char* dimages;        // like the images, or null
  float* norm_partial;  // [row_parts, 2, embed]
  int64_t row_parts;
  float* dweight;     // [parts, even embed, whole panels of depth]
  float* dbias;       // [parts, embed]
  int64_t parts;      // that the tokens are cut into for the weight's gradient
  char* dweight_out;  // [embed, depth] in the weight's own order
  const float* dbias_sum;
  float* drows;  // sums of grad over images by row of an image, or by row of position (packed)
};

// Each function handles items [begin, end) of its own kind of work.
struct PatchKernels {
  // One item: the weights of one panel. Also the shift of its columns.
  int64_t (*weight_panels)(const PatchEmbed&);
  size_t (*weight_bytes)(const PatchEmbed&);
  void (*pack_weight)(const PatchEmbed&, void* weights, float* shift, int64_t begin, int64_t end);
  // One item: a block of tokens. Blocks have at most most_rows of them, a multiple of row_step.
  int64_t most_rows, row_step;
  size_t (*scratch_bytes)(const PatchForward&);
  void (*forward)(const PatchForward&, int64_t begin, int64_t end, void* scratch);
};

struct PatchBackwardKernels {
  int64_t (*weight_panels)(const PatchEmbed&);
  size_t (*weight_bytes)(const PatchEmbed&);
  void (*pack_weight_float32)(const PatchEmbed&, void* weights, float* shift, int64_t begin,
                              int64_t end);
  // One item: a row of the weight.
  size_t (*rows_bytes)(const PatchEmbed&);
  void (*pack_weight_rows)(const PatchEmbed&, float* panels, int64_t begin, int64_t end);
  // One item: a part of the tokens. Gradients of the projection and of the images.
  size_t (*gradient_scratch_bytes)(const PatchBackward&);
  void (*gradient_rows)(const PatchBackward&, int64_t begin, int64_t end, void* scratch);
  // One item: a tile of the weight's gradient over a part of the tokens.
  int64_t (*weight_tiles)(const PatchEmbed&);
  size_t (*dweight_bytes)(const PatchEmbed&);  // of one part
  size_t (*weight_scratch_bytes)(const PatchBackward&);
  void (*weight_gradient)(const PatchBackward&, int64_t begin, int64_t end, void* scratch);
  // One item: a row of the weight's gradient. Adds the parts.
  void (*finish_weight)(const PatchBackward&, int64_t begin, int64_t end);
  // One item: a row of an image's tokens; packed: sum_columns columns of every token.
  void (*sum_rows)(const PatchBackward&, int64_t begin, int64_t end);
  int64_t block_rows;  // tokens of a block of gradient_rows
  int64_t sum_columns;
};

}  // namespace vitkit::cpu
