// The mixture of experts' CUDA kernels (csrc/cuda/moe.cu) against float64, through the interface of csrc/moe.h.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "moe.h"

namespace {

using namespace check;
using fastprimer::Cuda;
using fastprimer::Dtype;
using fastprimer::MoeBackward;
using fastprimer::MoeForward;
using fastprimer::MoeProblem;

struct Case {
  int N, C, F, E, K;
  int only = 0;          // experts that tokens go to, the second one first; 0: all
  bool invalid = false;  // some numbers are no expert's
  bool nans = false;     // in the second token's x or dy, and in the weights of the first expert, which nobody chose
  int more = 0;          // how much further apart than they need be rows of inputs are
  int offset = 0;        // of inputs from a 16-byte boundary
  bool quick = false;
  bool large_only = false;  // not float32, which has one size of tiles
};

const Case CASES[] = {
    {.N = 1, .C = 1, .F = 1, .E = 1, .K = 1, .quick = true},                              // one number
    {.N = 11, .C = 16, .F = 12, .E = 4, .K = 2, .more = 8, .quick = true},                // F not in whole 16 bytes
    {.N = 7, .C = 9, .F = 5, .E = 3, .K = 2, .invalid = true, .more = 1, .quick = true},  // nothing aligned
    {.N = 9, .C = 8, .F = 24, .E = 40, .K = 3, .only = 7, .offset = 1, .quick = true},    // most experts are empty
    {.N = 5, .C = 104, .F = 72, .E = 3, .K = 2, .only = 2, .nans = true, .quick = true},  // NaN stays where it is; several tiles
    {.N = 300, .C = 8, .F = 8, .E = 5, .K = 1, .invalid = true, .quick = true},           // several chunks of pairs
    {.N = 70, .C = 24, .F = 40, .E = 3, .K = 1, .only = 1},                               // one takes all: two tiles of rows
    {.N = 21, .C = 200, .F = 104, .E = 2, .K = 2, .invalid = true},                       // several tiles of columns and steps of depth
    {.N = 150, .C = 200, .F = 136, .E = 2, .K = 1, .only = 1, .large_only = true},        // large tiles, more than one of all
    {.N = 130, .C = 72, .F = 20, .E = 3, .K = 2, .invalid = true, .large_only = true},    // not aligned
};

template <class T>
class Check {
 public:
  Check(const Case& c, Dtype dtype, const std::string& name)
      : c_(c),
        name_(name),
        stride_x_(c.C + c.more),
        stride_gate_up_(c.C + c.more),
        stride_down_(c.F + c.more),
        x_(static_cast<size_t>(c.N) * stride_x_, c.offset),
        gate_up_(static_cast<size_t>(c.E) * (2 * c.F * stride_gate_up_ + c.more), c.offset),
        down_(static_cast<size_t>(c.E) * (c.C * stride_down_ + c.more), c.offset),
        dy_(static_cast<size_t>(c.N) * stride_x_, c.offset),
        hidden_(pairs() * 2 * c.F),
        y_(static_cast<size_t>(c.N) * c.C),
        dx_(y_.size()),
        dgate_up_(static_cast<size_t>(c.E) * 2 * c.F * c.C),
        ddown_(static_cast<size_t>(c.E) * c.C * c.F),
        weights_(pairs()),
        dweights_(pairs()),
        experts_(pairs()) {
    std::mt19937 random(c.N + c.C + c.F);
    randomize(x_, random);
    randomize(gate_up_, random);
    randomize(down_, random);
    randomize(dy_, random);
    randomize(weights_, random);
    std::vector<int> order(c.only > 0 ? c.only : c.E);
    for (int n = 0; n < c.N; n++) {
      std::iota(order.begin(), order.end(), c.only > 0 ? 1 : 0);
      std::shuffle(order.begin(), order.end(), random);
      for (int k = 0; k < c.K; k++) experts_[n * c.K + k] = order[k];
    }
    if (c.invalid) {
      for (size_t p = 1; p < pairs(); p += 5) experts_[p] = p % 3 == 0 ? -1 : p % 3 == 1 ? c.E : int64_t{1} << 32;
    }
    if (c.nans) {
      for (int i = 0; i < 2 * c.F; i++) gate_up_[i * stride_gate_up_] = narrow<T>(NAN);
      for (int i = 0; i < c.C; i++) down_[i * stride_down_] = narrow<T>(NAN);
      x_[stride_x_ + 3] = narrow<T>(NAN);
    }
    problem_ = {.x = x_.data(),
                .stride_x_row = stride_x_,
                .gate_up = gate_up_.data(),
                .stride_gate_up_expert = 2 * c.F * stride_gate_up_ + c.more,
                .stride_gate_up_row = stride_gate_up_,
                .down = down_.data(),
                .stride_down_expert = c.C * stride_down_ + c.more,
                .stride_down_row = stride_down_,
                .weights = weights_.data(),
                .experts = experts_.data(),
                .N = c.N,
                .C = c.C,
                .F = c.F,
                .E = c.E,
                .K = c.K,
                .dtype = dtype};
  }

