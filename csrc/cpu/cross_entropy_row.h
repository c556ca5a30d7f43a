// One token's loss and its gradient, a piece of the vocabulary at a time. The mathematics: fastprimer/ops/cross_entropy.py.
#pragma once
#include "cross_entropy.h"
#include "simd_math.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace surprise {

constexpr double INFINITE = __builtin_inf();

// Behind the n numbers of a tail stands `other`.
template <class A>
inline Vec<A> load_or(const A* p, All, A) {
  return load(p);
}
template <class A>
inline Vec<A> load_or(const A* p, int64_t n, A other) {
  Vec<A> v = load(p, n);
  for (int64_t i = n; i < VecOf<A>::size; i++) v[i] = other;
  return v;
}

// z of logits, and of their bias where there is one.
template <class A, class T>
inline void cap(const T* logits, const float* bias, int64_t n, double softcap, A* z) {
  const A c = A(softcap), reciprocal = A(1 / softcap);
  for_columns<A>(0, n, [&](int64_t v, auto count, int) {
    Vec<A> l = load(logits + v, count);
    if constexpr (sizeof(A) == sizeof(float))
      if (bias) l += load(bias + v, count);
    store(z + v, softcap > 0 ? c * tanh_of(l * reciprocal) : l, count);
  });
}

// What has been seen of a token's z.
template <class A>
struct Statistics {
  A top, sum, total;  // the largest z, the sum of exp(z - top), the sum of z
  int64_t argmax;

  // Before the columns from `first` on.
  explicit Statistics(int64_t first) : top(-A(INFINITE)), sum(0), total(0), argmax(first) {}

  void add(const A* z, int64_t n, int64_t first) {
    Vec<A> tops[4];
    for (Vec<A>& v : tops) v = Vec<A>{} - A(INFINITE);
    for_columns<A>(0, n, [&](int64_t v, auto count, int i) {
      const Vec<A> values = load_or(z + v, count, -A(INFINITE));
      tops[i] = values > tops[i] ? values : tops[i];
    });
    for (int i = 1; i < 4; i++) tops[0] = tops[i] > tops[0] ? tops[i] : tops[0];
    const A most = largest(tops[0]);
    if (most > top) {
      int64_t v = 0;
      while (z[v] != most) v++;
      argmax = first + v;
      sum *= A(__builtin_exp(double(top - most)));
      top = most;
    }
    const A shift = top == -A(INFINITE) ? 0 : top;  // where all is -infinity, so that the sum is 0 and not NaN
    sum += sum_columns<A>(n, [&](int64_t v, auto count) { return exp_of_negative<A>(load_or(z + v, count, -A(INFINITE)) - shift); });
    total += sum_columns<A>(n, [&](int64_t v, auto count) { return load(z + v, count); });
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

// The gradient of one token's logits.
template <class A>
class Gradient {
 public:
  Gradient(A dloss, A dlse, A lse, int64_t V, const LossOptions& options)
      : lse_(lse),
        p_(A(dloss * (1 + 2 * options.z_loss * lse) + dlse)),
        uniform_(A(dloss * options.label_smoothing / V)),
        target_(A(dloss * (1 - options.label_smoothing))),
        reciprocal_(A(options.softcap > 0 ? 1 / options.softcap : 0)) {}

  // From n numbers of z, in place; the target is the one at `target`, if that is among them. T: what they are rounded to in the end.
  template <class T>
  void operator()(A* z, int64_t n, int64_t target) const {
    const bool here = 0 <= target && target < n;
    const A share = here ? target_ * slope(z[target]) : 0;
    for_columns<A>(0, n, [&](int64_t v, auto count, int) {
      const Vec<A> values = load(z + v, count);
      const Vec<A> dz = p_ * exp_of_negative<T>(values - lse_) - uniform_;
      store(z + v, reciprocal_ > 0 ? dz * slope(values) : dz, count);
    });
    if (here) z[target] -= share;
  }

 private:
  template <class V>
  V slope(V z) const {
    return 1 - (z * reciprocal_) * (z * reciprocal_);
  }

  A lse_, p_, uniform_, target_, reciprocal_;
};

}  // namespace surprise
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
