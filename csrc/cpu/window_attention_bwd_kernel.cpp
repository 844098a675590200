// window_attention gradient: the windows of a part in turn, so that sums over windows need no
// atomics.
//
// Gradients of rows go straight to dqkv where they are final. Those that are not (Swin V2, where
// the direction of a row remains to be projected out, and windows with places without a token) are
// staged in float32.
#include "attention/backward_amx.h"
#include "attention/backward_float32.h"
#include "attention/window_term.h"

namespace vitkit::cpu::VITKIT_ISA {
namespace {

// What both maps of the gradient share.
template <typename T>
struct WindowGradMap : WindowMap<T> {
  const T* grad;  // of token 0
  int64_t head_dim;

  const T* grad_row(int64_t i, T*) const {
    return grad + this->window->query[i].token * this->out_stride;
  }
  float grad_lse(int64_t) const { return 0.f; }
  void prefetch_query(int64_t i) const {
    constexpr int64_t kLine = 64 / int64_t(sizeof(T));
    for (int64_t d = 0; d < head_dim; d += kLine) {
      __builtin_prefetch(this->q_row(i) + d);
      __builtin_prefetch(this->out_row(i) + d);
      __builtin_prefetch(grad_row(i, nullptr) + d);
    }
  }
};

// dqkv [B, H, W, 3, heads, D], every place of the window a token: place j is query j.
template <typename T>
struct FinalMap : WindowGradMap<T> {
  T* dqkv;  // of token 0

  T* dq_row(int64_t i) const { return row(i, 0); }
  T* dk_row(int64_t j) const { return row(j, 1); }
  T* dv_row(int64_t j) const { return row(j, 2); }

 private:
  T* row(int64_t j, int64_t part) const {
    return dqkv + (3 * this->window->query[j].token + part) * this->out_stride;
  }
};

template <typename T>
struct StagedMap : WindowGradMap<T> {
  float *dq, *dk, *dv;  // [places, D]

  float* dq_row(int64_t i) const { return dq + i * this->head_dim; }
  float* dk_row(int64_t j) const { return dk + j * this->head_dim; }
  float* dv_row(int64_t j) const { return dv + j * this->head_dim; }
};

// dx - x (x . dx) / |x|^2, the gradient through x / |x|; returns x . dx. Nothing is projected out
// where the norm was raised to its minimum.
template <typename T>
float project(const T* x, float* dx, int64_t n) {
  f32v product = {}, squares = {};
  each_vector(n, [&](int64_t d, auto count) {
    const f32v v = load_partial(x + d, count);
    product = fma(v, load_partial(dx + d, count), product);
    squares = fma(v, v, squares);
  });
  const float along = reduce_add(product), square = reduce_add(squares);
  if (__builtin_sqrtf(square) < kMinNorm) return along;
  const f32v factor = splat(along / square);
  each_vector(n, [&](int64_t d, auto count) {
    store_partial(dx + d, load_partial(dx + d, count) - load_partial(x + d, count) * factor, count);
  });
  return along;
}

template <typename Compute>
class Run {
 public:
  Run(const WindowBackward& p, char* scratch)
      : p_(p),
        arena_{scratch},
        compute_(arena_, p.in.head_dim, grid(places()).key_range),
        sums_(arena_.take<float>(Compute::sums_floats(p.in.head_dim, places(), places()))),
        windows_{Window(arena_, p.in), Window(arena_, p.in)} {
    if (p.in.logit_scale) cosine_ = CosineFactors(arena_, places());
    if (p.in.logit_scale || !p.in.grid.divides())
      staged_ = arena_.take<float>(3 * places() * p.in.head_dim);
    bytes = arena_.next - scratch;
  }

