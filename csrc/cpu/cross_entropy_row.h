// One token's loss and its gradient, a piece of the vocabulary at a time. The mathematics: fastprimer/ops/cross_entropy.py.
#pragma once
#include "columns.h"
#include "cross_entropy.h"
#include "simd_math.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace surprise {

constexpr double INFINITE = __builtin_inf();

// Behind the n numbers of a tail stands `other`.
template <class T, class N>
inline Vec<Wide<T>> load_or(const T* p, N n, Wide<T>) {
  return load(p, n);
}
template <class T>
inline Vec<Wide<T>> load_or(const T* p, int64_t n, Wide<T> other) {
  Vec<Wide<T>> v = load(p, n);
  if constexpr (sizeof(v[0]) == sizeof(float)) return lane_numbers() < static_cast<float>(n) ? v : Vec<float>{} + other;
  for (int64_t i = n; i < VecOf<Wide<T>>::size; i++) v[i] = other;
  return v;
}

// e^x for x <= 0, by a power of two whose polynomial is as good as it needs to be for a gradient of T, or for a sum, in float32, of
// exponentials of T. They are most of what a pass over logits computes.
template <class T>
constexpr int GRADIENT_DEGREE = sizeof(T) == 4 ? 6 : (is_bfloat16<T> ? 3 : 4);
template <class T>
constexpr int SUM_DEGREE = sizeof(T) == 4 ? 6 : 5;
template <int DEGREE>
ALWAYS_INLINE Vec<float> exponential(Vec<float> x) {
  return exp2_of<DEGREE>(x * LOG2_E);
}
template <int>
inline Vec<double> exponential(Vec<double> x) {
  return exp_of_negative(x);
}

// body(Capped<>) for a softcap or none: within a sweep it is settled.
template <bool CAPPED>
struct Capped {
  static constexpr bool value = CAPPED;
};
template <class Body>
inline void by_cap(double softcap, const Body& body) {
  if (softcap > 0)
    body(Capped<true>{});
  else
    body(Capped<false>{});
}

// z of logits, and of their bias where there is one.
template <class A, class T>
inline void cap(const T* logits, const float* bias, int64_t n, double softcap, A* z) {
  const A c = A(softcap), reciprocal = A(1 / softcap);
  by_cap(softcap, [=](auto capped) {
    for_columns<A>(0, n, [=](int64_t v, auto count, int) {
      Vec<A> l = load(logits + v, count);
      if constexpr (sizeof(A) == sizeof(float))
        if (bias) l += load(bias + v, count);
      if constexpr (decltype(capped)::value) l = c * tanh_of(l * reciprocal);
      store(z + v, l, count);
    });
  });
}

// The largest of n numbers, a register of them at a time. NaN is none of them.
template <class T>
inline Wide<T> largest_number(const T* z, int64_t n) {
  using A = Wide<T>;
  Vec<A> tops[4];
  for (Vec<A>& v : tops) v = Vec<A>{} - A(INFINITE);
  for_columns<A, 4>(0, n, [&](int64_t v, auto count, int i) { tops[i] = at_least(tops[i], load_or(z + v, count, -A(INFINITE))); });
  for (int i = 1; i < 4; i++) tops[0] = at_least(tops[0], tops[i]);
  return largest(tops[0]);
}

// The best of at least WORDS numbers of 16 bits, by their bits as integers, of which better(a, b) are the better ones: twice as many at a
// time as numbers are, and none of them is converted. NaN where it met NaN.
constexpr int64_t WORDS = REGISTER_BYTES / 2;
typedef uint16_t Words __attribute__((vector_size(REGISTER_BYTES)));
template <class T>
ALWAYS_INLINE Words words_at(const T* z) {
  return *reinterpret_cast<const Unaligned<uint16_t>::type*>(z);
}
template <class Integers, class T, class Better>
ALWAYS_INLINE float best_of(const T* z, int64_t n, const Better& better) {
  constexpr uint16_t minus_infinity = is_bfloat16<T> ? 0xFF80 : 0xFC00;
  const auto at = [z](int64_t v) { return reinterpret_cast<Integers>(words_at(z + v)); };
  Integers best = reinterpret_cast<Integers>(Words{} + minus_infinity), others = best;
  int64_t v = 0;
  for (; v + 4 * WORDS <= n; v += 4 * WORDS) {
    best = better(better(at(v), at(v + WORDS)), best);
    others = better(better(at(v + 2 * WORDS), at(v + 3 * WORDS)), others);
  }
  for (; v + WORDS <= n; v += WORDS) best = better(at(v), best);
  best = better(better(at(n - WORDS), others), best);  // some for the second time
  alignas(REGISTER_BYTES) T found[WORDS];
  __builtin_memcpy(found, &best, sizeof(found));
  Vec<float> a, b;
  load_both(found, a, b);
  return any((a != a) | (b != b)) ? __builtin_nanf("") : largest(at_least(a, b));
}

