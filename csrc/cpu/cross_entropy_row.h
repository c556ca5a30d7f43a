// One token's loss and its gradient, a piece of the vocabulary at a time. The mathematics: fastprimer/ops/cross_entropy.py.
#pragma once
#include "cross_entropy.h"
#include "simd_math.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace surprise {

constexpr double INFINITE = __builtin_inf();

// Behind the n numbers of a tail stands `other`.
template <class T>
inline Vec<Wide<T>> load_or(const T* p, All, Wide<T>) {
  return load(p);
}
template <class T>
inline Vec<Wide<T>> load_or(const T* p, int64_t n, Wide<T> other) {
  Vec<Wide<T>> v = load(p, n);
  for (int64_t i = n; i < VecOf<Wide<T>>::size; i++) v[i] = other;
  return v;
}

// e^x for x <= 0, as good as T needs it: in base 2, with nine multiplications where exp_of_negative has twelve. An exponential is most of
// what a pass over logits computes.
template <class T>
ALWAYS_INLINE Vec<float> exponential(Vec<float> x) {
  return exp2_of<sizeof(T) == 4 ? 6 : is_bfloat16<T> ? 3 : 4>(x * 1.44269504f);
}
template <class T>
inline Vec<double> exponential(Vec<double> x) {
  return exp_of_negative<double>(x);
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

// Where among n numbers the first one is that equals `wanted`, which is there.
template <class T>
inline int64_t find(const T* z, int64_t n, Wide<T> wanted) {
  constexpr int64_t size = VecOf<Wide<T>>::size;
  int64_t v = 0;
  while (v + size <= n && !any(load(z + v) == wanted)) v += size;
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
    Vec<A> tops[4];
    for (Vec<A>& v : tops) v = Vec<A>{} - A(INFINITE);
    for_columns<A, 4>(0, n, [&](int64_t v, auto count, int i) { tops[i] = at_least(tops[i], load_or(z + v, count, -A(INFINITE))); });
    for (int i = 1; i < 4; i++) tops[0] = at_least(tops[0], tops[i]);
    const A most = largest(tops[0]);
    if (most > top) {
      argmax = first + find(z, n, most);
      if (sum > 0) sum *= A(__builtin_exp(double(top - most)));
      top = most;
    }
    const A shift = top == -A(INFINITE) ? 0 : top;  // where all is -infinity, so that the sum is 0 and not NaN
    sum += sum_columns<A>(n, [&](int64_t v, auto count) {
      __builtin_prefetch(z + n + v);
      return exponential<A>(load_or(z + v, count, -A(INFINITE)) - shift);
    });
    if (smoothed) total += sum_columns<A>(n, [&](int64_t v, auto count) { return load(z + v, count); });
  }

  // With what another one has seen, of later columns.
  void add(const Statistics& other) {
    const A most = other.top > top ? other.top : top;
    const auto weight = [most](A t) { return t == most ? A(1) : A(__builtin_exp(double(t - most))); };
    sum = sum * weight(top) + other.sum * weight(other.top);
    if (other.top > top) argmax = other.argmax;
    top = most;
    total += other.total;
  }

  A lse() const { return A(double(top) + __builtin_log(double(sum))); }

  A loss(A lse, A z_target, int64_t V, const LossOptions& options) const {
    double loss = double(lse) - (1 - options.label_smoothing) * z_target + options.z_loss * lse * lse;
    if (options.label_smoothing != 0) loss -= options.label_smoothing * total / V;
    return A(loss);
  }
};

// The gradient of one token's logits, in registers.
template <class A, bool CAPPED>
class Gradient {
 public:
  Gradient(A dloss, A dlse, A lse, int64_t V, const LossOptions& options)
      : lse_(lse),
        p_(A(dloss * (1 + 2 * options.z_loss * lse) + dlse)),
        uniform_(A(dloss * options.label_smoothing / V)),
        target_(A(dloss * (1 - options.label_smoothing))),
        cap_(A(options.softcap)),
        reciprocal_(A(1 / options.softcap)) {}

  A softcap() const { return CAPPED ? cap_ : 0; }
  Vec<A> z(Vec<A> logits) const { return CAPPED ? cap_ * tanh_of(logits * reciprocal_) : logits; }

  // From z of words that are not the target. T: what it is rounded to in the end.
  template <class T>
  Vec<A> of(Vec<A> z) const {
    const Vec<A> dz = p_ * exponential<T>(z - lse_) - uniform_;
    return CAPPED ? dz * slope(z) : dz;
  }

  // What the target's is smaller by.
  A share(A z) const { return CAPPED ? target_ * slope(z) : target_; }

 private:
  template <class V>
  V slope(V z) const {
    return 1 - (z * reciprocal_) * (z * reciprocal_);
  }

  A lse_, p_, uniform_, target_, cap_, reciprocal_;
};

}  // namespace surprise
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
