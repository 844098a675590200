// Token map of window attention. The places of a window are its keys; those that hold a token are
// its queries too. Where they lie is computed once per window and shared by its heads.
#pragma once

#include "attention/arena.h"
#include "attention/pack.h"
#include "attention/token_map.h"
#include "attention/window_table.h"

namespace vitkit::cpu::VITKIT_ISA {

constexpr float kMask = -100.f;  // additive, as every published checkpoint was trained with it
constexpr int kRegions = 4;      // at most, in one window

struct WindowQuery {
  int64_t place, token;  // place in the window; token of the whole batch
  int64_t bias;          // where its run of the unfolded table begins
  const float* mask;     // of all places; null where all are in its region
};

class Window {
 public:
  int64_t queries;
  const int64_t* qkv;  // of each place, from the start of the tensor; -1: no token
  const WindowQuery* query;

  Window(Arena& arena, const WindowInputs& in)
      : queries(0),
        in_(in),
        mask_stride_(round_up(in.grid.places(), kPanel) + kPanel),
        qkv_(arena.take<int64_t>(in.grid.places())),
        query_(arena.take<WindowQuery>(in.grid.places())),
        mask_(arena.take<float>(kRegions * mask_stride_)) {
    qkv = qkv_;
    query = query_;
  }

  int64_t places() const { return in_.grid.places(); }
  bool has_pads() const { return queries < places(); }

  // Window `index` of the batch * windows windows.
  void move_to(int64_t index) {
    const WindowGrid& g = in_.grid;
    const int64_t b = index / g.windows(), wy = index % g.windows() / g.columns(),
                  wx = index % g.columns();
    const int64_t split_y = wy == g.rows() - 1 && g.sh ? g.wh - g.sh : g.wh;
    const int64_t split_x = wx == g.columns() - 1 && g.sw ? g.ww - g.sw : g.ww;
    const bool masked = split_y < g.wh || split_x < g.ww;
    if (masked) set_mask(split_y, split_x);
    queries = 0;
    int64_t place = 0;
    for (int64_t iy = 0; iy < g.wh; ++iy) {
      const int64_t y = source(wy * g.wh + iy, g.height, g.wh, g.sh);
      for (int64_t ix = 0; ix < g.ww; ++ix, ++place) {
        const int64_t x = source(wx * g.ww + ix, g.width, g.ww, g.sw);
        if (y < 0 || x < 0) {
          qkv_[place] = -1;
          continue;
        }
        qkv_[place] = b * in_.batch_stride + y * in_.y_stride + x * in_.x_stride;
        const int region = 2 * (iy >= split_y) + (ix >= split_x);
        query_[queries++] = {place, (b * g.height + y) * g.width + x, unfolded_row(g, iy, ix),
                             masked ? mask_ + region * mask_stride_ : nullptr};
      }
    }
  }

 private:
  // Token of a place of the shifted grid along one axis, -1 where there is none.
  int64_t source(int64_t place, int64_t size, int64_t window, int64_t shift) const {
    const int64_t padded = (size + window - 1) / window * window;
    const int64_t around = in_.grid.roll_first ? size : padded;
    if (place >= around) return -1;
    const int64_t from = place + shift < around ? place + shift : (place + shift) % around;
    return from < size ? from : -1;
  }

  void set_mask(int64_t split_y, int64_t split_x) {
    const WindowGrid& g = in_.grid;
    for (int region = 0; region < kRegions; ++region)
      for (int64_t iy = 0; iy < g.wh; ++iy)
        for (int64_t ix = 0; ix < g.ww; ++ix)
          mask_[region * mask_stride_ + iy * g.ww + ix] =
              2 * (iy >= split_y) + (ix >= split_x) == region ? 0.f : kMask * kLog2e;
  }

