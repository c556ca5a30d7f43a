// Routing on the CPU. The mathematics: fastprimer/ops/routing.py; the arguments: csrc/routing.h.
//
// One token at a time: its E scores, K sweeps' worth of comparisons in one, and the weights of the chosen in float64. Next to the experts
// themselves it costs nothing: about E (10 + K) instructions for each token, and one read of the logits.
#include "routing.h"

#include "columns.h"
#include "simd_math.h"
#include "tasks.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace {

constexpr int64_t TOKENS = 64;  // that are one piece of work

// Whether a is chosen before b, which comes earlier: as torch sorts, a NaN is larger than all numbers.
template <class A>
bool before(A a, A b) {
  return a > b || (a != a && b == b);
}

// The k largest of n values, the largest first and of equal ones the earlier: their numbers, and in `best` themselves.
template <class A>
void choose(const A* values, int64_t n, int64_t k, int64_t* numbers, A* best) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; i++) {
    if (found == k && !before(values[i], best[k - 1])) continue;
    int64_t place = found < k ? found++ : k - 1;
    for (; place > 0 && before(values[i], best[place - 1]); place--) {
      best[place] = best[place - 1];
      numbers[place] = numbers[place - 1];
    }
    best[place] = values[i];
    numbers[place] = i;
  }
}

// e^x for x <= 0 as long as it is a number above 0: near the smallest normal number the choice is still among different scores.
// Of each number by itself, whatever the others are.
template <class A>
void exponentials(A* values, int64_t n) {
  constexpr A lowest = sizeof(A) == sizeof(double) ? -708 : -87;
  const auto above = [=](int64_t begin, int64_t end) {
    for_columns<A>(begin, end, [=](int64_t c, auto count, int) { store(values + c, exp_of_negative(load(values + c, count)), count); });
  };
  A least = 0;
  for (int64_t i = 0; i < n; i++) least = values[i] < least ? values[i] : least;
  if (least > lowest) return above(0, n);
  for (int64_t i = 0; i < n; i++) values[i] > lowest ? above(i, i + 1) : void(values[i] = A(__builtin_exp(double(values[i]))));
}

// From n values to their differences from the largest.
template <class A, class B>
void subtract_largest(const A* values, int64_t n, B* differences) {
  A most = values[0];
  for (int64_t i = 1; i < n; i++) most = before(values[i], most) ? values[i] : most;
  for (int64_t i = 0; i < n; i++) differences[i] = B(values[i]) - most;
}

// softmax of n values, in place.
template <class A>
void softmax(A* values, int64_t n) {
  subtract_largest(values, n, values);
  exponentials(values, n);
  const A total = sum_columns<A>(n, [&](int64_t c, auto count) { return load(values + c, count); });
  for (int64_t i = 0; i < n; i++) values[i] /= total;
}

// Sums of sigmoids from here on divide them exactly; below, some may have lost digits, or all be 0.
constexpr double LEAST_TOTAL = 1e-280;

double log_sigmoid(double l) { return (l < 0 ? l : 0) - __builtin_log1p(__builtin_exp(-__builtin_fabs(l))); }

// Numbers in the proportion of the sigmoids of K logits, and their sum.
template <class A>
double by_logarithms(const A* logits, int64_t K, double* r) {
  for (int64_t k = 0; k < K; k++) r[k] = log_sigmoid(logits[k]);
  subtract_largest(r, K, r);
  exponentials(r, K);
  double total = 0;
  for (int64_t k = 0; k < K; k++) total += r[k];
  return total;
}

// Of n tokens with K chosen logits each: their weights r, without the scale, and the slopes of their scores' logarithms, but for a softmax
// over all experts. All exponentials together: a token's few would not fill a register.
template <class A>
void shares(const Weighting& weighting, const A* chosen, int64_t n, int64_t K, double* r, double* slopes) {
  const bool sigmoids = weighting.score == Score::sigmoid;
  if (sigmoids) {
    for (int64_t i = 0; i < n * K; i++) slopes[i] = -__builtin_fabs(chosen[i]);
    exponentials(slopes, n * K);
    for (int64_t i = 0; i < n * K; i++) {
      const double large = 1 / (1 + slopes[i]), small = slopes[i] * large;  // sigma of |l| and of -|l|
      r[i] = chosen[i] >= 0 ? large : small;
      slopes[i] = chosen[i] >= 0 ? small : large;
    }
    if (!weighting.renormalize) return;
  } else {
    for (int64_t t = 0; t < n; t++) subtract_largest(chosen + t * K, K, r + t * K);
    exponentials(r, n * K);
    for (int64_t i = 0; i < n * K; i++) slopes[i] = 1;
  }
  for (int64_t t = 0; t < n; t++, chosen += K, r += K) {
    double total = 0;
    for (int64_t k = 0; k < K; k++) total += r[k];
    if (sigmoids && !(total > LEAST_TOTAL)) total = by_logarithms(chosen, K, r);
    for (int64_t k = 0; k < K; k++) r[k] /= total;
  }
}

