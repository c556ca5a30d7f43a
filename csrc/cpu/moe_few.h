// The experts' forward pass on the CPU for a few tokens each, as in decoding: dot products, for which every weight is read once.
//
// Memory-bound: the floor is to read the chosen experts' weights, 3 C F numbers each. Experts are cut into pieces of their rows, so that
// all threads read, however few experts were chosen.
#pragma once
#include "dots.h"
#include "moe_plan.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace moe_pass {

constexpr int64_t FEW = 4;     // tokens of an expert on average, up to which the passes below are faster than products of tiles
constexpr int64_t PIECE = 64;  // rows of weights that are one piece of work

inline bool few_tokens(const Plan& plan) { return plan.p.N * plan.p.K <= FEW * plan.active_experts(); }

// Chosen experts and the rows of their weights, in pieces.
class WeightPieces {
 public:
  WeightPieces(const Plan& plan, int64_t rows) : in_expert_((rows + PIECE - 1) / PIECE), rows_(rows), experts_(plan.active_experts()) {
    if (!ready()) return;
    int64_t n = 0;
    for (int64_t e = 0; e < plan.p.E; e++)
      if (plan.rows(e) > 0) experts_[n++] = e;
    size_ = n * in_expert_;
  }
  bool ready() const { return experts_.data() != nullptr; }
  int64_t size() const { return size_; }
  int64_t expert(int64_t task) const { return experts_[task / in_expert_]; }
  int64_t row(int64_t task) const { return task % in_expert_ * PIECE; }
  int64_t rows(int64_t task) const { return smaller(PIECE, rows_ - row(task)); }

 private:
  int64_t in_expert_, rows_, size_ = 0;
  Buffer<int64_t> experts_;
};

template <class T>
struct FewContext {
  using Number = typename Dot<T>::Number;

  const MoeForward& args;
  const Plan& plan;
  const int64_t ld_x, ld_u;
  const WeightPieces features, columns;
  const Buffer<Number> u;  // (N, K, F): left rows of dot products, zeros behind them
  const Buffer<float> z;   // (N, K, C)

  FewContext(const MoeForward& a, const Plan& p)
      : args(a),
        plan(p),
        ld_x(round_up(p.p.C, Dot<T>::size)),
        ld_u(round_up(p.p.F, Dot<T>::size)),
        features(p, p.p.F),
        columns(p, p.p.C),
        u(p.p.N * p.p.K * ld_u),
        z(p.p.N * p.p.K * p.p.C) {}
  bool ready() const { return features.ready() && columns.ready() && u.data() && z.data(); }
};

// Some rows of an expert's weights meet its tokens, four at a time: those that are multiplied, and room for what comes of it.
template <class T>
class FewTokens {
 public:
  using Number = typename Dot<T>::Number;
  static constexpr int64_t AT_A_TIME = 4, LD_DOTS = PIECE + LANES, ROOM = AT_A_TIME * LD_DOTS;

  explicit FewTokens(int64_t ld) : ld_(ld), left_(AT_A_TIME * ld) {}
  bool ready() const { return left_.data() != nullptr; }

  // Row r, to be written: ld numbers.
  Number* row(int64_t r) const { return left_.data() + r * ld_; }

  // dots[r][j] of `tokens` rows with n rows of weights of C columns.
  void multiply(int64_t tokens, const T* weights, int64_t stride, int64_t n, int64_t C, float* dots) const {
    for (int64_t r = tokens; r < AT_A_TIME; r++) __builtin_memcpy(row(r), row(0), ld_ * sizeof(Number));  // four stand for three
    if (tokens == 1)
      dots_of_rows<1>(left_.data(), ld_, weights, stride, n, C, dots, LD_DOTS);
    else if (tokens == 2)
      dots_of_rows<2>(left_.data(), ld_, weights, stride, n, C, dots, LD_DOTS);
    else
      dots_of_rows<4>(left_.data(), ld_, weights, stride, n, C, dots, LD_DOTS);
  }

 private:
  int64_t ld_;
  Buffer<Number> left_;
};

// hidden and u for some features of an expert.
template <class T>
class FewFeatures {
 public:
  using Number = typename Dot<T>::Number;

  explicit FewFeatures(const FewContext<T>& context) : x_(context), tokens_(context.ld_x) {}
  bool ready() const { return tokens_.ready(); }

