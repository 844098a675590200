// The patch_embed kernels without PyTorch, against float64: floats and bytes, planes and pixels,
// LayerNorm, positions, prefix tokens, padding, every gradient.
#include "driver.h"
#include "patch_embed.h"

namespace vitkit::cpu::VITKIT_ISA {
const PatchKernels& patch_embed_kernels();
const PatchBackwardKernels& patch_embed_bwd_kernels();
}  // namespace vitkit::cpu::VITKIT_ISA

namespace {

using namespace driver;
using vitkit::cpu::PatchElement;
using vitkit::cpu::PatchEmbed;
using Values = std::vector<double>;

struct Case {
  std::string name;
  ElementType type;
  int64_t batch, channels, frames, height, width;  // of the images
  int64_t patch_frames, patch_height, patch_width, embed;
  bool bytes, norm, by_pixel;
  int64_t prefixes;
};

class Run {
 public:
  explicit Run(const Case& c)
      : c_(c),
        gt_(up(c.frames, c.patch_frames)),
        gh_(up(c.height, c.patch_height)),
        gw_(up(c.width, c.patch_width)),
        patches_(gt_ * gh_ * gw_),
        tokens_(c.batch * patches_),
        rows_(patches_ + c.prefixes),
        depth_(c.channels * c.patch_frames * c.patch_height * c.patch_width),
        pixels_(c.type, c.batch * c.channels * c.frames * c.height * c.width, normal),
        bytes_(size_t(c.batch * c.channels * c.frames * c.height * c.width)),
        weight_(c.type, c.embed * depth_, [&] { return normal() / std::sqrt(double(depth_)); }),
        position_(c.type, rows_ * c.embed, normal),
        prefix_(c.type, c.prefixes * c.embed, normal),
        grad_(c.type, c.batch * rows_ * c.embed, normal) {
    for (uint8_t& b : bytes_) b = uint8_t(uniform() * 256);
    for (auto* v : {&bias_, &gain_, &offset_})
      for (int64_t e = 0; e < c.embed; ++e) v->push_back(float(normal()));
    describe();
  }

  bool check() {
    const Result exact = compute<double>(false), plain = compute<float>(true);
    const Result ours = kernels();
    const double eps = kEps[int(c_.type)];
    bool good = intact_;
    const auto compare = [&](const char* name, const Values& a, const Values& p, const Values& x,
                             double terms) {
      Error mine, theirs;
      for (size_t i = 0; i < x.size(); ++i) {
        mine.add(a[i], x[i]);
        theirs.add(p[i], x[i]);
      }
      good &= report(name, mine, theirs, eps, terms);
    };
    compare("tokens", ours.out, plain.out, exact.out, double(depth_));
    compare("dweight", ours.dweight, plain.dweight, exact.dweight, double(tokens_));
    compare("dbias", ours.dbias, plain.dbias, exact.dbias, double(tokens_));
    compare("drows", ours.drows, plain.drows, exact.drows, double(c_.batch));
    if (c_.norm) compare("dnorm", ours.dnorm, plain.dnorm, exact.dnorm, double(tokens_));
    if (!c_.bytes) compare("dimages", ours.dimages, plain.dimages, exact.dimages, double(c_.embed));
    return good;
  }

 private:
  struct Result {
    Values out, dweight, dbias, drows, dnorm, dimages;
  };

  static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // Place of a pixel in the images, -1 beyond their end.
  int64_t pixel(int64_t b, int64_t c, int64_t t, int64_t y, int64_t x) const {
    if (t >= c_.frames || y >= c_.height || x >= c_.width) return -1;
    if (c_.by_pixel)
      return (((b * c_.frames + t) * c_.height + y) * c_.width + x) * c_.channels + c;
    return (((b * c_.channels + c) * c_.frames + t) * c_.height + y) * c_.width + x;
  }

  // f(element of the weight's row, place of its pixel, channel) for one token.
  template <typename F>
  void each(int64_t token, const F& f) const {
    const int64_t b = token / patches_, n = token % patches_;
    const int64_t x0 = n % gw_ * c_.patch_width, y0 = n / gw_ % gh_ * c_.patch_height;
    const int64_t t0 = n / gw_ / gh_ * c_.patch_frames;
    int64_t k = 0;
    for (int64_t c = 0; c < c_.channels; ++c)
      for (int64_t t = 0; t < c_.patch_frames; ++t)
        for (int64_t y = 0; y < c_.patch_height; ++y)
          for (int64_t x = 0; x < c_.patch_width; ++x)
            f(k++, pixel(b, c, t0 + t, y0 + y, x0 + x), c);
  }

