// RMSNorm's CUDA kernels (csrc/cuda/rms_norm.cu) against float64, through the interface of csrc/rms_norm.h.
#include "check.h"
#include "rms_norm.h"

namespace {

using namespace check;
using fastprimer::Cuda;
using fastprimer::Dtype;

struct Case {
  int N, C;
  int more = 0;           // how much further apart than C the rows of the inputs are
  bool residual = false;  // and dh in the backward pass
  char weight = 'x';      // of x's type; 'f': float32; '-': none
  double weight_offset = 0;
  bool quick = false;
};

const Case CASES[] = {
    {.N = 1, .C = 1, .quick = true},                                                           // one number
    {.N = 3, .C = 5, .residual = true, .weight_offset = 1, .quick = true},                     // odd
    {.N = 6, .C = 64, .more = 2, .residual = true, .quick = true},                             // rows not aligned to 16 bytes
    {.N = 70, .C = 128, .weight = 'f', .quick = true},                                         // several rows a warp
    {.N = 600, .C = 16, .residual = true, .weight_offset = 0.5},                               // more rows than a grid
    {.N = 9, .C = 1000, .more = 24, .residual = true, .weight = 'f', .quick = true},           // the last thread idles
    {.N = 4, .C = 1001, .more = 3},                                                            // no 16-byte accesses
    {.N = 33, .C = 1024, .more = 8, .weight = '-'},                                            // a warp a row, four vectors a lane
    {.N = 12, .C = 1536, .residual = true, .weight = 'f', .weight_offset = 1, .quick = true},  // rows share a block and its barriers
    {.N = 3, .C = 4104, .residual = true, .weight_offset = 1},                                 // a block a row
    {.N = 20, .C = 10240},                                                                     // several rows a block, one after another
    {.N = 17, .C = 33000, .residual = true, .weight = 'f', .weight_offset = 1},                // wide
    {.N = 3, .C = 5001, .more = 1, .residual = true},                                          // wide without 16-byte accesses
};

template <class T>
constexpr Dtype DTYPE = Dtype::float32;
template <>
constexpr Dtype DTYPE<bfloat16> = Dtype::bfloat16;
template <>
constexpr Dtype DTYPE<float16> = Dtype::float16;

template <class T, class W>
class Check {
 public:
  Check(const Case& c, const std::string& name)
      : c_(c),
        name_(name),
        stride_(c.C + c.more),
        offset_(c.more % 2),
        random_(c.N + c.C),
        x_(strided(), offset_),
        residual_(strided(), offset_),
        weight_(c.C),
        y_(dense()),
        h_(dense()),
        rstd_(c.N),
        dy_(strided(), offset_),
        dh_(dense()),
        dx_(dense()),
        dweight_(c.C) {
    randomize(x_, random_);
    randomize(residual_, random_);
    randomize(weight_, random_);
    randomize(dy_, random_);
    randomize(dh_, random_);
  }

  void run() {
    if (const char* error = forward()) return fail(name_ + ": forward: " + error);
    if (const char* error = backward()) return fail(name_ + ": backward: " + error);
    const int before = failures;
    std::vector<double> dweight(c_.C), scale(c_.C);
    for (int row = 0; row < c_.N && failures == before; row++) check_row(row, dweight, scale);
    for (int i = 0; i < c_.C && has_weight() && failures == before; i++) {
      if (!close(dweight_[i], dweight[i], scale[i])) fail(name_ + ": dweight is wrong");
    }
    y_.finish(name_ + ": y");
    h_.finish(name_ + ": h");
    rstd_.finish(name_ + ": rstd");
    dx_.finish(name_ + ": dx");
    dweight_.finish(name_ + ": dweight");
  }

 private:
  size_t dense() const { return static_cast<size_t>(c_.N) * c_.C; }
  size_t strided() const { return static_cast<size_t>(c_.N - 1) * stride_ + c_.C; }
  bool has_weight() const { return c_.weight != '-'; }

  const char* forward() {
    return fastprimer::rms_norm_forward(Cuda{}, {.x = x_.data(),
                                                 .stride_x_row = stride_,
                                                 .residual = c_.residual ? residual_.data() : nullptr,
                                                 .stride_residual_row = c_.residual ? stride_ : 0,
                                                 .weight = has_weight() ? weight_.data() : nullptr,
                                                 .y = y_.data(),
                                                 .h = c_.residual ? h_.data() : nullptr,
                                                 .rstd = rstd_.data(),
                                                 .N = c_.N,
                                                 .C = c_.C,
                                                 .dtype = DTYPE<T>,
                                                 .weight_dtype = DTYPE<W>,
                                                 .eps = EPS,
                                                 .weight_offset = c_.weight_offset});
  }

