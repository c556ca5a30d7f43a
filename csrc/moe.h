// Mixture of experts: what the binding hands to a kernel, on any device. The mathematics: fastprimer/ops/moe.py.
#pragma once
#include "kernel.h"

namespace fastprimer {

// A pair is one token and one of its K experts: pair n K + k. Numbers in a row lie next to each other.
struct MoeProblem {
  const void* x;  // (N, C)
  int64_t stride_x_row;
  const void* gate_up;  // (E, 2F, C)
  int64_t stride_gate_up_expert, stride_gate_up_row;
  const void* down;  // (E, C, F)
  int64_t stride_down_expert, stride_down_row;
  const float* weights;    // (N, K)
  const int64_t* experts;  // (N, K); on a GPU nobody has looked whether they are in 0..E-1: a pair with another number counts for nothing
  int64_t N, C, F, E, K;   // all > 0
  Dtype dtype;             // of every tensor but weights and experts
};

struct MoeForward {
  MoeProblem problem;
  void* hidden;   // (N, K, 2F), saved for backward
  void* y;        // (N, C)
  void* scratch;  // as many bytes as moe_forward_scratch says, aligned to 256
};

struct MoeBackward {
  MoeProblem problem;
  const void* dy;  // (N, C)
  int64_t stride_dy_row;
  const void* hidden;
  void* dx;         // (N, C), or null: not needed
  void* dgate_up;   // (E, 2F, C), or null
  void* ddown;      // (E, C, F), null with dgate_up
  float* dweights;  // (N, K)
  void* scratch;    // as many bytes as moe_backward_scratch says, aligned to 256
};

// A matter of shapes and dtype alone, never of where the tokens go: no kernel waits for the host.
int64_t moe_forward_scratch(Cpu, const MoeProblem& problem);
int64_t moe_forward_scratch(Cuda, const MoeProblem& problem);
int64_t moe_backward_scratch(Cpu, const MoeProblem& problem);
int64_t moe_backward_scratch(Cuda, const MoeProblem& problem);

Error moe_forward(Cpu, const MoeForward& args);
Error moe_forward(Cuda, const MoeForward& args);
Error moe_backward(Cpu, const MoeBackward& args);
Error moe_backward(Cuda, const MoeBackward& args);

}  // namespace fastprimer
