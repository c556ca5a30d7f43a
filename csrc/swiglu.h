// SwiGLU and its relatives: what the binding hands to a kernel, on any device. The mathematics: fastprimer/ops/swiglu.py.
#pragma once
#include "kernel.h"

namespace fastprimer {

// y = a sigma(a (alpha + beta a^2)) (b + offset), where a = min(gate, limit) and b = max(-limit, min(up, limit)).
struct Activation {
  double alpha, beta;  // (1, 0): SiLU
  double limit;        // infinity: none
  double offset;
};

// Numbers in a row lie next to each other; rows are stride_* elements apart. y is contiguous. Where no input has gaps between
// its rows, all of it comes as one row: N = 1.
struct SwiGluForward {
  const void* gate;
  int64_t stride_gate_row;
  const void* up;
  int64_t stride_up_row;
  void* y;
  int64_t N, F;  // rows, columns; both > 0
  Dtype dtype;   // of all tensors
  Activation activation;
};

struct SwiGluBackward {
  const void* dy;
  int64_t stride_dy_row;
  const void* gate;
  int64_t stride_gate_row;
  const void* up;
  int64_t stride_up_row;
  void* dgate;
  int64_t stride_dgate_row;  // F, or 2 F where dgate and dup are the halves of one tensor
  void* dup;
  int64_t stride_dup_row;
  int64_t N, F;
  Dtype dtype;
  Activation activation;
};

Error swiglu_forward(Cpu, const SwiGluForward& args);
Error swiglu_forward(Cuda, const SwiGluForward& args);
Error swiglu_backward(Cpu, const SwiGluBackward& args);
Error swiglu_backward(Cuda, const SwiGluBackward& args);

}  // namespace fastprimer