  void run() {
    Buffer<unsigned char> scratch(fastprimer::moe_forward_scratch(Cuda{}, problem_));
    if (const char* error =
            fastprimer::moe_forward(Cuda{}, {.problem = problem_, .hidden = hidden_.data(), .y = y_.data(), .scratch = scratch.data()}))
      return fail(name_ + ": forward: " + error);
    Buffer<unsigned char> more(fastprimer::moe_backward_scratch(Cuda{}, problem_));
    if (const char* error = fastprimer::moe_backward(Cuda{}, {.problem = problem_,
                                                              .dy = dy_.data(),
                                                              .stride_dy_row = stride_x_,
                                                              .hidden = hidden_.data(),
                                                              .dx = dx_.data(),
                                                              .dgate_up = dgate_up_.data(),
                                                              .ddown = ddown_.data(),
                                                              .dweights = dweights_.data(),
                                                              .scratch = more.data()}))
      return fail(name_ + ": backward: " + error);
    compare();
    hidden_.finish(name_ + ": hidden");
    y_.finish(name_ + ": y");
    dx_.finish(name_ + ": dx");
    dgate_up_.finish(name_ + ": dgate_up");
    ddown_.finish(name_ + ": ddown");
    dweights_.finish(name_ + ": dweights");
    guard(scratch);
    guard(more);
  }

 private:
  // A sum in float64, and the sum of its terms' sizes.
  struct Sum {
    double value = 0, size = 0;
    void add(double term, double term_size) {
      value += term;
      size += term_size;
    }
    void add(double term) { add(term, std::abs(term)); }
  };

  size_t pairs() const { return static_cast<size_t>(c_.N) * c_.K; }
  double x(int n, int i) { return widen(x_[n * stride_x_ + i]); }
  double dy(int n, int i) { return widen(dy_[n * stride_x_ + i]); }
  double gate_up(int64_t e, int f, int i) { return widen(gate_up_[e * problem_.stride_gate_up_expert + f * stride_gate_up_ + i]); }
  double down(int64_t e, int i, int f) { return widen(down_[e * problem_.stride_down_expert + i * stride_down_ + f]); }

  // Only that nothing was written outside: what is inside depends on no schedule, but part of it is never written.
  void guard(Buffer<unsigned char>& scratch) {
    const uint64_t before = digest;
    scratch.finish(name_ + ": scratch");
    digest = before;
  }