  // Heads [begin, end) of a part.
  void run(int64_t part, int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) clear(part, h);
    const int64_t windows = p_.in.batch * p_.in.grid.windows();
    const int64_t first = windows * part / p_.parts, last = windows * (part + 1) / p_.parts;
    windows_[first % 2].move_to(first);
    for (int64_t w = first; w < last; ++w) {
      const bool more = w + 1 < last;
      if (more) windows_[(w + 1) % 2].move_to(w + 1);
      for (int64_t h = begin; h < end; ++h) {
        WindowAhead<T> ahead;
        if (h + 1 < end || more)
          ahead = {p_.in, windows_[(h + 1 < end ? w : w + 1) % 2], h + 1 < end ? h + 1 : begin,
                   p_.out, p_.grad};
        differentiate(windows_[w % 2], part, h, &ahead);
      }
    }
  }

  int64_t bytes;

 private:
  using T = typename Compute::Element;

  int64_t places() const { return p_.in.grid.places(); }
  int64_t head_dim() const { return p_.in.head_dim; }
  int64_t head_at(int64_t part, int64_t h) const { return part * p_.in.heads + h; }
  float* dbias(int64_t part, int64_t h) const {
    return p_.sums.bias ? p_.sums.bias + head_at(part, h) * p_.in.bias_stride : nullptr;
  }
  float* dpad(int64_t part, int64_t h) const {
    return p_.sums.pad_value ? p_.sums.pad_value + head_at(part, h) * 2 * head_dim() : nullptr;
  }

  void clear(int64_t part, int64_t h) const {
    if (float* to = dbias(part, h)) std::memset(to, 0, size_t(p_.in.bias_stride) * sizeof(float));
    if (float* to = dpad(part, h)) std::memset(to, 0, size_t(2 * head_dim()) * sizeof(float));
    if (p_.sums.logit) p_.sums.logit[head_at(part, h)] = 0.f;
  }

  void differentiate(const Window& window, int64_t part, int64_t h, WindowAhead<T>* ahead) {
    WindowGradMap<T> map;
    static_cast<WindowMap<T>&>(map) = window_map<T>(p_.in, window, h, p_.out, p_.lse);
    map.ahead = ahead;
    map.grad = reinterpret_cast<const T*>(p_.grad) + h * head_dim();
    map.head_dim = head_dim();
    if (p_.in.logit_scale) cosine_.set(map, p_.in.logit_scale[h], head_dim());
    if (!p_.in.logit_scale && !window.has_pads()) {
      multiply(FinalMap<T>{map, reinterpret_cast<T*>(p_.dqkv) + h * head_dim()}, part, h);
      return;
    }
    const int64_t size = places() * head_dim();
    const StagedMap<T> staged{map, staged_, staged_ + size, staged_ + 2 * size};
    multiply(staged, part, h);
    finish_queries(staged, part, h);
    finish_keys(staged, part, h);
  }

  template <typename Map>
  void multiply(const Map& map, int64_t part, int64_t h) {
    const WindowTerm term{map.window, p_.in.bias + h * p_.in.bias_stride, cosine_};
    const WindowSink sink{map.window, dbias(part, h)};
    if (p_.in.logit_scale)
      multiply(map, term, CosineSink{sink, cosine_});
    else
      multiply(map, term, sink);
  }

  template <typename Map, typename Sink>
  void multiply(const Map& map, const WindowTerm& term, const Sink& sink) {
    const BackwardGrid g = grid(map.nq);
    compute_.attach(sums_, map.nq, map.nk);
    const Backward<Compute, Map, WindowTerm, Sink> backward(map, term, sink, p_.in.scale, compute_);
    for (int64_t step = 0; step < g.steps(); ++step)
      for (int64_t lane = 0; lane < g.lanes(); ++lane) backward.run(g, Cell(g, step, lane));
  }

  BackwardGrid grid(int64_t queries) const {
    BackwardGrid g = backward_grid<Compute>(head_dim(), false, queries, places());
    if (!p_.in.logit_scale) return g;
    g.key_range = round_up(places(), Compute::kKeyStep);  // CosineSink: all keys in one cell
    g.key_ranges = 1;
    return g;
  }

