// Routing's CUDA kernels (csrc/cuda/routing.cu) against float64, through the interface of csrc/routing.h.
#include <algorithm>

#include "check.h"
#include "routing.h"

namespace {

using namespace check;
using fastprimer::Cuda;
using fastprimer::Dtype;
using fastprimer::Score;

struct Case {
  int N, E, K;
  Score score = Score::softmax;
  bool renormalize = true;
  double scale = 1;
  int groups = 1, top_groups = 1;
  bool bias = false;
  int more = 0;  // how much further apart than E the rows of logits are
};

const Case CASES[] = {
    {.N = 1, .E = 1, .K = 1},                                           // nothing to choose
    {.N = 17, .E = 8, .K = 2},                                          // several tokens a warp, ties
    {.N = 18, .E = 13, .K = 13, .renormalize = false, .more = 3},       // all of an odd number
    {.N = 5, .E = 4, .K = 1, .renormalize = false},                     // Switch
    {.N = 7, .E = 40, .K = 3, .score = Score::softmax_topk},            // a warp a token
    {.N = 6, .E = 64, .K = 40, .score = Score::sigmoid, .scale = 1.5},  // more choices than lanes
    {.N = 9, .E = 64, .K = 6, .score = Score::sigmoid, .scale = 2.5, .groups = 8, .top_groups = 3, .bias = true},
    {.N = 9, .E = 12, .K = 3, .renormalize = false, .groups = 4, .top_groups = 2, .bias = true},
    {.N = 5, .E = 33, .K = 5, .score = Score::sigmoid, .renormalize = false, .groups = 33, .top_groups = 9},  // groups of one
    {.N = 3, .E = 4096, .K = 8, .groups = 4096, .top_groups = 100},                                           // few tokens a block
    {.N = 5, .E = 72, .K = 4, .score = Score::softmax_topk, .groups = 2, .top_groups = 1, .bias = true},
};

double logistic(double l) { return 1 / (1 + std::exp(-l)); }

// The chapter's formulas for one token.
struct Truth {
  std::vector<int> experts;
  std::vector<double> weights, dlogits;

  Truth(const Case& c, const std::vector<double>& l, const std::vector<double>& bias, const std::vector<double>& dweights) {
    const double top = *std::max_element(l.begin(), l.end());
    double total = 0;
    for (double v : l) total += std::exp(v - top);
    std::vector<double> s(c.E), choice(c.E);
    for (int e = 0; e < c.E; e++) {
      s[e] = c.score == Score::sigmoid ? logistic(l[e]) : std::exp(l[e] - top) / total;
      choice[e] = (c.score == Score::softmax_topk ? l[e] : s[e]) + (c.bias ? bias[e] : 0);
    }
    if (c.groups > 1) hide_groups(c, choice);
    experts = best(choice, c.K);
    double sum = 0;
    for (int e : experts) sum += s[e];
    const bool all = c.score == Score::softmax && !c.renormalize, over_chosen = c.renormalize || c.score == Score::softmax_topk;
    double dot = 0;
    for (int k = 0; k < c.K; k++) {
      const double r = over_chosen ? s[experts[k]] / sum : s[experts[k]];
      weights.push_back(c.scale * r);
      dot += r * c.scale * dweights[k];
    }
    dlogits.assign(c.E, 0);
    if (all) {
      for (int e = 0; e < c.E; e++) dlogits[e] = -s[e] * dot;
    }
    for (int k = 0; k < c.K; k++) {
      const int e = experts[k];
      const double dr = c.scale * dweights[k], r = weights[k] / c.scale;
      if (all) dlogits[e] += s[e] * dr;
      if (over_chosen) dlogits[e] = r * (dr - dot) * (c.score == Score::sigmoid ? 1 - s[e] : 1);
      if (!all && !over_chosen) dlogits[e] = dr * s[e] * (1 - s[e]);
    }
  }

