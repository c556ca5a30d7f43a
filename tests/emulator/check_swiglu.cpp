// SwiGLU's CUDA kernels (csrc/cuda/swiglu.cu) against float64, through the interface of csrc/swiglu.h.
#include "check.h"
#include "swiglu.h"

namespace {

using namespace check;
using fastprimer::Activation;
using fastprimer::Cuda;
using fastprimer::Dtype;

constexpr double NONE = INFINITY, GELU = 1.5957691216057308;
constexpr Activation SILU = {1, 0, NONE, 0}, GELU_TANH = {GELU, 0.044715 * GELU, NONE, 0}, GPT_OSS = {1.702, 0, 7, 1},
                     CLAMPED_GELU = {GELU, 0.044715 * GELU, 0.5, -1};

struct Case {
  int N, F;
  Activation activation = SILU;
  int more = 0;         // how much further apart than F, or 2 F, the rows of the inputs are
  int offset = 0;       // of all inputs from a 16-byte boundary
  bool packed = false;  // gate and up are the halves of one tensor, and so are dgate and dup
  bool quick = false;
};

const Case CASES[] = {
    {.N = 1, .F = 1, .quick = true},                                            // one number
    {.N = 1, .F = 3, .activation = GPT_OSS, .quick = true},                     // less than a vector
    {.N = 5, .F = 13, .activation = GPT_OSS, .packed = true, .quick = true},    // rows not aligned to 16 bytes
    {.N = 7, .F = 40, .activation = CLAMPED_GELU, .more = 8, .quick = true},    // several rows a block
    {.N = 6, .F = 64, .activation = GELU_TANH, .more = 2, .quick = true},       // strides that are not
    {.N = 3, .F = 96, .activation = GPT_OSS, .offset = 1, .quick = true},       // pointers that are not
    {.N = 1, .F = 1013, .activation = CLAMPED_GELU, .quick = true},             // vectors, then single numbers
    {.N = 3, .F = 1504, .activation = GPT_OSS, .packed = true, .quick = true},  // several blocks a row
    {.N = 1, .F = 20011},                                                       // blocks of the largest size
    {.N = 11, .F = 5120, .activation = GELU_TANH, .more = 16, .packed = true},  // likewise, in rows
    {.N = 9, .F = 1101, .activation = GPT_OSS, .more = 1},                      // no 16-byte accesses
    {.N = 700, .F = 520, .activation = CLAMPED_GELU, .packed = true},           // more rows than a grid
    {.N = 70000, .F = 1, .activation = GELU_TANH, .more = 1},                   // the same of the shortest rows
};

// What each activation must get right: both sides of the clamps and of the exponential, numbers whose square is infinite, no numbers.
constexpr float SPECIAL[] = {200, -200, 7, -7, 0.5, -0.5, 7.5, -7.5, 0, 1e30f, -1e30f, 90, -90, INFINITY, NAN, 1, -88, 88};
constexpr int SPECIALS = sizeof SPECIAL / sizeof *SPECIAL;

template <class T>
constexpr double LARGEST = 3.4028235e38;
template <>
constexpr double LARGEST<float16> = 65504;

// close, or an infinity or a NaN where there should be one, or 0 for what is below float32's range.
template <class T>
bool right(T value, double truth, double scale) {
  const double got = widen(value);
  if (std::isnan(truth)) return std::isnan(got);
  if (std::isinf(got)) return std::abs(truth) > LARGEST<T> && std::signbit(got) == std::signbit(truth);
  return close(value, truth, scale) || std::abs(got - truth) < 1e-36;
}

template <class T>
class Check {
 public:
  Check(const Case& c, Dtype dtype, const std::string& name)
      : c_(c),
        dtype_(dtype),
        name_(name),
        stride_((c.packed ? 2 : 1) * c.F + c.more),
        stride_gradient_((c.packed ? 2 : 1) * c.F),
        random_(c.N + c.F),
        gate_(spread(stride_), c.offset),
        up_(c.packed ? 0 : spread(stride_), c.offset),
        dy_(spread(c.F + c.more), c.offset),
        y_(dense()),
        dgate_(dense() * (c.packed ? 2 : 1)),
        dup_(c.packed ? 0 : dense()) {
    randomize(gate_, random_);
    randomize(up_, random_);
    randomize(dy_, random_);
    for (int row = 0; row < c.N; row++) {
      for (int i = 0; i < c.F; i++) {
        // Each special number of one beside an ordinary one, or a special one, of the other.
        const int pick = (row * 131 + i) % (3 * SPECIALS);
        if (pick < 2 * SPECIALS) gate()[row * stride_ + i] = narrow<T>(SPECIAL[pick % SPECIALS]);
        if (pick >= SPECIALS) up()[row * stride_ + i] = narrow<T>(SPECIAL[(pick + row) % SPECIALS]);
      }
    }
  }