// The largest number is the largest integer with a sign or, where all numbers are negative, the smallest one without.
template <class T>
inline Wide<T> largest_of(const T* z, int64_t n) {
  if constexpr (sizeof(T) == 2) {
    typedef int16_t Signed __attribute__((vector_size(REGISTER_BYTES)));
    float most = __builtin_nanf("");
    if (n >= WORDS) most = best_of<Signed>(z, n, [](Signed a, Signed b) { return a > b ? a : b; });
    if (most == -float(INFINITE)) most = best_of<Words>(z, n, [](Words a, Words b) { return a < b ? a : b; });
    if (most == most) return most;
  }
  return largest_number(z, n);
}

// Some registers of exp(z - shift) in two steps: each is a chain of instructions that wait for each other, on units of the processor that
// the other step leaves free.
template <class T>
class Exponentials {
 public:
  static constexpr int REGISTERS = REGISTER_BYTES == 64 ? 4 : 2;  // AVX-512 has twice as many
  static constexpr int64_t COUNT = REGISTERS * LANES;

  // shift: in units of log 2.
  ALWAYS_INLINE void begin(const T* z, float shift) {
#pragma GCC unroll 4
    for (int i = 0; i < REGISTERS; i += 2) {
      Vec<float> a, b;
      load_both(z + i * LANES, a, b);
      powers_.begin(i, product_less(a, LOG2_E, shift));
      powers_.begin(i + 1, product_less(b, LOG2_E, shift));
    }
  }
  ALWAYS_INLINE void add_to(Vec<float> (&sums)[2]) const {
    Vec<float> values[REGISTERS];
    powers_.finish(values);
#pragma GCC unroll 4
    for (int i = 0; i < REGISTERS; i++) sums[i % 2] += values[i];
  }

 private:
  Exp2<SUM_DEGREE<T>, REGISTERS> powers_;
};

// The sum of exp(z - shift) over n columns. The next ones are asked for in the meantime.
template <class T>
inline Wide<T> sum_one_by_one(const T* z, int64_t n, Wide<T> shift) {
  using A = Wide<T>;
  return sum_columns<T>(n, [&](int64_t v, auto count) {
    __builtin_prefetch(z + n + v);
    return exponential<SUM_DEGREE<T>>(load_or(z + v, count, -A(INFINITE)) - shift);
  });
}

// The same, each step of some registers beside the other step of those before them. A product and the difference from the shift are one
// instruction; what the shift was rounded by in units of log 2 is made good in the sum.
constexpr float OVERLAPPING_SHIFT = 1024;  // at most: so that this is little
template <class T>
inline float sum_overlapping(const T* z, int64_t n, float shift) {
  constexpr int64_t step = Exponentials<T>::COUNT;
  const float scaled = shift * LOG2_E, rounded = __builtin_fmaf(shift, LOG2_E, -scaled);
  const auto ask = [=](int64_t v) {
    for (int64_t i = 0; i < step; i += LINE<T>) __builtin_prefetch(z + n + v + i);
  };
  Exponentials<T> even, odd;
  Vec<float> sums[2] = {};
  even.begin(z, scaled);
  int64_t v = step;
  for (; v + 2 * step <= n; v += 2 * step) {
    ask(v);
    odd.begin(z + v, scaled);
    even.add_to(sums);
    ask(v + step);
    even.begin(z + v + step, scaled);
    odd.add_to(sums);
  }
  const bool one_more = v + step <= n;
  if (one_more) odd.begin(z + v, scaled);
  even.add_to(sums);
  if (one_more) {
    odd.add_to(sums);
    v += step;
  }
  return sum<float>(sums[0] + sums[1]) * (1 - rounded * LN_2) + sum_one_by_one(z + v, n - v, shift);
}

template <class T>
inline Wide<T> sum_of_exponentials(const T* z, int64_t n, Wide<T> shift) {
  if constexpr (ROUNDS_ONCE && sizeof(Wide<T>) == sizeof(float))
    if (n >= Exponentials<T>::COUNT && -OVERLAPPING_SHIFT <= shift && shift <= OVERLAPPING_SHIFT) return sum_overlapping(z, n, shift);
  return sum_one_by_one(z, n, shift);
}