bool needs_all_scores(const Weighting& weighting) { return weighting.score == Score::softmax && !weighting.renormalize; }

template <class T, class A>
void read_row(const T* row, int64_t E, A* l) {
  for_columns<A>(0, E, [&](int64_t c, auto n, int) { store(l + c, load(row + c, n), n); });
}

template <class T>
class Route {
 public:
  using A = Wide<T>;

  explicit Route(const RouteForward& args)
      : a_(args),
        l_(args.E),
        scores_(args.E),
        choice_(args.E),
        best_(args.E),
        chosen_(TOKENS * args.K),
        worth_(args.groups),
        numbers_(args.groups),
        r_(TOKENS * args.K),
        slopes_(TOKENS * args.K) {}
  bool ready() const {
    return l_.data() && scores_.data() && choice_.data() && best_.data() && chosen_.data() && worth_.data() && numbers_.data() &&
           r_.data() && slopes_.data();
  }

  void operator()(int64_t task) const {
    const int64_t first = task * TOKENS, n = smaller(TOKENS, a_.N - first), K = a_.K;
    for (int64_t t = 0; t < n; t++) choose_experts(first + t, chosen_.data() + t * K, r_.data() + t * K);
    if (!needs_all_scores(a_.weighting)) shares(a_.weighting, chosen_.data(), n, K, r_.data(), slopes_.data());
    A* weights = static_cast<A*>(a_.weights) + first * K;
    for (int64_t i = 0; i < n * K; i++) weights[i] = A(a_.weighting.scale * r_[i]);
  }

 private:
  // Of one token, whose chosen logits and scores are handed on.
  void choose_experts(int64_t n, A* chosen, double* scores) const {
    const int64_t E = a_.E, K = a_.K;
    read_row(static_cast<const T*>(a_.logits) + n * a_.stride_logits_row, E, l_.data());
    score();
    const A* bias = static_cast<const A*>(a_.bias);
    for (int64_t e = 0; e < E; e++) choice_[e] = bias ? scores_[e] + bias[e] : scores_[e];
    if (a_.groups > 1) keep_best_groups();
    int64_t* experts = a_.experts + n * K;
    choose(choice_.data(), E, K, experts, best_.data());
    for (int64_t k = 0; k < K; k++) {
      chosen[k] = l_[experts[k]];
      scores[k] = scores_[experts[k]];
    }
  }

  void score() const {
    __builtin_memcpy(scores_.data(), l_.data(), a_.E * sizeof(A));
    if (a_.weighting.score == Score::softmax) softmax(scores_.data(), a_.E);
    if (a_.weighting.score != Score::sigmoid) return;
    for (int64_t e = 0; e < a_.E; e++) scores_[e] = -A(__builtin_fabs(double(l_[e])));
    exponentials(scores_.data(), a_.E);
    for (int64_t e = 0; e < a_.E; e++) scores_[e] = (l_[e] < 0 ? scores_[e] : A(1)) / (1 + scores_[e]);
  }

  // choice becomes -infinity outside the top_groups groups that are worth most.
  void keep_best_groups() const {
    const int64_t size = a_.E / a_.groups, best = smaller(a_.weighting.score == Score::sigmoid ? 2 : 1, size);
    int64_t largest[2];
    for (int64_t g = 0; g < a_.groups; g++) {
      choose(choice_.data() + g * size, size, best, largest, best_.data());
      worth_[g] = best == 2 ? best_[0] + best_[1] : best_[0];
    }
    choose(worth_.data(), a_.groups, a_.top_groups, numbers_.data(), best_.data());
    for (int64_t g = 0; g < a_.groups; g++) {
      bool kept = false;
      for (int64_t i = 0; i < a_.top_groups; i++) kept = kept || numbers_[i] == g;
      for (int64_t e = g * size; !kept && e < (g + 1) * size; e++) choice_[e] = -A(__builtin_inf());
    }
  }