  void run() {
    if (const char* error = forward()) return fail(name_ + ": forward: " + error);
    if (const char* error = backward()) return fail(name_ + ": backward: " + error);
    const int before = failures;
    for (int row = 0; row < c_.N; row++) {
      for (int i = 0; i < c_.F && failures == before; i++) check_number(row, i);
    }
    y_.finish(name_ + ": y");
    dgate_.finish(name_ + ": dgate");
    dup_.finish(name_ + ": dup");
  }

 private:
  size_t dense() const { return static_cast<size_t>(c_.N) * c_.F; }
  size_t spread(int64_t stride) const { return (c_.N - 1) * stride + (stride == c_.F + c_.more ? 1 : 2) * c_.F; }
  T* gate() { return gate_.data(); }
  T* up() { return c_.packed ? gate_.data() + c_.F : up_.data(); }
  T* dgate() { return dgate_.data(); }
  T* dup() { return c_.packed ? dgate_.data() + c_.F : dup_.data(); }

  const char* forward() {
    return fastprimer::swiglu_forward(Cuda{}, {.gate = gate(),
                                               .stride_gate_row = stride_,
                                               .up = up(),
                                               .stride_up_row = stride_,
                                               .y = y_.data(),
                                               .N = c_.N,
                                               .F = c_.F,
                                               .dtype = dtype_,
                                               .activation = c_.activation});
  }

  const char* backward() {
    return fastprimer::swiglu_backward(Cuda{}, {.dy = dy_.data(),
                                                .stride_dy_row = c_.F + c_.more,
                                                .gate = gate(),
                                                .stride_gate_row = stride_,
                                                .up = up(),
                                                .stride_up_row = stride_,
                                                .dgate = dgate(),
                                                .stride_dgate_row = stride_gradient_,
                                                .dup = dup(),
                                                .stride_dup_row = stride_gradient_,
                                                .N = c_.N,
                                                .F = c_.F,
                                                .dtype = dtype_,
                                                .activation = c_.activation});
  }

  void check_number(int row, int i) {
    const auto [alpha, beta, limit, offset] = c_.activation;
    const double gate_number = widen(gate()[row * stride_ + i]), up_number = widen(up()[row * stride_ + i]);
    const double dy = widen(dy_[row * (c_.F + c_.more) + i]);
    const double a = gate_number > limit ? limit : gate_number;
    const double b = up_number > limit ? limit : up_number < -limit ? -limit : up_number;
    const double t = a * (alpha + (beta == 0 ? 0 : beta * a * a));
    const double sigma = 1 / (1 + std::exp(-t)), p = a * sigma / (1 + std::exp(t));
    const double cubic = beta == 0 ? 0 : 3 * beta * p * a * a, slope = sigma + alpha * p + cubic;
    const bool through = !(std::abs(up_number) > limit);
    // float32's t has an error of its size, which the exponential turns into a relative one.
    const double inexact = 1 + std::min(std::abs(t), 1e3), size = (std::abs(b) + std::abs(offset)) * inexact;

    const double y = a * sigma * (b + offset), dgate_number = (gate_number > limit ? 0 : dy) * (b + offset) * slope;
    const double dup_number = (through ? dy : 0) * a * sigma;
    const size_t at = row * stride_gradient_ + i;
    if (!right(y_[static_cast<size_t>(row) * c_.F + i], y, std::abs(a * sigma) * size)) return fail(where("y", row, i));
    if (!right(dgate()[at], dgate_number, std::abs(dy) * size * (sigma + std::abs(alpha * p) + std::abs(cubic))))
      return fail(where("dgate", row, i));
    if (!right(dup()[at], dup_number, std::abs(dup_number) * inexact)) return fail(where("dup", row, i));
  }

  std::string where(const char* tensor, int row, int i) {
    return name_ + ": " + tensor + " is wrong for gate " + std::to_string(widen(gate()[row * stride_ + i])) + " and up " +
           std::to_string(widen(up()[row * stride_ + i]));
  }

  const Case& c_;
  Dtype dtype_;
  std::string name_;
  int64_t stride_, stride_gradient_;
  std::mt19937 random_;
  Buffer<T> gate_, up_, dy_, y_, dgate_, dup_;
};

template <class T>
void check_dtype(Dtype dtype, const char* type, bool quick) {
  for (const Case& c : CASES) {
    if (quick && !c.quick) continue;
    Check<T>(c, dtype, std::string("swiglu ") + type + " " + std::to_string(c.N) + " x " + std::to_string(c.F)).run();
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool quick) {
    check_dtype<float>(Dtype::float32, "float32", quick);
    check_dtype<bfloat16>(Dtype::bfloat16, "bfloat16", quick);
    check_dtype<float16>(Dtype::float16, "float16", quick);
  });
}
