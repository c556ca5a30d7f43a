// SwiGLU and its relatives on the CPU. The mathematics: fastprimer/ops/swiglu.py; the arguments: csrc/swiglu.h.
//
// Memory-bound: forward reads 2 and writes 1 number for each of y, backward reads 3 and writes 2; between them stand about 30
// instructions for a register of numbers, most of them the exponential's.
#include "swiglu.h"

#include "columns.h"
#include "memory.h"
#include "parallel.h"
#include "simd_math.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace {

constexpr int64_t BLOCK = 1 << 13;  // columns of a row that are one piece of work

// body(row, begin, end) for pieces of at most BLOCK columns of every row.
template <class Body>
void for_pieces(int64_t N, int64_t F, const Body& body) {
  const int64_t pieces = (F + BLOCK - 1) / BLOCK, width = F < BLOCK ? F : BLOCK;
  parallel_for(N * pieces, GRAIN / width, [&](int64_t i) {
    const int64_t row = i / pieces, begin = i % pieces * BLOCK;
    body(row, begin, F - begin < BLOCK ? F : begin + BLOCK);
  });
}

template <class T, class P>
T* row_of(P* data, int64_t row, int64_t stride_row) {
  return static_cast<T*>(data) + row * stride_row;
}

// The activation in the accumulator type. PLAIN is SwiGLU itself (alpha 1, beta 0, no limit, no offset), for which everything else
// is compiled away.
template <class A, bool PLAIN>
struct Parameters {
  A alpha, beta, limit, offset;

  explicit Parameters(const Activation& a) : alpha(A(a.alpha)), beta(A(a.beta)), limit(A(a.limit)), offset(A(a.offset)) {}

  Vec<A> clamped_gate(Vec<A> gate) const { return PLAIN ? gate : at_most(gate, limit); }
  Vec<A> clamped_up(Vec<A> up) const { return PLAIN ? up : at_least(at_most(up, limit), -limit); }
  Vec<A> factor(Vec<A> b) const { return PLAIN ? b : b + offset; }

  Vec<A> exponent(Vec<A> a) const {
    if (PLAIN) return a;
    const Vec<A> square = at_most(a * a, A(1e30));  // infinity times a beta of zero would be NaN
    return a * (alpha + beta * square);
  }
  Vec<A> slope(Vec<A> sigma, Vec<A> p, Vec<A> a) const { return PLAIN ? sigma + p : sigma + alpha * p + 3 * beta * p * a * a; }
};

bool plain(const Activation& a) { return a.alpha == 1 && a.beta == 0 && a.limit == __builtin_inf() && a.offset == 0; }

template <class T, bool PLAIN>
Error forward(const SwiGluForward& args) {
  using A = Wide<T>;
  expect_writes(args.y, args.N * args.F * sizeof(T));
  const int64_t row_bytes = args.F * sizeof(T);
  const bool past = past_cache(args.y, args.N, row_bytes, row_bytes);
  for_pieces(args.N, args.F, [&](int64_t row, int64_t begin, int64_t end) {
    const Parameters<A, PLAIN> parameters(args.activation);
    const T* gate = row_of<const T>(args.gate, row, args.stride_gate_row);
    const T* up = row_of<const T>(args.up, row, args.stride_up_row);
    T* y = row_of<T>(args.y, row, args.F);
    with_stores(past, [&](auto put) {
      fill_columns({y}, begin, end, put, [&](int64_t c, auto n) __attribute__((always_inline)) {
        const Vec<A> a = parameters.clamped_gate(load(gate + c, n)), b = parameters.clamped_up(load(up + c, n));
        const Sigmoid<T> sigma(parameters.exponent(a));
        return Outputs{Flushable<T>{a * sigma.value * parameters.factor(b)}};
      });
    });
  });
  return nullptr;
}

template <class T, bool PLAIN>
Error backward(const SwiGluBackward& args) {
  using A = Wide<T>;
  expect_writes(args.dgate, args.N * args.stride_dgate_row * sizeof(T));
  if (args.stride_dgate_row == args.F) expect_writes(args.dup, args.N * args.F * sizeof(T));  // else dgate's other half
  const int64_t row_bytes = args.F * sizeof(T);
  const bool past = past_cache(args.dgate, args.N, row_bytes, args.stride_dgate_row * sizeof(T)) &&
                    past_cache(args.dup, args.N, row_bytes, args.stride_dup_row * sizeof(T));
  for_pieces(args.N, args.F, [&](int64_t row, int64_t begin, int64_t end) {
    const Parameters<A, PLAIN> parameters(args.activation);
    const T* dy = row_of<const T>(args.dy, row, args.stride_dy_row);
    const T* gate = row_of<const T>(args.gate, row, args.stride_gate_row);
    const T* up = row_of<const T>(args.up, row, args.stride_up_row);
    T* dgate = row_of<T>(args.dgate, row, args.stride_dgate_row);
    T* dup = row_of<T>(args.dup, row, args.stride_dup_row);
    with_stores(past, [&](auto put) {
      fill_columns({dgate, dup}, begin, end, put, [&](int64_t c, auto n) __attribute__((always_inline)) {
        const Vec<A> dy_c = load(dy + c, n), gate_c = load(gate + c, n), up_c = load(up + c, n);
        const Vec<A> a = parameters.clamped_gate(gate_c), b = parameters.clamped_up(up_c);
        const Sigmoid<T> sigma(parameters.exponent(a));
        const Vec<A> p = a * sigma.slope;
        // Where it clamps, a clamp passes no gradient on.
        const Vec<A> dy_a = PLAIN ? dy_c : gate_c > parameters.limit ? Vec<A>{} : dy_c;
        const Vec<A> dy_b = PLAIN ? dy_c : (up_c > parameters.limit) | (up_c < -parameters.limit) ? Vec<A>{} : dy_c;
        const Vec<A> dgate_c = dy_a * parameters.slope(sigma.value, p, a) * parameters.factor(b);
        const Vec<A> dup_c = dy_b * (a * sigma.value);
        return Outputs{Flushable<T>{dgate_c}, Flushable<T>{dup_c}};
      });
    });
  });
  return nullptr;
}

}  // namespace

Error swiglu_forward(const SwiGluForward& args) {
  return by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    return plain(args.activation) ? forward<T, true>(args) : forward<T, false>(args);
  });
}

Error swiglu_backward(const SwiGluBackward& args) {
  return by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    return plain(args.activation) ? backward<T, true>(args) : backward<T, false>(args);
  });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