  static std::vector<int> best(const std::vector<double>& values, int k) {
    std::vector<int> order(values.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int>(i);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values[a] > values[b]; });
    order.resize(k);
    return order;
  }

  static void hide_groups(const Case& c, std::vector<double>& choice) {
    const int size = c.E / c.groups;
    std::vector<double> worth;
    for (int g = 0; g < c.groups; g++) {
      std::vector<double> group(choice.begin() + g * size, choice.begin() + (g + 1) * size);
      std::sort(group.rbegin(), group.rend());
      worth.push_back(group[0] + (c.score == Score::sigmoid && size > 1 ? group[1] : 0));
    }
    std::vector<bool> keep(c.groups);
    for (int g : best(worth, c.top_groups)) keep[g] = true;
    for (int e = 0; e < c.E; e++) {
      if (!keep[e / size]) choice[e] = -INFINITY;
    }
  }
};

template <class T>
struct Run {
  const Case& c;
  Dtype dtype;
  int stride;
  Buffer<T> logits, dlogits;
  Buffer<float> bias, weights, dweights;
  Buffer<int64_t> experts;

  Run(const Case& c, Dtype dtype)
      : c(c),
        dtype(dtype),
        stride(c.E + c.more),
        logits(static_cast<size_t>(c.N - 1) * stride + c.E),
        dlogits(static_cast<size_t>(c.N) * c.E),
        bias(c.E),
        weights(static_cast<size_t>(c.N) * c.K),
        dweights(static_cast<size_t>(c.N) * c.K),
        experts(static_cast<size_t>(c.N) * c.K) {
    std::mt19937 random(c.E + c.K);
    std::normal_distribution<float> normal;
    // Of eighths, so that numbers are equal or differ by more than rounding.
    for (size_t i = 0; i < logits.size(); i++) logits[i] = narrow<T>(std::round(8 * normal(random)) / 8);
    randomize(bias, random);
    randomize(dweights, random);
  }

  const char* forward() {
    return fastprimer::route_forward(Cuda{}, {.logits = logits.data(),
                                              .stride_logits_row = stride,
                                              .bias = c.bias ? bias.data() : nullptr,
                                              .weights = weights.data(),
                                              .experts = experts.data(),
                                              .N = c.N,
                                              .E = c.E,
                                              .K = c.K,
                                              .groups = c.groups,
                                              .top_groups = c.top_groups,
                                              .weighting = {c.score, c.renormalize, c.scale},
                                              .dtype = dtype});
  }

  const char* backward() {
    return fastprimer::route_backward(Cuda{}, {.dweights = dweights.data(),
                                               .logits = logits.data(),
                                               .stride_logits_row = stride,
                                               .experts = experts.data(),
                                               .dlogits = dlogits.data(),
                                               .N = c.N,
                                               .E = c.E,
                                               .K = c.K,
                                               .weighting = {c.score, c.renormalize, c.scale},
                                               .dtype = dtype});
  }
};

template <class T>
void check_case(const Case& c, Dtype dtype, const std::string& name) {
  Run<T> run(c, dtype);
  if (const char* error = run.forward()) return fail(name + ": forward: " + error);
  if (const char* error = run.backward()) return fail(name + ": backward: " + error);
  for (int n = 0; n < c.N; n++) {
    std::vector<double> l, bias, dweights;
    double size = 0;
    for (int e = 0; e < c.E; e++) l.push_back(widen(run.logits[static_cast<size_t>(n) * run.stride + e]));
    for (int e = 0; e < c.E; e++) bias.push_back(run.bias[e]);
    for (int k = 0; k < c.K; k++) dweights.push_back(run.dweights[static_cast<size_t>(n) * c.K + k]);
    for (double dw : dweights) size += c.scale * std::abs(dw);
    const Truth truth(c, l, bias, dweights);
    for (int k = 0; k < c.K; k++) {
      const size_t at = static_cast<size_t>(n) * c.K + k;
      if (run.experts[at] != truth.experts[k]) return fail(name + ": experts is wrong");
      if (!close(run.weights[at], truth.weights[k], truth.weights[k])) return fail(name + ": weights is wrong");
    }
    for (int e = 0; e < c.E; e++) {
      if (!close(run.dlogits[static_cast<size_t>(n) * c.E + e], truth.dlogits[e], size)) return fail(name + ": dlogits is wrong");
    }
  }
  run.weights.finish(name + ": weights");
  run.experts.finish(name + ": experts");
  run.dlogits.finish(name + ": dlogits");
}

