// Cross-entropy, plain and fused with the projection: what the binding hands to a kernel, on any device. The mathematics:
// fastprimer/ops/cross_entropy.py.
#pragma once
#include "kernel.h"

namespace fastprimer {

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;  // softcap: 0 for none
};

// What every forward computes for each of N tokens. lse and loss are float32, or float64 with the logits.
struct LossOutputs {
  void *loss, *lse;
  int64_t* argmax;
};

// The upstream gradients, float32, or float64 with the logits; dlse may be null.
struct LossGradients {
  const void *dloss, *dlse, *lse;
};

struct CrossEntropyProblem {
  const void* logits;  // (N, V), the numbers of a row next to each other
  int64_t stride_logits_row;
  const int64_t* target;  // (N,): on a GPU nobody has looked whether they are in 0..V-1 or ignore_index
  int64_t N, V;           // > 0
  Dtype dtype;            // of the logits
  LossOptions options;
};

struct CrossEntropyForward {
  CrossEntropyProblem problem;
  LossOutputs outputs;
};

struct CrossEntropyBackward {
  CrossEntropyProblem problem;
  LossGradients gradients;
  void* dlogits;  // (N, V)
};

struct LinearCrossEntropyProblem {
  const void* x;  // (N, C)
  int64_t stride_x_row;
  const void* weight;  // (V, C)
  int64_t stride_weight_row;
  const float* bias;  // (V,) or null
  const int64_t* target;
  int64_t N, C, V;  // > 0
  Dtype dtype;      // of x and weight
  LossOptions options;
  int64_t columns;  // of kept: all V, or a multiple of 256
};

struct LinearCrossEntropyForward {
  LinearCrossEntropyProblem problem;
  LossOutputs outputs;
  float* kept;  // (N, columns): z, for backward
};

struct LinearCrossEntropyBackward {
  LinearCrossEntropyProblem problem;
  LossGradients gradients;
  const float* kept;
  void* dx;       // (N, C)
  void* dweight;  // (V, C)
  float* dbias;   // (V,) or null
};

Error cross_entropy_forward(Cpu, const CrossEntropyForward& args);
Error cross_entropy_backward(Cpu, const CrossEntropyBackward& args);
Error linear_cross_entropy_forward(Cpu, const LinearCrossEntropyForward& args);
Error linear_cross_entropy_backward(Cpu, const LinearCrossEntropyBackward& args);

}  // namespace fastprimer