  double mean(int64_t c) const { return 0.3 + 0.1 * double(c); }
  double deviation(int64_t c) const { return 0.2 + 0.05 * double(c); }

  // Everything by its definition; `rounded`: each intermediate in the type, as a host computes it.
  template <typename S>
  Result compute(bool rounded) const {
    const auto keep = [&](S v) { return rounded ? S(round_to(c_.type, double(v))) : v; };
    const int64_t e_ = c_.embed;
    Result r;
    r.out.assign(size_t(c_.batch * rows_ * e_), 0);
    r.dweight.assign(size_t(e_ * depth_), 0);
    r.dbias.assign(size_t(e_), 0);
    r.drows.assign(size_t(rows_ * e_), 0);
    r.dnorm.assign(size_t(2 * e_), 0);
    r.dimages.assign(bytes_.size(), 0);
    std::vector<S> dweight(r.dweight.size()), dbias(r.dbias.size()), a(depth_), z(e_), dz(e_);
    for (int64_t b = 0; b < c_.batch; ++b)
      for (int64_t i = 0; i < c_.prefixes * e_; ++i)
        r.out[size_t(b * rows_ * e_ + i)] = keep(S(prefix_.at(i)) + S(position_.at(i)));
    for (int64_t i = 0; i < c_.batch * rows_ * e_; ++i)
      r.drows[size_t(i % (rows_ * e_))] += grad_.at(i);
    for (int64_t m = 0; m < tokens_; ++m) {
      const int64_t row = m / patches_ * rows_ + c_.prefixes + m % patches_;
      each(m,
           [&](int64_t k, int64_t at, int64_t c) { a[k] = at < 0 ? S(0) : value<S>(at, c, keep); });
      S average = 0, variance = 0;
      for (int64_t e = 0; e < e_; ++e) {
        S sum = 0;
        for (int64_t k = 0; k < depth_; ++k) sum += a[k] * S(weight_.at(e * depth_ + k));
        z[e] = keep(sum + S(bias_[e]));
        average += z[e] / S(e_);
      }
      for (int64_t e = 0; e < e_; ++e) variance += (z[e] - average) * (z[e] - average) / S(e_);
      const S rstd = S(1) / std::sqrt(variance + S(1e-5f));
      S total = 0, along = 0;
      for (int64_t e = 0; e < e_; ++e) {
        const S g = S(grad_.at(row * e_ + e)), x = (z[e] - average) * rstd;
        const S y = c_.norm ? keep(x * S(gain_[e]) + S(offset_[e])) : z[e];
        r.out[size_t(row * e_ + e)] =
            keep(y + S(position_.at((c_.prefixes + m % patches_) * e_ + e)));
        r.dnorm[size_t(e)] += double(g * x);
        r.dnorm[size_t(e_ + e)] += double(g);
        total += g * S(gain_[e]) / S(e_);
        along += g * S(gain_[e]) * x / S(e_);
      }
      for (int64_t e = 0; e < e_; ++e) {
        const S g = S(grad_.at(row * e_ + e));
        dz[e] =
            c_.norm ? keep((g * S(gain_[e]) - total - (z[e] - average) * rstd * along) * rstd) : g;
        dbias[e] += dz[e];
        for (int64_t k = 0; k < depth_; ++k) dweight[e * depth_ + k] += dz[e] * a[k];
      }
      each(m, [&](int64_t k, int64_t at, int64_t) {
        if (at < 0) return;
        S sum = 0;
        for (int64_t e = 0; e < e_; ++e) sum += dz[e] * S(weight_.at(e * depth_ + k));
        r.dimages[size_t(at)] = keep(sum);
      });
    }
    for (size_t i = 0; i < dweight.size(); ++i) r.dweight[i] = keep(dweight[i]);
    for (size_t i = 0; i < dbias.size(); ++i) r.dbias[i] = keep(dbias[i]);
    return r;
  }

  template <typename S, typename Keep>
  S value(int64_t at, int64_t c, const Keep& keep) const {
    if (!c_.bytes) return S(pixels_.at(at));
    const S x = keep(keep(S(bytes_[size_t(at)]) / S(255)) - keep(S(mean(c))));
    return keep(x / keep(S(deviation(c))));
  }

