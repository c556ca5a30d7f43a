// The experts' backward pass on the CPU for a few tokens each, in two sweeps over the rows of all weights:
//
//   down      d += dy[c] down[c], and ddown[c] = sum over the expert's pairs of dy[c] (w u)
//   gate_up   dx += dhidden[f] gate_up[f], and dgate_up[f] = sum over the expert's pairs of dhidden[f] x
//
// so that a row of weights is read once, as its gradient is written, if that is needed (nor dx may be); experts without tokens get zeros. d
// and dx are summed up piece by piece of the rows, and then over the pieces in their order, whichever threads did them.
//
// Memory-bound: the floor is to read the chosen experts' weights and to write all gradients, past the caches where they are large.
#pragma once
#include "moe_few.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace moe_pass {

// One of the sweeps: over `rows` rows of `columns` weights of each expert, in pieces.
template <class T>
struct FewSweep {
  const Plan& plan;
  const bool summed;  // whether the products with the weights are needed
  const int64_t rows, columns, pairs, pieces;
  const Buffer<float> factors;  // (N K, rows): what the rows are multiplied with
  const Buffer<float> right;    // (N K, columns): what the factors are multiplied with in the gradient
  const Buffer<float> sums;     // (pieces, N K, columns)
  T* const gradient;            // (E, rows, columns), or null
  const bool past_cache;

  FewSweep(const Plan& p, bool summed_, int64_t rows_, int64_t columns_, void* gradient_)
      : plan(p),
        summed(summed_),
        rows(rows_),
        columns(columns_),
        pairs(p.p.N * p.p.K),
        pieces((rows + PIECE - 1) / PIECE),
        factors(pairs * rows),
        right(pairs * columns),
        sums(pieces * pairs * columns),
        gradient(static_cast<T*>(gradient_)),
        past_cache(gradient_past_cache<T>(gradient_, p.p.E * rows, columns)) {}
  bool ready() const { return factors.data() && right.data() && sums.data(); }
};

// weights(e, row): a row of an expert's weights.
template <class T, class Weights>
class FewRows {
 public:
  struct Context {
    const FewSweep<T>& sweep;
    const Weights& weights;
    int64_t stride;  // of rows
  };

  explicit FewRows(const Context& context) : x_(context.sweep), plan_(x_.plan), weights_(context.weights), stride_(context.stride) {}
  bool ready() const { return true; }

  void operator()(int64_t task) const {
    const int64_t e = task / x_.pieces, piece = task % x_.pieces, first = piece * PIECE, n = smaller(PIECE, x_.rows - first);
    if (plan_.rows(e) == 0) {
      if (x_.gradient) clear(gradient(e, first), n * x_.columns, x_.past_cache);
      return;
    }
    float* sums = x_.sums.data() + piece * x_.pairs * x_.columns;
    for (int64_t i = 0; i < plan_.rows(e); i++) __builtin_memset(sums + plan_.pair(e, i) * x_.columns, 0, x_.columns * sizeof(float));
    with_stores(x_.past_cache, [&](auto put) {
      int64_t j = 0;
      for (; j + AT_A_TIME <= n; j += AT_A_TIME) pass<AT_A_TIME>(e, first + j, sums, put);
      for (; j < n; j++) pass<1>(e, first + j, sums, put);
    });
  }

 private:
  static constexpr int AT_A_TIME = 4;  // rows: the sums are read and written once for them

  T* gradient(int64_t e, int64_t row) const { return x_.gradient + (e * x_.rows + row) * x_.columns; }

  template <int ROWS, class Put>
  void pass(int64_t e, int64_t row, float* sums, const Put& put) const {
    if (x_.summed) add<ROWS>(e, row, sums);
    if (x_.gradient)
      for (int r = 0; r < ROWS; r++) write_gradient(e, row + r, put);
  }

  template <int ROWS>
  void add(int64_t e, int64_t row, float* sums) const {
    const T* weights = weights_(e, row);
    for (int64_t i = 0; i < plan_.rows(e); i++) {
      const float* factor = x_.factors.data() + plan_.pair(e, i) * x_.rows + row;
      float* sum = sums + plan_.pair(e, i) * x_.columns;
      for_columns<float>(0, x_.columns, [&](int64_t c, auto count, int) {
        Vec<float> total = load(sum + c, count);
        for (int r = 0; r < ROWS; r++) total += factor[r] * load(weights + r * stride_ + c, count);
        store(sum + c, total, count);
      });
    }
  }