  const WindowInputs& in_;
  int64_t mask_stride_;
  int64_t* qkv_;
  WindowQuery* query_;
  float* mask_;
};

// Fetches the rows of the head that comes next, a place at a time: they lie in short runs that no
// hardware prefetcher foresees. Gradient: those of out and grad too.
template <typename T>
class WindowAhead {
 public:
  WindowAhead() = default;
  WindowAhead(const WindowInputs& in, const Window& window, int64_t h, const char* out = nullptr,
              const char* grad = nullptr)
      : window_(&window),
        places_(window.places()),
        rows_(reinterpret_cast<const T*>(in.qkv) + h * in.head_stride),
        part_stride_(in.part_stride),
        head_dim_(in.head_dim),
        out_stride_(in.heads * in.head_dim),
        out_(reinterpret_cast<const T*>(out) + (out ? h * in.head_dim : 0)),
        grad_(reinterpret_cast<const T*>(grad) + (grad ? h * in.head_dim : 0)) {}

  void fetch() {
    if (next_ == places_) return;
    const int64_t i = next_++;
    if (const int64_t at = window_->qkv[i]; at >= 0)
      for (int64_t part = 0; part < 3; ++part) fetch(rows_ + at + part * part_stride_);
    if (!grad_ || i >= window_->queries) return;
    fetch(out_ + window_->query[i].token * out_stride_);
    fetch(grad_ + window_->query[i].token * out_stride_);
  }

 private:
  void fetch(const T* row) const {
    constexpr int64_t kLine = 64 / int64_t(sizeof(T));
    for (int64_t d = 0; d < head_dim_; d += kLine) __builtin_prefetch(row + d);
  }

  const Window* window_ = nullptr;
  int64_t next_ = 0, places_ = 0;
  const T* rows_ = nullptr;
  int64_t part_stride_ = 0, head_dim_ = 0, out_stride_ = 0;
  const T *out_ = nullptr, *grad_ = nullptr;
};

// One head of a window.
template <typename T>
struct WindowMap {
  static constexpr bool causal = false;
  const Window* window;
  const T *q, *k, *v;  // of token 0
  const T *pad_k, *pad_v;
  WindowAhead<T>* ahead;
  T* out;  // of token 0
  float* lse_row;
  int64_t out_stride, heads;
  int64_t nq, nk;

  const T* q_row(int64_t i) const { return q + window->qkv[window->query[i].place]; }
  const T* k_row(int64_t j) const { return row(k, pad_k, j); }
  const T* v_row(int64_t j) const { return row(v, pad_v, j); }
  void fetch_ahead() const { ahead->fetch(); }
  T* out_row(int64_t i) const { return out + window->query[i].token * out_stride; }
  float* lse(int64_t i) const { return lse_row + window->query[i].token * heads; }
  static constexpr int64_t zero_keys(int64_t) { return 0; }

 private:
  const T* row(const T* rows, const T* pad, int64_t j) const {
    return window->qkv[j] < 0 ? pad : rows + window->qkv[j];
  }
};

template <typename T>
VITKIT_INLINE WindowMap<T> window_map(const WindowInputs& in, const Window& window, int64_t h,
                                      const char* out, const float* lse) {
  const auto part = [&](int64_t i) {
    return reinterpret_cast<const T*>(in.qkv) + i * in.part_stride + h * in.head_stride;
  };
  const auto pad = [&](int64_t i) {
    const T* values = reinterpret_cast<const T*>(in.pad_value);
    return values ? values + (i * in.heads + h) * in.head_dim : kZeroRow<T>;
  };
  WindowMap<T> map;
  map.window = &window;
  map.q = part(0);
  map.k = part(1);
  map.v = part(2);
  map.pad_k = pad(1);
  map.pad_v = pad(2);
  map.out = const_cast<T*>(reinterpret_cast<const T*>(out)) + h * in.head_dim;
  map.lse_row = const_cast<float*>(lse) + h;
  map.out_stride = in.heads * in.head_dim;
  map.heads = in.heads;
  map.nq = window.queries;
  map.nk = window.places();
  return map;
}

}  // namespace vitkit::cpu::VITKIT_ISA