  const RouteForward& a_;
  Buffer<A> l_, scores_, choice_, best_, chosen_, worth_;
  Buffer<int64_t> numbers_;
  Buffer<double> r_, slopes_;
};

template <class T>
class RouteGradient {
 public:
  using A = Wide<T>;

  explicit RouteGradient(const RouteBackward& args)
      : a_(args),
        past_cache_(past_cache(args.dlogits, args.N, args.E * sizeof(T), args.E * sizeof(T))),
        row_(args.E),
        scores_(args.E),
        chosen_(TOKENS * args.K),
        r_(TOKENS * args.K),
        slopes_(TOKENS * args.K),
        dr_(args.K) {}
  bool ready() const { return row_.data() && scores_.data() && chosen_.data() && r_.data() && slopes_.data() && dr_.data(); }

  void operator()(int64_t task) const {
    const int64_t first = task * TOKENS, n = smaller(TOKENS, a_.N - first), K = a_.K;
    const bool all = needs_all_scores(a_.weighting);
    if (!all) {
      for (int64_t t = 0, i = 0; t < n; t++)
        for (int64_t k = 0; k < K; k++, i++) chosen_[i] = A(to_wide(logits_of(first + t)[a_.experts[first * K + i]]));
      shares(a_.weighting, chosen_.data(), n, K, r_.data(), slopes_.data());
    }
    for (int64_t t = 0; t < n; t++) differentiate(first + t, all, r_.data() + t * K, slopes_.data() + t * K);
  }

 private:
  const T* logits_of(int64_t n) const { return static_cast<const T*>(a_.logits) + n * a_.stride_logits_row; }

  // Of one token; `all`: r and slopes are not known yet.
  void differentiate(int64_t n, bool all, double* r, double* slopes) const {
    const int64_t E = a_.E, K = a_.K;
    const Weighting& weighting = a_.weighting;
    const int64_t* experts = a_.experts + n * K;
    T* dlogits = past_cache_ ? row_.data() : static_cast<T*>(a_.dlogits) + n * E;
    if (all) {
      read_row(logits_of(n), E, scores_.data());
      softmax(scores_.data(), E);
      for (int64_t k = 0; k < K; k++) {
        r[k] = scores_[experts[k]];
        slopes[k] = 1;
      }
    }
    const A* dweights = static_cast<const A*>(a_.dweights) + n * K;
    double mean = 0;  // sum r dr
    for (int64_t k = 0; k < K; k++) mean += r[k] * (dr_[k] = weighting.scale * dweights[k]);
    for (int64_t e = 0; all && e < E; e++) dlogits[e] = from_wide<T>(-scores_[e] * mean);
    if (!all) __builtin_memset(dlogits, 0, E * sizeof(T));
    for (int64_t k = 0; k < K; k++) {
      const bool alone = weighting.score == Score::sigmoid && !weighting.renormalize;
      dlogits[experts[k]] = from_wide<T>(r[k] * (alone ? dr_[k] : dr_[k] - mean) * slopes[k]);
    }
    if (!past_cache_) return;
    T* row = static_cast<T*>(a_.dlogits) + n * E;
    for_columns<A>(0, E, [&](int64_t e, auto count, int) { PastCache{}(row + e, load(dlogits + e, count), count); });
  }

  const RouteBackward& a_;
  const bool past_cache_;
  const Buffer<T> row_;
  Buffer<A> scores_, chosen_;
  Buffer<double> r_, slopes_, dr_;
};

}  // namespace

Error route_forward(const RouteForward& args) {
  return by_dtype(args.dtype, [&](auto element) { return run_tasks<Route<decltype(element)>>((args.N + TOKENS - 1) / TOKENS, args); });
}

Error route_backward(const RouteBackward& args) {
  return by_dtype(args.dtype,
                  [&](auto element) { return run_tasks<RouteGradient<decltype(element)>>((args.N + TOKENS - 1) / TOKENS, args); });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
