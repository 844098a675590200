// What the host file of window_attention and its kernels share.
#pragma once

#include "attention/params.h"

namespace vitkit::cpu {

// A map of height x width tokens cut into wh x ww windows, the grid of windows shifted by (sh, sw).
struct WindowGrid {
  int64_t height, width, wh, ww, sh, sw;
  bool roll_first;  // where the window does not divide the map: roll, then pad

  int64_t rows() const { return (height + wh - 1) / wh; }
  int64_t columns() const { return (width + ww - 1) / ww; }
  int64_t windows() const { return rows() * columns(); }
  int64_t places() const { return wh * ww; }  // of a window
  bool divides() const { return height % wh == 0 && width % ww == 0; }
};

struct WindowInputs {
  ElementType type;  // of qkv, pad_value, out and their gradients
  WindowGrid grid;
  int64_t batch, heads, head_dim;
  // qkv [B, H, W, 3, heads, D] with a dense last dimension.
  const char* qkv;
  int64_t batch_stride, y_stride, x_stride, part_stride, head_stride;
  const char* pad_value;     // [3, heads, D]; null: zeros
  const float* bias;         // the unfolded table of each head (window_table.h), in base-2 units
  int64_t bias_stride;       // of a head
  const float* logit_scale;  // [heads]; null: scores are scaled by `scale`
  float scale;
};

struct WindowForward {
  WindowInputs in;
  char* out;   // [B, H, W, heads * D]
  float* lse;  // [B, H, W, heads]
};

// An item is one head of one window; items are ordered by batch element, window, head. Any split of
// them over threads gives the same result.
struct WindowForwardKernels {
  int64_t (*scratch_bytes)(const WindowForward& p);
  void (*run)(const WindowForward& p, int64_t begin, int64_t end, void* scratch);
};

// Sums over windows are kept per part of the windows: `parts` ranges of equal length of the
// batch * windows windows, chosen from shapes alone. Null where there is no gradient.
struct WindowSums {
  float* bias;       // [parts, heads, bias_stride]: gradient of the unfolded table
  float* logit;      // [parts, heads]
  float* pad_value;  // [parts, heads, 2, D]: of k and v; q of a place without a token is not used
};

struct WindowBackward {
  WindowInputs in;
  const char *out, *grad;  // [B, H, W, heads * D]
  const float* lse;        // [B, H, W, heads]
  char* dqkv;              // [B, H, W, 3, heads, D]
  int64_t parts;
  WindowSums sums;
};

// An item is one head of one part, ordered by part, head; its sums are written, not added to.
struct WindowBackwardKernels {
  int64_t (*scratch_bytes)(const WindowBackward& p);
  void (*run)(const WindowBackward& p, int64_t begin, int64_t end, void* scratch);
};

}  // namespace vitkit::cpu