  const char* backward() {
    const int64_t partials = has_weight() ? fastprimer::rms_norm_partials(Cuda{}, c_.N, c_.C) : 0;
    Buffer<float> partial(partials * c_.C);
    const char* error = fastprimer::rms_norm_backward(Cuda{}, {.dy = dy_.data(),
                                                               .stride_dy_row = stride_,
                                                               .dh = c_.residual ? dh_.data() : nullptr,
                                                               .stride_dh_row = c_.residual ? c_.C : 0,
                                                               .h = c_.residual ? h_.data() : x_.data(),
                                                               .stride_h_row = c_.residual ? c_.C : stride_,
                                                               .weight = has_weight() ? weight_.data() : nullptr,
                                                               .rstd = rstd_.data(),
                                                               .dx = dx_.data(),
                                                               .dweight = has_weight() ? dweight_.data() : nullptr,
                                                               .partial = has_weight() ? partial.data() : nullptr,
                                                               .partials = partials,
                                                               .N = c_.N,
                                                               .C = c_.C,
                                                               .dtype = DTYPE<T>,
                                                               .weight_dtype = DTYPE<W>,
                                                               .weight_offset = c_.weight_offset});
    partial.finish(name_ + ": partial");
    return error;
  }

  double h(int row, int i) {
    const float x = widen(x_[static_cast<size_t>(row) * stride_ + i]);
    if (!c_.residual) return x;
    return widen(narrow<T>(x + widen(residual_[static_cast<size_t>(row) * stride_ + i])));
  }

  double w(int i) { return has_weight() ? widen(weight_[i]) + c_.weight_offset : 1; }

  void check_row(int row, std::vector<double>& dweight, std::vector<double>& scale) {
    const size_t at = static_cast<size_t>(row) * c_.C;
    double squares = 0, sum = 0, absolute = 0;
    for (int i = 0; i < c_.C; i++) squares += h(row, i) * h(row, i);
    const double rstd = 1 / std::sqrt(squares / c_.C + EPS);
    for (int i = 0; i < c_.C; i++) {
      const double term = dy(row, i) * w(i) * h(row, i) * rstd;
      sum += term;
      absolute += std::abs(term);
    }
    if (!close(rstd_[row], rstd, rstd)) return fail(name_ + ": rstd is wrong");
    for (int i = 0; i < c_.C; i++) {
      const double h_hat = h(row, i) * rstd, g = dy(row, i) * w(i), more = c_.residual ? widen(dh_[at + i]) : 0;
      const double y = h_hat * w(i), dx = rstd * (g - h_hat * sum / c_.C) + more;
      dweight[i] += dy(row, i) * h_hat;
      scale[i] += std::abs(dy(row, i) * h_hat);
      if (c_.residual && widen(h_[at + i]) != h(row, i)) return fail(name_ + ": h is wrong");
      if (!close(y_[at + i], y, std::abs(y))) return fail(name_ + ": y is wrong");
      if (!close(dx_[at + i], dx, rstd * (std::abs(g) + std::abs(h_hat) * absolute / c_.C) + std::abs(more)))
        return fail(name_ + ": dx is wrong");
    }
  }

  double dy(int row, int i) { return widen(dy_[static_cast<size_t>(row) * stride_ + i]); }

  static constexpr double EPS = 1e-6;
  const Case& c_;
  std::string name_;
  int64_t stride_;
  size_t offset_;
  std::mt19937 random_;
  Buffer<T> x_, residual_;
  Buffer<W> weight_;
  Buffer<T> y_, h_;
  Buffer<float> rstd_;
  Buffer<T> dy_, dh_, dx_;
  Buffer<W> dweight_;
};

template <class T>
void check_dtype(const char* dtype, bool quick) {
  for (const Case& c : CASES) {
    if (quick && !c.quick) continue;
    const std::string name = std::string("rms_norm ") + dtype + " " + std::to_string(c.N) + " x " + std::to_string(c.C);
    if (c.weight == 'f') {
      Check<T, float>(c, name).run();
    } else {
      Check<T, T>(c, name).run();
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool quick) {
    check_dtype<float>("float32", quick);
    check_dtype<bfloat16>("bfloat16", quick);
    check_dtype<float16>("float16", quick);
  });
}