  T* dqkv_row(int64_t token, int64_t part_of_row, int64_t h) const {
    return reinterpret_cast<T*>(p_.dqkv) +
           ((3 * token + part_of_row) * p_.in.heads + h) * head_dim();
  }

  void finish_queries(const StagedMap<T>& map, int64_t part, int64_t h) const {
    float along = 0.f;
    for (int64_t i = 0; i < map.nq; ++i) {
      if (p_.in.logit_scale) along += project(map.q_row(i), map.dq_row(i), head_dim());
      write_row(map.dq_row(i), head_dim(), 1.f, dqkv_row(map.window->query[i].token, 0, h));
    }
    const bool clamped = p_.in.logit_scale && p_.in.logit_scale[h] > kMaxLogitScale;
    if (p_.sums.logit && !clamped) p_.sums.logit[head_at(part, h)] += along;
  }

  void finish_keys(const StagedMap<T>& map, int64_t part, int64_t h) const {
    float* pad = dpad(part, h);
    for (int64_t j = 0, i = 0; j < map.nk; ++j) {
      if (p_.in.logit_scale) project(map.k_row(j), map.dk_row(j), head_dim());
      if (map.window->qkv[j] >= 0) {
        const int64_t token = map.window->query[i++].token;
        write_row(map.dk_row(j), head_dim(), 1.f, dqkv_row(token, 1, h));
        write_row(map.dv_row(j), head_dim(), 1.f, dqkv_row(token, 2, h));
      } else if (pad) {
        add_row(map.dk_row(j), pad);
        add_row(map.dv_row(j), pad + head_dim());
      }
    }
  }

  void add_row(const float* from, float* to) const {
    each_vector(head_dim(), [&](int64_t d, auto count) {
      store_partial(to + d, load_partial(to + d, count) + load_partial(from + d, count), count);
    });
  }

  const WindowBackward& p_;
  Arena arena_;
  Compute compute_;
  float* sums_;
  Window windows_[2];  // the present one and the next
  CosineFactors cosine_;
  float* staged_ = nullptr;
};

// f(Gradient*) with the arithmetic for a type.
template <typename F>
auto dispatch(ElementType type, const F& f) {
  switch (type) {
    case ElementType::f32:
      return f(static_cast<Float32Gradient<float>*>(nullptr));
    case ElementType::bf16:
#if defined(VITKIT_AMX)
      return f(static_cast<AmxGradient*>(nullptr));
#else
      return f(static_cast<Float32Gradient<bf16>*>(nullptr));
#endif
    case ElementType::f16:
      return f(static_cast<Float32Gradient<f16>*>(nullptr));
    case ElementType::boolean:
      break;
  }
  __builtin_trap();
}

int64_t scratch_bytes(const WindowBackward& p) {
  return dispatch(p.in.type, [&](auto* compute) {
    return Run<std::remove_pointer_t<decltype(compute)>>(p, nullptr).bytes;
  });
}

void run(const WindowBackward& p, int64_t begin, int64_t end, void* scratch) {
  const FlushDenormals flush;
#if defined(VITKIT_AMX)
  const TileUnit unit;
#endif
  dispatch(p.in.type, [&](auto* compute) {
    Run<std::remove_pointer_t<decltype(compute)>> windows(p, static_cast<char*>(scratch));
    for (int64_t item = begin; item < end;) {
      const int64_t h = item % p.in.heads, left = p.in.heads - h;
      const int64_t count = left < end - item ? left : end - item;
      windows.run(item / p.in.heads, h, h + count);
      item += count;
    }
  });
}

}  // namespace

const WindowBackwardKernels& window_backward_kernels() {
  static constexpr WindowBackwardKernels table{scratch_bytes, run};
  return table;
}

}  // namespace vitkit::cpu::VITKIT_ISA
