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

// The activation in the accumulator type. What it does not need is compiled away: clamps, a scale and an offset, or the cubic term; with
// neither, it is SwiGLU itself.
template <class A, bool CLAMPS, bool CUBIC>
struct Parameters {
  A alpha, beta, limit, offset;

  explicit Parameters(const Activation& a) : alpha(A(a.alpha)), beta(A(a.beta)), limit(A(a.limit)), offset(A(a.offset)) {}

  Vec<A> clamped_gate(Vec<A> gate) const { return CLAMPS ? at_most(gate, limit) : gate; }
  Vec<A> clamped_up(Vec<A> up) const { return CLAMPS ? at_least(at_most(up, limit), -limit) : up; }
  Vec<A> factor(Vec<A> b) const { return CLAMPS ? b + offset : b; }
  // Where it clamps, a clamp passes no gradient on.
  Vec<A> past_gate(Vec<A> dy, Vec<A> gate) const { return CLAMPS ? gate > limit ? Vec<A>{} : dy : dy; }
  Vec<A> past_up(Vec<A> dy, Vec<A> up) const { return CLAMPS ? (up > limit) | (up < -limit) ? Vec<A>{} : dy : dy; }

  Vec<A> exponent(Vec<A> a) const { return CUBIC ? a * (alpha + beta * (a * a)) : CLAMPS ? alpha * a : a; }
  Vec<A> slope(Vec<A> sigma, Vec<A> p, Vec<A> a) const {
    if (!CUBIC) return sigma + (CLAMPS ? alpha * p : p);
    return sigma + alpha * p + 3 * beta * p * a * a;
  }
};

// run(element, parameters) for the type of the tensors and what this activation needs.
template <class Args, class Run>
Error by_activation(const Args& args, const Run& run) {
  return by_dtype(args.dtype, [&](auto element) {
    using A = Wide<decltype(element)>;
    const Activation& a = args.activation;
    const bool clamps = a.limit != __builtin_inf() || a.offset != 0 || (a.beta == 0 && a.alpha != 1);
    if (a.beta == 0) return clamps ? run(element, Parameters<A, true, false>(a)) : run(element, Parameters<A, false, false>(a));
    return clamps ? run(element, Parameters<A, true, true>(a)) : run(element, Parameters<A, false, true>(a));
  });
}

// Columns of which all powers are computed first, and what is made of them after that: one chain of instructions from a load to a store is
// so long that the processor, which looks ahead for a few dozen that wait, waits itself; two shorter ones it works on side by side.
constexpr int64_t STAGE = 512;

// body(first, last, sigma) for columns first .. last - 1, up to STAGE at a time: sigma(c, n, a) is the sigmoid of the exponents of columns
// from c on, where a is the clamped gate.
template <class T, class P, class Body>
ALWAYS_INLINE void in_stages(const T* gate, const P& parameters, int64_t begin, int64_t end, const Body& body) {
  alignas(REGISTER_BYTES) Wide<T> powers[STAGE];
  for (int64_t first = begin; first < end; first += STAGE) {
    const int64_t last = end - first < STAGE ? end : first + STAGE;
    for_columns<T>(first, last, [&](int64_t c, auto n, int) __attribute__((always_inline)) {
      store_in_turn(powers + c - first, Sigmoid<T>::power(parameters.exponent(parameters.clamped_gate(load(gate + c, n)))), n);
    });
    body(first, last, [&](int64_t c, auto n, Vec<Wide<T>> a) __attribute__((always_inline)) {
      return Sigmoid<T>(parameters.exponent(a), load_in_turn(powers + c - first, n));
    });
  }
}

template <class T, class P>
Error forward(const SwiGluForward& args, const P& parameters) {
  using A = Wide<T>;
  expect_writes(args.y, args.N * args.F * sizeof(T));
  const int64_t row_bytes = args.F * sizeof(T);
  const bool past = past_cache(args.y, args.N, row_bytes, row_bytes);
  for_pieces(args.N, args.F, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = row_of<const T>(args.gate, row, args.stride_gate_row);
    const T* up = row_of<const T>(args.up, row, args.stride_up_row);
    T* y = row_of<T>(args.y, row, args.F);
    with_stores(past, [&](auto put) {
      in_stages(gate, parameters, begin, end, [&](int64_t first, int64_t last, const auto& sigmoid) {
        fill_columns({y}, first, last, put, [&](int64_t c, auto n) __attribute__((always_inline)) {
          const Vec<A> a = parameters.clamped_gate(load(gate + c, n)), b = parameters.clamped_up(load(up + c, n));
          return Outputs{Flushable<T>{a * sigmoid(c, n, a).value * parameters.factor(b)}};
        });
      });
    });
  });
  return nullptr;
}

template <class T, class P>
Error backward(const SwiGluBackward& args, const P& parameters) {
  using A = Wide<T>;
  expect_writes(args.dgate, args.N * args.stride_dgate_row * sizeof(T));
  if (args.stride_dgate_row == args.F) expect_writes(args.dup, args.N * args.F * sizeof(T));  // else dgate's other half
  const int64_t row_bytes = args.F * sizeof(T);
  const bool past = past_cache(args.dgate, args.N, row_bytes, args.stride_dgate_row * sizeof(T)) &&
                    past_cache(args.dup, args.N, row_bytes, args.stride_dup_row * sizeof(T));
  for_pieces(args.N, args.F, [&](int64_t row, int64_t begin, int64_t end) {
    const T* dy = row_of<const T>(args.dy, row, args.stride_dy_row);
    const T* gate = row_of<const T>(args.gate, row, args.stride_gate_row);
    const T* up = row_of<const T>(args.up, row, args.stride_up_row);
    T* dgate = row_of<T>(args.dgate, row, args.stride_dgate_row);
    T* dup = row_of<T>(args.dup, row, args.stride_dup_row);
    with_stores(past, [&](auto put) {
      in_stages(gate, parameters, begin, end, [&](int64_t first, int64_t last, const auto& sigmoid) {
        fill_columns({dgate, dup}, first, last, put, [&](int64_t c, auto n) __attribute__((always_inline)) {
          const Vec<A> dy_c = load(dy + c, n), gate_c = load(gate + c, n), up_c = load(up + c, n);
          const Vec<A> a = parameters.clamped_gate(gate_c), b = parameters.clamped_up(up_c);
          const auto sigma = sigmoid(c, n, a);
          const Vec<A> slope = parameters.slope(sigma.value, a * sigma.slope, a);
          const Vec<A> dgate_c = parameters.past_gate(dy_c, gate_c) * slope * parameters.factor(b);
          const Vec<A> dup_c = parameters.past_up(dy_c, up_c) * (a * sigma.value);
          return Outputs{Flushable<T>{dgate_c}, Flushable<T>{dup_c}};
        });
      });
    });
  });
  return nullptr;
}

}  // namespace

Error swiglu_forward(const SwiGluForward& args) {
  return by_activation(args, [&](auto element, const auto& parameters) { return forward<decltype(element)>(args, parameters); });
}

Error swiglu_backward(const SwiGluBackward& args) {
  return by_activation(args, [&](auto element, const auto& parameters) { return backward<decltype(element)>(args, parameters); });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