  void compare() {
    const int C = c_.C, F = c_.F, before = failures;
    std::vector<Sum> y(y_.size()), dx(dx_.size()), dgate_up(dgate_up_.size()), ddown(ddown_.size());
    for (int n = 0; n < c_.N && failures == before; n++) {
      for (int k = 0; k < c_.K && failures == before; k++) {
        const int64_t p = n * c_.K + k, e = experts_[p];
        if (e < 0 || e >= c_.E) {
          for (int f = 0; f < 2 * F; f++) expect(name_ + ": hidden is wrong: not 0", widen(hidden_[p * 2 * F + f]) == 0);
          expect(name_ + ": dweights is wrong: not 0", dweights_[p] == 0);
          continue;
        }
        Sum dweight;
        for (int f = 0; f < F; f++) {
          const double w = weights_[p], a = hidden(n, e, p, f), b = hidden(n, e, p, F + f);
          const double sigma = 1 / (1 + std::exp(-a)), u = a * sigma * b;
          Sum d;
          for (int i = 0; i < C; i++) d.add(dy(n, i) * down(e, i, f));
          dweight.add(d.value * u, d.size * std::abs(u));
          const double slope[2] = {w * b * sigma * (1 + a * (1 - sigma)), w * a * sigma};
          for (int i = 0; i < C; i++) {
            y[n * C + i].add(w * u * down(e, i, f));
            ddown[(e * C + i) * F + f].add(dy(n, i) * w * u);
            for (int half = 0; half < 2; half++) {
              const double dh = slope[half] * d.value, size = std::abs(slope[half]) * d.size;
              dx[n * C + i].add(dh * gate_up(e, half * F + f, i), size * std::abs(gate_up(e, half * F + f, i)));
              dgate_up[(e * 2 * F + half * F + f) * C + i].add(dh * x(n, i), size * std::abs(x(n, i)));
            }
          }
        }
        // u's exponential is not float32's, where elements have 16 bits.
        if (!same(dweights_[p], dweight.value, dweight.size * (sizeof(T) == 2 ? 100 : 1))) fail(name_ + ": dweights is wrong");
      }
    }
    judge("y", y_, y);
    judge("dx", dx_, dx);
    judge("dgate_up", dgate_up_, dgate_up);
    judge("ddown", ddown_, ddown);
  }

  // What the kernel saved, which is compared and from there on given.
  double hidden(int n, int64_t e, int64_t p, int f) {
    const T saved = hidden_[p * 2 * c_.F + f];
    Sum truth;
    for (int i = 0; i < c_.C; i++) truth.add(x(n, i) * gate_up(e, f, i));
    if (!same(saved, truth.value, truth.size)) fail(name_ + ": hidden is wrong");
    return widen(saved);
  }

  template <class Number>
  static bool same(Number value, double truth, double size) {
    return std::isnan(truth) ? std::isnan(widen(value)) : close(value, truth, size);
  }

  void judge(const char* what, Buffer<T>& got, const std::vector<Sum>& truth) {
    for (size_t i = 0; i < truth.size(); i++) {
      if (!near(got[i], truth[i].value, truth[i].size, 0)) return fail(name_ + ": " + what + " is wrong");
      if (truth[i].size == 0 && widen(got[i]) != 0) return fail(name_ + ": " + what + " is wrong: not exactly 0");
    }
  }

  const Case& c_;
  std::string name_;
  int64_t stride_x_, stride_gate_up_, stride_down_;
  Buffer<T> x_, gate_up_, down_, dy_, hidden_, y_, dx_, dgate_up_, ddown_;
  Buffer<float> weights_, dweights_;
  Buffer<int64_t> experts_;
  MoeProblem problem_;
};

template <class T>
void check_dtype(Dtype dtype, const char* type, bool quick) {
  for (const Case& c : CASES) {
    if ((quick && !c.quick) || (c.large_only && sizeof(T) == 4)) continue;
    const std::string name =
        std::string("moe ") + type + " N " + std::to_string(c.N) + " C " + std::to_string(c.C) + " F " + std::to_string(c.F);
    Check<T>(c, dtype, name).run();
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool quick) {
    emulator::bank_conflicts = 0;
    check_dtype<bfloat16>(Dtype::bfloat16, "bfloat16", quick);
    check_dtype<float16>(Dtype::float16, "float16", quick);
    if (emulator::bank_conflicts != 0) fail("moe: bank conflicts: " + std::to_string(emulator::bank_conflicts));
    check_dtype<float>(Dtype::float32, "float32", quick);
  });
}