// Rows of no numbers, of infinities and of numbers whose exponentials vanish: experts are in range and differ, the lower ones first among
// equals. And experts out of range, in backward: as if they were not there.
void check_special() {
  for (const Score score : {Score::softmax, Score::softmax_topk, Score::sigmoid}) {
    for (const int groups : {1, 4}) {
      const Case c = {.N = 5, .E = 40, .K = 6, .score = score, .groups = groups, .top_groups = groups == 1 ? 1 : 2};
      const std::string name = "special " + std::to_string(static_cast<int>(score)) + " " + std::to_string(groups) + " groups";
      Run<float> run(c, Dtype::float32);
      const float rows[] = {NAN, -INFINITY, INFINITY, 0.0f};
      for (int n = 0; n < 4; n++) {
        for (int e = 0; e < c.E; e++) run.logits[static_cast<size_t>(n) * c.E + e] = e % 2 && n == 3 ? -0.0f : rows[n];
      }
      for (int e = 0; e < c.E; e++) run.logits[static_cast<size_t>(4) * c.E + e] = e == 37 ? 2 : e == 5 ? NAN : e == 3 ? 1 : -500;
      if (const char* error = run.forward()) return fail(name + ": " + error);
      for (int n = 0; n < c.N; n++) {
        std::vector<bool> seen(c.E);
        for (int k = 0; k < c.K; k++) {
          const int64_t e = run.experts[static_cast<size_t>(n) * c.K + k];
          if (e < 0 || e >= c.E || seen[e]) return fail(name + ": experts is wrong: out of range or twice");
          if (n < 4 && e != k) return fail(name + ": experts is wrong: not the first of equals");
          seen[e] = true;
        }
      }
      if (score != Score::softmax && run.experts[4 * c.K] != 5) fail(name + ": experts is wrong: a NaN is not the largest");
      run.experts.finish(name + ": experts");
      run.weights.finish(name + ": weights");

      for (size_t i = 0; i < run.logits.size(); i++) run.logits[i] = 0.125f * (i % 7);
      for (int n = 0; n < c.N; n++) {
        for (int k = 0; k < c.K; k++) run.experts[static_cast<size_t>(n) * c.K + k] = k == 0 ? -1 : k == 1 ? int64_t{1} << 40 : k;
      }
      if (const char* error = run.backward()) return fail(name + ": backward: " + error);
      for (size_t i = 0; i < run.dlogits.size(); i++) {
        if (std::isnan(run.dlogits[i])) return fail(name + ": dlogits is wrong: a NaN");
        if (i % c.E < 2 && run.dlogits[i] != 0) return fail(name + ": dlogits is wrong: not 0 for an expert that was not chosen");
      }
      run.dlogits.finish(name + ": dlogits");
    }
  }
}

template <class T>
void check_dtype(Dtype dtype, const char* type) {
  for (const Case& c : CASES) {
    check_case<T>(c, dtype,
                  std::string("routing ") + type + " " + std::to_string(c.N) + " x " + std::to_string(c.E) + ", K " + std::to_string(c.K));
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool) {
    check_dtype<float>(Dtype::float32, "float32");
    check_dtype<bfloat16>(Dtype::bfloat16, "bfloat16");
    check_dtype<float16>(Dtype::float16, "float16");
    check_special();
  });
}
