// The fused cross-entropy's forward pass on the CPU: a part of the vocabulary is one task, which meets every token, a tile of logits at a
// time; then each token's parts are brought together.
//
// Compute-bound: 2 N C V FLOPs, and an exponential for each logit while its tile is in the cache. Moved: the weights once, x once for
// every 128 columns of the vocabulary (from the last-level cache, as a rule), and what is kept.
#pragma once
#include "cross_entropy_plan.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace surprise {

constexpr int64_t PARTS = 32;    // of the vocabulary, at most: 24 bytes of each are kept for each token
constexpr int64_t WRITTEN = 64;  // the logarithm and the exponential of a token's outputs count as so many numbers

template <class T, class Tile>
struct ForwardContext {
  const LinearCrossEntropyForward& args;
  const Tokens<T, Tile> tokens;
  const int64_t tiles, parts;
  const Stretches stretches;
  const Buffer<Statistics<float>> statistics;  // (parts, tokens)
  const Buffer<float> z_target;                // of each token

  explicit ForwardContext(const LinearCrossEntropyForward& a)
      : args(a),
        tokens(a.problem),
        tiles(pieces(a.problem.V, COLUMNS)),
        parts(smaller(PARTS, tiles)),
        stretches(parts, tokens.count()),
        statistics(parts * tokens.count()),
        z_target(tokens.count()) {}
  bool ready() const { return tokens.ready() && statistics.data() && z_target.data(); }
};

template <class T, class Tile>
class ForwardPart {
 public:
  explicit ForwardPart(const ForwardContext<T, Tile>& context) : x_(context), tiles_(context.tokens) {}
  bool ready() const { return tiles_.ready(); }

  void operator()(int64_t task) {
    const int64_t part = task / x_.stretches.size(), stretch = task % x_.stretches.size(), count = x_.tokens.count();
    const int64_t begin = part * x_.tiles / x_.parts, end = (part + 1) * x_.tiles / x_.parts;
    const int64_t from = x_.stretches.begin(stretch), to = x_.stretches.end(stretch);
    Statistics<float>* statistics = x_.statistics.data() + part * count;
    for (int64_t i = from; i < to; i++) statistics[i] = Statistics<float>(begin * COLUMNS);
    for (int64_t tile = begin; tile < end; tile++) {
      tiles_.choose(tile * COLUMNS, true);
      for (int64_t i = from; i < to; i += ROWS) see(i, smaller(ROWS, to - i), statistics + i);
    }
  }

 private:
  void see(int64_t i, int64_t n, Statistics<float>* statistics) const {
    const LinearCrossEntropyProblem& p = x_.tokens.p;
    const int64_t first = tiles_.first(), columns = tiles_.columns();
    const float* z = tiles_.project(i, n);
    for (int64_t r = 0; r < n; r++, z += COLUMNS) {
      const int64_t token = x_.tokens[i + r], target = p.target[token] - first;
      statistics[r].add(z, columns, first, p.options.label_smoothing != 0);
      if (0 <= target && target < columns) x_.z_target[i + r] = z[target];
      if (first + columns <= p.columns) keep(x_.args, token, first, columns, z, statistics[r].top);
    }
  }

  const ForwardContext<T, Tile>& x_;
  Tiles<T, Tile> tiles_;
};

// The outputs of a token, of what was seen of all its z.
template <class A>
void write(const LossOutputs& outputs, int64_t token, const Statistics<A>& seen, A z_target, int64_t V, const LossOptions& options) {
  const double top = seen.top, log_sum = __builtin_log(double(seen.sum));
  const A lse = A(top + log_sum);
  double loss = log_sum + (1 - options.label_smoothing) * (top - z_target) + options.z_loss * lse * lse;
  if (options.label_smoothing != 0) loss += options.label_smoothing * (top - seen.total / V);
  const double part = lse - top, rounding = (lse - part - top) + (part - log_sum);  // lse - (top + log_sum), exactly
  static_cast<A*>(outputs.loss)[token] = A(loss);
  static_cast<A*>(outputs.lse)[token] = lse;
  static_cast<A*>(outputs.correction)[token] = __builtin_isinf(lse) ? 1 : A(__builtin_exp(rounding));
  outputs.argmax[token] = seen.argmax;
}

template <class A>
void write_ignored(const LossOutputs& outputs, int64_t token) {
  void* const numbers[] = {outputs.loss, outputs.lse, outputs.correction};
  for (void* of_all : numbers) static_cast<A*>(of_all)[token] = 0;
  outputs.argmax[token] = -1;
}

template <class T, class Tile>
Error forward(const LinearCrossEntropyForward& args) {
  const LinearCrossEntropyProblem& p = args.problem;
  const ForwardContext<T, Tile> context(args);
  if (!context.ready()) return OUT_OF_MEMORY;
  const int64_t count = context.tokens.count();
  for (int64_t n = 0; n < p.N; n++) {
    if (p.target[n] != p.options.ignore_index) continue;
    write_ignored<float>(args.outputs, n);
    keep_nothing(args, n);
  }
  if (count == 0) return nullptr;
  if (const Error error = run_tasks<ForwardPart<T, Tile>>(context.parts * context.stretches.size(), context)) return error;
  parallel_for(count, GRAIN / (context.parts + WRITTEN), [&](int64_t i) {
    Statistics<float> all = context.statistics[i];
    for (int64_t part = 1; part < context.parts; part++) all.add(context.statistics[part * count + i]);
    write(args.outputs, context.tokens[i], all, context.z_target[i], p.V, p.options);
  });
  return nullptr;
}

}  // namespace surprise
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
