// A structured bias for the attention drivers: its compact tensors as the kernels read them, and in
// double what they stand for and how a gradient of the scores reduces to them.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "driver.h"

namespace driver {

enum class Structure { none, decomposed, distance };

class StructuredBias {
 public:
  // Of [batch, heads, nq, nk] scores; the keys of a decomposed one are a grid of rows of `width`.
  StructuredBias(Structure kind, ElementType type, int64_t batch, int64_t heads, int64_t nq,
                 int64_t nk, int64_t width)
      : kind_(kind), heads_(heads), nq_(nq), nk_(nk), width_(width), height_(nk / width) {
    if (kind == Structure::decomposed) {
      rel_h_ = std::make_unique<Array>(type, batch * heads * nq * height_, normal);
      rel_w_ = std::make_unique<Array>(type, batch * heads * nq * width_, normal);
    } else if (kind == Structure::distance) {
      for (int64_t h = 0; h < heads; ++h) slopes_.push_back(float(0.5 / double(h + 1)));
      q_ = places(batch, nq);
      k_ = places(batch, nk);
      q_[0] = k_[size_t(nk - 1)] = NAN;  // tokens without a place
    }
  }

  bool exists() const { return kind_ != Structure::none; }
  bool intact() const { return !rel_h_ || (rel_h_->intact() && rel_w_->intact()); }
  // Elements of the gradients: of rel_h and of rel_w, or of the slopes per query.
  int64_t sums(int part) const {
    return part == 0 ? (kind_ == Structure::distance ? 1 : height_) : width_;
  }

  template <typename Inputs>
  void give_to(Inputs* in) const {
    const int64_t h = nq_ * height_, w = nq_ * width_;
    if (kind_ == Structure::decomposed)
      in->decomposed = {
          rel_h_->data(), rel_w_->data(), rel_h_->type, heads_ * h, h, height_, heads_ * w, w,
          width_,         height_,        width_};
    if (kind_ == Structure::distance)
      in->distance = {slopes_.data(), q_.data(), k_.data(), 2 * nq_, nq_, 2 * nk_, nk_};
  }

  double at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t row = (b * heads_ + h) * nq_ + i;
    if (kind_ == Structure::decomposed)
      return rel_h_->at(row * height_ + j / width_) + rel_w_->at(row * width_ + j % width_);
    return -double(slopes_[size_t(h)]) * distance(b, i, j);
  }

  // Adds the gradient of one score to sums [batch, heads, nq, sums(part)].
  void reduce(int64_t b, int64_t h, int64_t i, int64_t j, double ds,
              std::vector<double> (&to)[2]) const {
    const int64_t row = (b * heads_ + h) * nq_ + i;
    if (kind_ == Structure::distance) {
      to[0][size_t(row)] -= ds * distance(b, i, j);
    } else {
      to[0][size_t(row * height_ + j / width_)] += ds;
      to[1][size_t(row * width_ + j % width_)] += ds;
    }
  }

 private:
  // Planes of x and of y for every batch element, and what a vector may read beyond.
  static std::vector<float> places(int64_t batch, int64_t n) {
    std::vector<float> p(size_t(batch * 2 * n + 16));
    for (float& x : p) x = float(10 * uniform());
    return p;
  }

  double distance(int64_t b, int64_t i, int64_t j) const {
    const float* q = q_.data() + b * 2 * nq_ + i;
    const float* k = k_.data() + b * 2 * nk_ + j;
    const double d = std::hypot(double(q[0]) - k[0], double(q[nq_]) - k[nk_]);
    return std::isnan(d) ? 0 : d;
  }

  Structure kind_;
  int64_t heads_, nq_, nk_, width_, height_;
  std::unique_ptr<Array> rel_h_, rel_w_;
  std::vector<float> slopes_, q_, k_;
};

}  // namespace driver
