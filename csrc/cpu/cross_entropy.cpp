// Cross-entropy on the CPU. The mathematics: fastprimer/ops/cross_entropy.py; the arguments: csrc/cross_entropy.h.
//
// Of given logits it is memory-bound where many threads share the memory, else bound by the exponential: forward reads them once and
// computes one for each, backward reads and writes them once and computes one again. A piece of a row at a time stays in the L1 cache.
#include "cross_entropy_backward.h"
#include "cross_entropy_forward.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace {

using namespace surprise;

constexpr int64_t PIECE = 2048;  // numbers of a row

template <class A>
struct Piece {
  alignas(REGISTER_BYTES) A z[PIECE];
};

// body(first, n) for the pieces of a token's row of logits, whose z then lies in `piece`.
template <class T, class Body>
void for_pieces(const CrossEntropyProblem& p, int64_t token, Piece<Wide<T>>& piece, const Body& body) {
  const T* row = static_cast<const T*>(p.logits) + token * p.stride_logits_row;
  for (int64_t first = 0; first < p.V; first += PIECE) {
    const int64_t n = smaller(PIECE, p.V - first);
    cap(row + first, nullptr, n, p.options.softcap, piece.z);
    body(first, n);
  }
}

template <class T>
void forward_row(const CrossEntropyForward& args, int64_t token) {
  using A = Wide<T>;
  const CrossEntropyProblem& p = args.problem;
  if (p.target[token] == p.options.ignore_index) return write(args.outputs, token, A(0), A(0), -1);
  Piece<A> piece;
  Statistics<A> statistics(0);
  A z_target = 0;
  for_pieces<T>(p, token, piece, [&](int64_t first, int64_t n) {
    const int64_t target = p.target[token] - first;
    statistics.add(piece.z, n, first);
    if (0 <= target && target < n) z_target = piece.z[target];
  });
  const A lse = statistics.lse();
  write(args.outputs, token, statistics.loss(lse, z_target, p.V, p.options), lse, statistics.argmax);
}

template <class T>
void backward_row(const CrossEntropyBackward& args, int64_t token) {
  using A = Wide<T>;
  const CrossEntropyProblem& p = args.problem;
  T* dlogits = static_cast<T*>(args.dlogits) + token * p.V;
  if (p.target[token] == p.options.ignore_index) {
    __builtin_memset(dlogits, 0, p.V * sizeof(T));
    return;
  }
  const auto value = [token](const void* numbers) { return numbers ? static_cast<const A*>(numbers)[token] : A(0); };
  const Gradient<A> gradient(value(args.gradients.dloss), value(args.gradients.dlse), value(args.gradients.lse), p.V, p.options);
  Piece<A> piece;
  for_pieces<T>(p, token, piece, [&](int64_t first, int64_t n) {
    gradient.template operator()<T>(piece.z, n, p.target[token] - first);
    for_columns<A>(0, n, [&](int64_t v, auto count, int) { store(dlogits + first + v, load(piece.z + v, count), count); });
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
    parallel_for(args.problem.N, GRAIN / args.problem.V + 1, [&](int64_t n) { backward_row<decltype(element)>(args, n); });
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