// Where among n numbers the first one is that equals `wanted`, which is there. Those of 16 bits are compared as integers, but for zeros,
// which are equal with both signs.
template <class T>
inline int64_t find(const T* z, int64_t n, Wide<T> wanted) {
  constexpr int64_t size = VecOf<Wide<T>>::size;
  int64_t v = 0;
  if constexpr (sizeof(T) == 2) {
    const Words bits = Words{} + from_wide<T>(wanted).bits;
    for (; wanted != 0 && v + 4 * WORDS <= n; v += 4 * WORDS)
      if (any(((words_at(z + v) == bits) | (words_at(z + v + WORDS) == bits)) |
              ((words_at(z + v + 2 * WORDS) == bits) | (words_at(z + v + 3 * WORDS) == bits))))
        break;
  }
  for (Vec<Wide<T>> a, b; v + 2 * size <= n; v += 2 * size) {
    load_both(z + v, a, b);
    if (any((a == wanted) | (b == wanted))) break;
  }
  while (to_wide(z[v]) != wanted) v++;
  return v;
}

// What has been seen of a token's z.
template <class A>
struct Statistics {
  A top, sum, total;  // the largest z, the sum of exp(z - top), the sum of z
  int64_t argmax;

  // Before the columns from `first` on.
  explicit Statistics(int64_t first) : top(-A(INFINITE)), sum(0), total(0), argmax(first) {}

  // n columns from `first` on, once for the largest and, while they are in the L1 cache, once for the sums: so there is one maximum
  // for all of them and nothing to rescale. The next ones are asked for in the meantime. The sum of z only where `smoothed`.
  template <class T>
  void add(const T* z, int64_t n, int64_t first, bool smoothed) {
    const A most = largest_of(z, n);
    if (most > top) {
      if (sum == sum) argmax = first + find(z, n, most);
      if (sum > 0) sum *= A(__builtin_exp(double(top - most)));
      top = most;
    }
    const bool number = sum == sum;
    const A shift = top == -A(INFINITE) ? 0 : top;  // where all is -infinity, so that the sum is 0 and not NaN
    sum += sum_of_exponentials(z, n, shift);
    if (number && sum != sum) meet_nan(z, n, first);
    if (smoothed) total += sum_columns<T>(n, [&](int64_t v, auto count) { return load(z + v, count); });
  }

  // The sum has become NaN. That of infinity is not, nor is its logarithm; where one of the z is NaN, it counts as the largest.
  template <class T>
  void meet_nan(const T* z, int64_t n, int64_t first) {
    for (int64_t v = 0; v < n; v++) {
      if (to_wide(z[v]) == to_wide(z[v])) continue;
      argmax = first + v;
      return;
    }
    sum = 1;
  }

  // With what another one has seen, of later columns.
  void add(const Statistics& other) {
    const A most = other.top > top ? other.top : top;
    if (sum == sum && (other.top > top || other.sum != other.sum)) argmax = other.argmax;
    const auto weight = [most](A t) { return t == most ? A(1) : A(__builtin_exp(double(t - most))); };
    sum = sum * weight(top) + other.sum * weight(other.top);
    top = most;
    total += other.total;
  }
};

// The gradient of one token's logits, in registers.
template <class A, bool CAPPED>
class Gradient {
 public:
  Gradient(const LossGradients& gradients, int64_t token, int64_t V, const LossOptions& options)
      : Gradient(number(gradients.dloss, token), gradients.dlse ? number(gradients.dlse, token) : 0, number(gradients.lse, token),
                 number(gradients.correction, token), V, options) {}

  Gradient(A dloss, A dlse, A lse, A correction, int64_t V, const LossOptions& options)
      : lse_(lse),
        p_(A(dloss * (1 + 2 * options.z_loss * lse) + dlse) * correction),
        uniform_(A(dloss * options.label_smoothing / V)),
        target_(A(dloss * (1 - options.label_smoothing))),
        cap_(A(options.softcap)),
        reciprocal_(A(1 / options.softcap)) {}

  A softcap() const { return CAPPED ? cap_ : 0; }
  Vec<A> z(Vec<A> logits) const { return CAPPED ? cap_ * tanh_of(logits * reciprocal_) : logits; }

  // From z of words that are not the target. T: what it is rounded to in the end.
  template <class T>
  Vec<A> of(Vec<A> z) const {
    const Vec<A> dz = p_ * exponential<GRADIENT_DEGREE<T>>(z - lse_) - uniform_;
    return CAPPED ? dz * slope(z) : dz;
  }

  // What the target's is smaller by.
  A share(A z) const { return CAPPED ? target_ * slope(z) : target_; }

 private:
  template <class V>
  V slope(V z) const {
    const V t = z / cap_;  // not by the reciprocal, whose rounding would show where t is nearly 1
    return 1 - t * t;
  }

  static A number(const void* numbers, int64_t token) { return static_cast<const A*>(numbers)[token]; }

  A lse_, p_, uniform_, target_, cap_, reciprocal_;
};

}  // namespace surprise
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