  void describe() {
    PatchEmbed& p = p_;
    p.type = PatchElement(int(c_.type));
    p.pixels = c_.bytes ? PatchElement::u8 : p.type;
    p.images = c_.bytes ? reinterpret_cast<const char*>(bytes_.data()) : pixels_.data();
    p.pixel_count = int64_t(bytes_.size());
    const int64_t together = c_.by_pixel ? c_.channels : 1;
    p.channels = c_.channels / together;
    p.frames = c_.patch_frames;
    p.rows = c_.patch_height;
    p.run = c_.patch_width * together;
    p.depth = depth_;
    p.row_stride = c_.width * together;
    p.frame_stride = c_.height * p.row_stride;
    p.channel_stride = c_.frames * p.frame_stride;
    p.image_stride = c_.channels / together * p.channel_stride;
    p.grid_frames = gt_;
    p.grid_rows = gh_;
    p.grid_columns = gw_;
    p.size_frames = c_.frames;
    p.size_rows = c_.height;
    p.size_columns = c_.width * together;
    p.batch = c_.batch;
    p.patches = patches_;
    p.prefixes = c_.prefixes;
    p.embed = c_.embed;
    p.scale = 1;
    p.weight = weight_.data();
    p.bias = bias_.data();
    p.norm_weight = c_.norm ? gain_.data() : nullptr;
    p.norm_bias = c_.norm ? offset_.data() : nullptr;
    p.norm_eps = 1e-5f;
    p.position = {position_.data(), p.type};
    p.prefix = {c_.prefixes ? prefix_.data() : nullptr, p.type};
    p.position_of_prefix = c_.prefixes > 0;
    fold();
  }

  // The host's part: order of a patch's elements, bytes as (x - centre) * factor * scale + offset.
  void fold() {
    const int64_t lines = c_.patch_frames * c_.patch_height * c_.patch_width;
    for (int64_t k = 0; k < depth_; ++k)
      order_.push_back(c_.by_pixel ? k % c_.channels * lines + k / c_.channels : k);
    if (c_.by_pixel) p_.order = order_.data();
    if (!c_.bytes) return;
    for (auto* v : {&centre_, &padding_, &factor_, &shift_}) v->assign(size_t(depth_ + 16), 0.f);
    for (int64_t c = 0; c < c_.channels; ++c)
      p_.scale = std::fmax(c ? p_.scale : 0.f, float(1 / (255 * deviation(c))));
    for (int64_t k = 0; k < depth_; ++k) {
      const int64_t c = order_[size_t(k)] / lines;
      const double centre = std::nearbyint(255 * mean(c));
      centre_[size_t(k)] = float(centre);
      padding_[size_t(k)] = float(255 * mean(c) - centre);
      factor_[size_t(k)] = float(1 / (255 * deviation(c)) / double(p_.scale));
      shift_[size_t(k)] = float((centre / 255 - mean(c)) / deviation(c));
    }
    p_.centre = centre_.data();
    p_.padding = padding_.data();
    p_.factor = factor_.data();
    p_.offset = shift_.data();
  }

  Result kernels() {
    Result r;
    forward(r);
    backward(r);
    return r;
  }

  static Values values(const Array& a, int64_t n) {
    Values v;
    for (int64_t i = 0; i < n; ++i) v.push_back(a.at(i));
    return v;
  }

  void forward(Result& r) {
    const auto& table = isa::patch_embed_kernels();
    Array out(c_.type, c_.batch * rows_ * c_.embed);
    Poisoned weights(table.weight_bytes(p_)), shift(size_t(c_.embed + 64) * 4);
    auto* shifts = reinterpret_cast<float*>(shift.get());
    table.pack_weight(p_, weights.get(), shifts, 0, table.weight_panels(p_));
    const vitkit::cpu::PatchForward f{p_, out.data(), weights.get(), shifts, table.row_step};
    Poisoned scratch(table.scratch_bytes(f));
    table.forward(f, 0, up(tokens_, table.row_step), scratch.get());
    intact_ = out.intact();
    r.out = values(out, c_.batch * rows_ * c_.embed);
  }