  template <class Put>
  void write_gradient(int64_t e, int64_t row, const Put& put) const {
    for_columns<float>(0, x_.columns, [&](int64_t c, auto count, int) {
      Vec<float> total{};
      for (int64_t i = 0; i < plan_.rows(e); i++) {
        const int64_t pair = plan_.pair(e, i);
        total += x_.factors[pair * x_.rows + row] * load(x_.right.data() + pair * x_.columns + c, count);
      }
      put(gradient(e, row) + c, total, count);
    });
  }

  const FewSweep<T>& x_;
  const Plan& plan_;
  const Weights& weights_;
  const int64_t stride_;
};

template <class T, class Weights>
Error run_sweep(const FewSweep<T>& sweep, int64_t stride, const Weights& weights) {
  using Worker = FewRows<T, Weights>;
  return run_tasks<Worker>(sweep.plan.p.E * sweep.pieces, typename Worker::Context{sweep, weights, stride});
}

// The tokens' rows, one for each pair.
template <class T>
void widen(const Plan& plan, const void* tokens, int64_t stride, int64_t columns, float* to) {
  for (int64_t pair = 0; pair < plan.p.N * plan.p.K; pair++) {
    const T* row = static_cast<const T*>(tokens) + pair / plan.p.K * stride;
    for_columns<float>(0, columns, [&](int64_t c, auto count, int) { store(to + pair * columns + c, load(row + c, count), count); });
  }
}

// row = the sum of one pair's, or of `pairs` neighbouring pairs', sums over all pieces.
template <class T, class To>
void add_pieces(const FewSweep<T>& sweep, int64_t pair, int64_t pairs, To* row) {
  for_columns<float>(0, sweep.columns, [&](int64_t c, auto count, int) {
    Vec<float> total{};
    for (int64_t i = pair; i < pair + pairs; i++)
      for (int64_t piece = 0; piece < sweep.pieces; piece++)
        total += load(sweep.sums.data() + (piece * sweep.pairs + i) * sweep.columns + c, count);
    store(row + c, total, count);
  });
}

// u of a pair times its weight.
template <class T>
void weigh(const T* hidden, int64_t F, float w, float* wu) {
  for_columns<float>(0, F, [&](int64_t f, auto count, int) {
    store(wu + f, w * (Silu<T>(load(hidden + f, count)).value * load(hidden + F + f, count)), count);
  });
}

template <class T>
Error backward_of_few(const MoeBackward& args, const Plan& plan) {
  const MoeProblem& p = plan.p;
  const FewSweep<T> down(plan, true, p.C, p.F, args.ddown), gate_up(plan, args.dx != nullptr, 2 * p.F, p.C, args.dgate_up);
  const Buffer<float> d(p.F);
  if (!down.ready() || !gate_up.ready() || !d.data()) return OUT_OF_MEMORY;
  const auto hidden = [&](int64_t pair) { return static_cast<const T*>(args.hidden) + pair * 2 * p.F; };
  widen<T>(plan, args.dy, args.stride_dy_row, p.C, down.factors.data());
  widen<T>(plan, p.x, p.stride_x_row, p.C, gate_up.right.data());
  for (int64_t pair = 0; pair < down.pairs; pair++) weigh(hidden(pair), p.F, p.weights[pair], down.right.data() + pair * p.F);
  if (const Error error = run_sweep(down, p.stride_down_row, [&](int64_t e, int64_t c) { return plan.down<T>(e, c); })) return error;
  for (int64_t pair = 0; pair < down.pairs; pair++) {
    add_pieces(down, pair, 1, d.data());
    float* da = gate_up.factors.data() + pair * 2 * p.F;
    args.dweights[pair] =
        differentiate_row(hidden(pair), p.F, p.weights[pair], p.F, d.data(), da, da + p.F, down.right.data() + pair * p.F);
  }
  if (args.dx == nullptr && args.dgate_up == nullptr) return nullptr;
  if (const Error error = run_sweep(gate_up, p.stride_gate_up_row, [&](int64_t e, int64_t f) { return plan.gate_up<T>(e, f); }))
    return error;
  if (args.dx == nullptr) return nullptr;
  parallel_for(p.N, 1, [&](int64_t n) { add_pieces(gate_up, n * p.K, p.K, static_cast<T*>(args.dx) + n * p.C); });
  return nullptr;
}

}  // namespace moe_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
