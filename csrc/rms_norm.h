// RMSNorm: what the binding hands to a kernel, on any device. The mathematics: fastprimer/ops/rms_norm.py.
#pragma once
#include "kernel.h"

namespace fastprimer {

// y = h rstd (weight + weight_offset), h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps), over rows of C numbers.
// The columns of a row lie next to each other; rows are stride_* elements apart. Outputs are contiguous.
struct RmsNormForward {
  const void* x;
  int64_t stride_x_row;
  const void* residual;  // null: h is x, and the output h is not written
  int64_t stride_residual_row;
  const void* weight;  // null: no weight, weight_offset is not used
  void* y;
  void* h;
  void* rstd;          // (N,) float32; float64 where x is
  int64_t N, C;        // rows, columns; both > 0
  Dtype dtype;         // of x, residual, y, h
  Dtype weight_dtype;  // dtype or float32
  double eps, weight_offset;
};

// dx = rstd (g - h_hat mean(g h_hat)) + dh, dweight = sum over rows of dy h_hat, g = dy (weight + weight_offset).
struct RmsNormBackward {
  const void* dy;
  int64_t stride_dy_row;
  const void* dh;  // null: h was not used further
  int64_t stride_dh_row;
  const void* h;
  int64_t stride_h_row;
  const void* weight;  // null: no weight
  const void* rstd;
  void* dx;
  void* dweight;     // null: not needed
  void* partial;     // (partials, C) of rstd's type: workspace for dweight
  int64_t partials;  // as rms_norm_partials said, or 0 without dweight
  int64_t N, C;
  Dtype dtype, weight_dtype;
  double weight_offset;
};

// How many partial sums of dweight the backward pass of a device wants, and the two passes.
int64_t rms_norm_partials(Cpu, int64_t N, int64_t C);
int64_t rms_norm_partials(Cuda, int64_t N, int64_t C);
Error rms_norm_forward(Cpu, const RmsNormForward& args);
Error rms_norm_forward(Cuda, const RmsNormForward& args);
Error rms_norm_backward(Cpu, const RmsNormBackward& args);
Error rms_norm_backward(Cuda, const RmsNormBackward& args);

}  // namespace fastprimer