  void operator()(int64_t task) const {
    const MoeProblem& p = x_.plan.p;
    const int64_t e = x_.features.expert(task), f = x_.features.row(task), n = x_.features.rows(task), rows = x_.plan.rows(e);
    float a[FewTokens<T>::ROOM], b[FewTokens<T>::ROOM];
    for (int64_t i = 0; i < rows; i += FewTokens<T>::AT_A_TIME) {
      const int64_t tokens = smaller(FewTokens<T>::AT_A_TIME, rows - i);
      for (int64_t r = 0; r < tokens; r++) {
        const T* x = static_cast<const T*>(p.x) + x_.plan.token(e, i + r) * p.stride_x_row;
        Number* row = tokens_.row(r);
        __builtin_memset(row, 0, x_.ld_x * sizeof(Number));
        for_columns<float>(0, p.C, [&](int64_t c, auto count, int) { store(row + c, load(x + c, count), count); });
      }
      tokens_.multiply(tokens, x_.plan.template gate_up<T>(e, f), p.stride_gate_up_row, n, p.C, a);
      tokens_.multiply(tokens, x_.plan.template gate_up<T>(e, p.F + f), p.stride_gate_up_row, n, p.C, b);
      for (int64_t r = 0; r < tokens; r++)
        activate(x_.plan.pair(e, i + r), f, n, a + r * FewTokens<T>::LD_DOTS, b + r * FewTokens<T>::LD_DOTS);
    }
  }

 private:
  void activate(int64_t pair, int64_t f, int64_t n, const float* a, const float* b) const {
    const int64_t F = x_.plan.p.F;
    T* hidden = static_cast<T*>(x_.args.hidden) + pair * 2 * F + f;
    Number* u = x_.u.data() + pair * x_.ld_u + f;
    for_columns<float>(0, n, [&](int64_t c, auto count, int) {
      store(hidden + c, load(a + c, count), count);
      store(hidden + F + c, load(b + c, count), count);
      const Vec<float> a_c = load(hidden + c, count);
      store(u + c, Silu<T>(a_c).value * load(hidden + F + c, count), count);
    });
    if (f + n == F) __builtin_memset(u + n, 0, (x_.ld_u - F) * sizeof(Number));
  }

  const FewContext<T>& x_;
  FewTokens<T> tokens_;
};

// z for some rows of an expert's down.
template <class T>
class FewColumns {
 public:
  using Number = typename Dot<T>::Number;

  explicit FewColumns(const FewContext<T>& context) : x_(context), tokens_(context.ld_u) {}
  bool ready() const { return tokens_.ready(); }

  void operator()(int64_t task) const {
    const MoeProblem& p = x_.plan.p;
    const int64_t e = x_.columns.expert(task), c = x_.columns.row(task), n = x_.columns.rows(task), rows = x_.plan.rows(e);
    float dots[FewTokens<T>::ROOM];
    for (int64_t i = 0; i < rows; i += FewTokens<T>::AT_A_TIME) {
      const int64_t tokens = smaller(FewTokens<T>::AT_A_TIME, rows - i);
      for (int64_t r = 0; r < tokens; r++)
        __builtin_memcpy(tokens_.row(r), x_.u.data() + x_.plan.pair(e, i + r) * x_.ld_u, x_.ld_u * sizeof(Number));
      tokens_.multiply(tokens, x_.plan.template down<T>(e, c), p.stride_down_row, n, p.F, dots);
      for (int64_t r = 0; r < tokens; r++)
        __builtin_memcpy(x_.z.data() + x_.plan.pair(e, i + r) * p.C + c, dots + r * FewTokens<T>::LD_DOTS, n * sizeof(float));
    }
  }

 private:
  const FewContext<T>& x_;
  FewTokens<T> tokens_;
};

// y[n] = sum over a token's K pairs of w[pair] z[pair].
template <class T>
void combine(const MoeProblem& p, const float* z, void* y) {
  parallel_for(p.N, GRAIN / (p.K * p.C) + 1, [&](int64_t n) {
    T* row = static_cast<T*>(y) + n * p.C;
    for_columns<float>(0, p.C, [&](int64_t c, auto count, int) {
      Vec<float> total{};
      for (int64_t i = n * p.K; i < (n + 1) * p.K; i++) {
        total += load(z + i * p.C + c, count) * p.weights[i];
      }
      store(row + c, total, count);
    });
  });
}

template <class T>
Error forward_of_few(const MoeForward& args, const Plan& plan) {
  const FewContext<T> context(args, plan);
  if (!context.ready()) return OUT_OF_MEMORY;
  if (const Error error = run_tasks<FewFeatures<T>>(context.features.size(), context)) return error;
  if (const Error error = run_tasks<FewColumns<T>>(context.columns.size(), context)) return error;
  combine<T>(args.problem, context.z.data(), args.y);
  return nullptr;
}

}  // namespace moe_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
