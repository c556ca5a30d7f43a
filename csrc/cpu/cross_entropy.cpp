// Cross-entropy on the CPU. The mathematics: fastprimer/ops/cross_entropy.py; the arguments: csrc/cross_entropy.h.
//
// Of given logits it is memory-bound: forward reads them once, backward reads and writes them once, and each computes an exponential for
// every logit, which takes about as long as the memory does for one thread.
#include "cross_entropy_backward.h"
#include "cross_entropy_forward.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace {

using namespace surprise;

template <class T>
constexpr int64_t PIECE = 16384 / sizeof(T);  // numbers of a row: two sweeps of them meet them, and the next ones, in the L1 cache
constexpr int64_t BLOCK = 256;                // the same, in backward
constexpr int64_t AHEAD = 512;                // numbers further on are asked for there

template <class T>
const T* row_of(const CrossEntropyProblem& p, int64_t token) {
  return static_cast<const T*>(p.logits) + token * p.stride_logits_row;
}

template <class T>
void forward_row(const CrossEntropyForward& args, int64_t token) {
  using A = Wide<T>;
  const CrossEntropyProblem& p = args.problem;
  const int64_t target = p.target[token];
  if (target == p.options.ignore_index) return write_ignored<A>(args.outputs, token);
  const T* row = row_of<T>(p, token);
  const bool capped = p.options.softcap > 0, smoothed = p.options.label_smoothing != 0;
  alignas(REGISTER_BYTES) A z[PIECE<T>];
  Statistics<A> statistics(0);
  for (int64_t first = 0; first < p.V; first += PIECE<T>) {
    const int64_t n = smaller(PIECE<T>, p.V - first);
    if (capped) {
      cap(row + first, nullptr, n, p.options.softcap, z);
      statistics.add(z, n, first, smoothed);
    } else {
      statistics.add(row + first, n, first, smoothed);
    }
  }
  A z_target;
  cap(row + target, nullptr, 1, p.options.softcap, &z_target);
  write(args.outputs, token, statistics, z_target, p.V, p.options);
}

// In blocks, gradients first and then their rounding: together they are so long a chain of instructions that too few registers of logits
// are under way at a time.
template <class T, bool CAPPED, class Put>
void differentiate(const T* logits, int64_t V, int64_t target, Gradient<Wide<T>, CAPPED> gradient, T* dlogits, Put put) {
  using A = Wide<T>;
  alignas(REGISTER_BYTES) A room[BLOCK];
  A* const dz = room;
  for (int64_t first = 0; first < V; first += BLOCK) {
    const int64_t n = smaller(BLOCK, V - first), here = target - first;
    const T* from = logits + first;
    T* to = dlogits + first;
    for_columns<T>(0, n, [=](int64_t v, auto count, int) {
      __builtin_prefetch(from + AHEAD + v);
      store_in_turn(dz + v, gradient.template of<T>(gradient.z(load(from + v, count))), count);
    });
    if (0 <= here && here < n) {
      A z;
      cap(from + here, nullptr, 1, gradient.softcap(), &z);
      dz[place_in_turn<T>(here, n)] -= gradient.share(z);
    }
    fill_columns({to}, 0, n, put, [=](int64_t v, auto count) { return Outputs{Flushable<T>{load_in_turn(dz + v, count)}}; });
  }
}

template <class T, class Put>
void backward_row(const CrossEntropyBackward& args, int64_t token, Put put) {
  using A = Wide<T>;
  const CrossEntropyProblem& p = args.problem;
  T* dlogits = static_cast<T*>(args.dlogits) + token * p.V;
  if (p.target[token] == p.options.ignore_index) {
    __builtin_memset(dlogits, 0, p.V * sizeof(T));
    return;
  }
  by_cap(p.options.softcap, [&](auto capped) {
    const Gradient<A, decltype(capped)::value> gradient(args.gradients, token, p.V, p.options);
    differentiate(row_of<T>(p, token), p.V, p.target[token], gradient, dlogits, put);
  });
}

}  // namespace

Error cross_entropy_forward(const CrossEntropyForward& args) {
  return by_dtype(args.problem.dtype, [&](auto element) -> Error {
    parallel_for(args.problem.N, GRAIN / args.problem.V + 1, [&](int64_t n) { forward_row<decltype(element)>(args, n); });
    return nullptr;
  });
}

Error cross_entropy_backward(const CrossEntropyBackward& args) {
  return by_dtype(args.problem.dtype, [&](auto element) -> Error {
    using T = decltype(element);
    const CrossEntropyProblem& p = args.problem;
    const int64_t row_bytes = p.V * sizeof(T);
    with_stores(past_cache(args.dlogits, p.N, row_bytes, row_bytes),
                [&](auto put) { parallel_for(p.N, GRAIN / p.V + 1, [&](int64_t n) { backward_row<T>(args, n, put); }); });
    return nullptr;
  });
}

Error linear_cross_entropy_forward(const LinearCrossEntropyForward& args) {
  return by_tile_or_force(args.problem.dtype, [&](auto element, auto tile) { return forward<decltype(element), decltype(tile)>(args); });
}

Error linear_cross_entropy_backward(const LinearCrossEntropyBackward& args) {
  return by_tile_or_force(args.problem.dtype, [&](auto element, auto tile) { return backward<decltype(element), decltype(tile)>(args); });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