  void backward(Result& r) {
    const auto& table = isa::patch_embed_bwd_kernels();
    vitkit::cpu::PatchBackward b{};
    b.in = p_;
    b.grad = grad_.data();
    b.row_parts = tokens_ < 3 ? 1 : 3;
    b.parts = 2;
    Array dimages(c_.type, int64_t(bytes_.size())), dweight(c_.type, c_.embed * depth_);
    Poisoned weights(table.weight_bytes(p_)), shift(size_t(c_.embed + 64) * 4);
    Poisoned panels(table.rows_bytes(p_)), dz(size_t(tokens_ * c_.embed) * 4);
    Poisoned norm(size_t(b.row_parts * 2 * c_.embed) * 4);
    Poisoned parts(table.dweight_bytes(p_) * size_t(b.parts));
    Poisoned dbias(size_t(b.parts * c_.embed) * 4), drows(size_t(rows_ * c_.embed) * 4);
    const auto floats = [](const Poisoned& p) { return reinterpret_cast<float*>(p.get()); };
    table.pack_weight_float32(p_, weights.get(), floats(shift), 0, table.weight_panels(p_));
    b.weights = weights.get();
    b.shift = floats(shift);
    if (!c_.bytes) {
      table.pack_weight_rows(p_, floats(panels), 0, c_.embed);
      b.panels = floats(panels);
      b.dimages = dimages.data();
    }
    b.dz = c_.norm ? floats(dz) : nullptr;
    b.norm_partial = floats(norm);
    Poisoned rows_scratch(table.gradient_scratch_bytes(b));
    table.gradient_rows(b, 0, b.row_parts, rows_scratch.get());
    b.dweight = floats(parts);
    b.dbias = floats(dbias);
    Poisoned weight_scratch(table.weight_scratch_bytes(b));
    table.weight_gradient(b, 0, b.parts * table.weight_tiles(p_), weight_scratch.get());
    std::vector<float> sums(size_t(c_.embed), 0.f);
    for (int64_t i = 0; i < b.parts * c_.embed; ++i) sums[size_t(i % c_.embed)] += b.dbias[i];
    b.dbias_sum = sums.data();
    b.dweight_out = dweight.data();
    table.finish_weight(b, 0, c_.embed);
    b.drows = floats(drows);
    table.sum_rows(b, 0, rows_);
    intact_ &= dimages.intact() && dweight.intact();
    r.dweight = values(dweight, c_.embed * depth_);
    r.dbias = Values(sums.begin(), sums.end());
    r.drows = Values(b.drows, b.drows + rows_ * c_.embed);
    r.dimages = c_.bytes ? Values{} : values(dimages, int64_t(bytes_.size()));
    r.dnorm.assign(size_t(2 * c_.embed), 0);
    if (c_.norm)
      for (int64_t i = 0; i < b.row_parts * 2 * c_.embed; ++i)
        r.dnorm[size_t(i % (2 * c_.embed))] += double(b.norm_partial[i]);
  }

  const Case c_;
  int64_t gt_, gh_, gw_, patches_, tokens_, rows_, depth_;
  Array pixels_;
  std::vector<uint8_t> bytes_;
  Array weight_, position_, prefix_, grad_;
  std::vector<float> bias_, gain_, offset_, centre_, padding_, factor_, shift_;
  std::vector<int64_t> order_;
  PatchEmbed p_{};
  bool intact_ = true;
};

std::vector<Case> cases(ElementType type) {
  const std::string name = std::string(kTypeNames[int(type)]) + "/";
  return {
      {name + "vit", type, 2, 3, 1, 32, 48, 1, 16, 16, 40, false, false, false, 1},
      {name + "vit_bytes", type, 2, 3, 1, 32, 48, 1, 16, 16, 40, true, false, false, 1},
      {name + "bytes_by_pixel_padded", type, 2, 3, 1, 19, 13, 1, 4, 8, 33, true, true, true, 2},
      {name + "bytes_padded", type, 1, 3, 1, 11, 9, 1, 4, 4, 17, true, false, false, 0},
      {name + "swin", type, 1, 3, 1, 28, 36, 1, 4, 4, 96, false, true, false, 0},
      {name + "by_pixel", type, 2, 3, 1, 20, 12, 1, 4, 4, 20, false, false, true, 0},
      {name + "tubelets_padded", type, 1, 2, 3, 5, 7, 2, 2, 4, 18, false, true, false, 0},
      {name + "odd", type, 3, 5, 1, 9, 14, 1, 3, 7, 7, false, false, false, 1},
      {name + "several_strips", type, 1, 1, 1, 68, 40, 1, 2, 2, 110, false, false, false, 0},
  };
}

}  // namespace

int main(int argc, char** argv) { return run_all<Run>(argc, argv, cases); }
