// Routing: what the binding hands to a kernel, on any device. The mathematics: fastprimer/ops/routing.py.
#pragma once
#include "kernel.h"

namespace fastprimer {

enum class Score { softmax, softmax_topk, sigmoid };

// How the K chosen scores of a token become its weights.
struct Weighting {
  Score score;
  bool renormalize;
  double scale;
};

// `wide` is the type of statistics: float32, or float64 for float64 logits. Numbers in a row lie next to each other.
struct RouteForward {
  const void* logits;
  int64_t stride_logits_row;
  const void* bias;  // (E,), wide, or null
  void* weights;     // (N, K), wide
  int64_t* experts;  // (N, K)
  int64_t N, E, K;   // all > 0, K <= E
  int64_t groups;    // that the experts are divided into, equally; 1: no groups
  int64_t top_groups;
  Weighting weighting;
  Dtype dtype;  // of logits
};

struct RouteBackward {
  const void* dweights;  // (N, K), wide
  const void* logits;
  int64_t stride_logits_row;
  const int64_t* experts;  // (N, K)
  void* dlogits;           // (N, E)
  int64_t N, E, K;
  Weighting weighting;
  Dtype dtype;  // of logits and dlogits
};

Error route_forward(Cpu, const RouteForward& args);
Error route_forward(Cuda, const RouteForward& args);
Error route_backward(Cpu, const RouteBackward& args);
Error route_backward(Cuda, const RouteBackward& args);

}  // namespace fastprimer
