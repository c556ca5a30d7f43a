// Cross-entropy, plain and fused with the projection: what the binding hands to a kernel, on any device. The mathematics:
// fastprimer/ops/cross_entropy.py.
#pragma once
#include "kernel.h"

namespace fastprimer {

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;  // softcap: 0 for none
};

// What every forward computes for each of N tokens. Numbers are float32, or float64 with the logits.
struct LossOutputs {
  void *loss, *lse;
  void* correction;  // exp(lse as it was rounded - exact lse), the chapter's kappa
  int64_t* argmax;
};

// The upstream gradients, float32, or float64 with the logits, and what forward said; dlse may be null.
struct LossGradients {
  const void *dloss, *dlse, *lse, *correction;
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
  bool in_16_bits;  // kept is; its shifts are (N, kept_blocks(columns))
};

// How z is kept in 16 bits: steps of a unit, columns that share a shift, and what the shift is below the largest z so far. The lowest
// number stands for -infinity.
constexpr float KEPT_STEPS = 1024, KEPT_TOP = 31;
constexpr int64_t KEPT_BLOCK = 128;
constexpr int16_t KEPT_LOWEST = -32768;
inline int64_t kept_blocks(int64_t columns) { return (columns + KEPT_BLOCK - 1) / KEPT_BLOCK; }

struct LinearCrossEntropyForward {
  LinearCrossEntropyProblem problem;
  LossOutputs outputs;
  void* kept;    // (N, columns): z for backward, float32 or int16
  float* shift;  // (N, blocks), or null
};

struct LinearCrossEntropyBackward {
  LinearCrossEntropyProblem problem;
  LossGradients gradients;
  const void* kept;
  const float* shift;
  void* dx;       // (N, C), or null: not needed
  void* dweight;  // (V, C), or null
  float* dbias;   // (V,) or null
};

Error cross_entropy_forward(Cpu, const CrossEntropyForward& args);
Error cross_entropy_forward(Cuda, const CrossEntropyForward& args);
Error cross_entropy_backward(Cpu, const CrossEntropyBackward& args);
Error cross_entropy_backward(Cuda, const CrossEntropyBackward& args);
Error linear_cross_entropy_forward(Cpu, const LinearCrossEntropyForward& args);
Error linear_cross_entropy_backward(Cpu, const LinearCrossEntropyBackward& args);

// On a GPU the fused operation's products are a library's, one piece of the vocabulary after the other
// (csrc/linear_cross_entropy.cpp); these are the passes between them.

// Columns first .. first + width of the logits, float32.
struct LogitsPiece {
  float* logits;  // (N, width)
  int64_t stride_row, first, width;
  bool kept;  // they belong to `kept`, and what is to be read there in backward is z
};

// All of `kept` where it is in 16 bits.
struct Kept16 {
  int16_t* z;    // (N, columns)
  float* shift;  // (N, blocks)
};

// What has been seen of a token's z, from one piece to the next.
struct LossState {
  float top, sum, total, z_target;  // the largest z, the sum of exp(z - top), that of z; after the last piece only `top` counts
  int64_t argmax;                   // -1: nothing yet
};

// A piece's dlogits.
struct DlogitsPiece {
  void* dlogits;  // (N, width), of the problem's dtype
  int64_t stride_row;
  const float* scale;  // what they are multiplied by, or null for 1
  float* dbias;        // (width,), not scaled, or null
};

// Adds a piece to `state` (N,); the first one begins it, the last one writes the outputs. A kept piece becomes z, 0 for ignored tokens.
Error linear_cross_entropy_fold(Cuda, const LinearCrossEntropyProblem& problem, const LogitsPiece& piece, LossState* state,
                                const LossOutputs& outputs);
// A kept piece, after it was added to `state`, in 16 bits.
Error linear_cross_entropy_keep(Cuda, const LinearCrossEntropyProblem& problem, const LogitsPiece& piece, const LossState* state,
                                const Kept16& kept);
// A piece kept in 16 bits is read there, and its logits are null.
Error linear_cross_entropy_dlogits(Cuda, const LinearCrossEntropyProblem& problem, const LogitsPiece& piece, const Kept16& kept,
                                   const LossGradients& gradients, const DlogitsPiece& out);
// A power of two by which the dlogits of all tokens become large, but not too large, numbers of 16 bits.
Error linear_cross_entropy_scale(Cuda, const LinearCrossEntropyProblem& problem, const LossGradients& gradients, float* scale);
// x (N, C) without gaps and with zeros for ignored tokens; in place, if it has none.
Error linear_cross_entropy_tokens(Cuda, const LinearCrossEntropyProblem& problem, void* x);
// sum + part, `count` numbers, where a null sum is 0: into `out`, divided by *scale, or into sum where `out` is null.
Error linear_cross_entropy_add(Cuda, Dtype dtype, float* sum, const float* part, int64_t count, const float* scale, void* out);

}  // namespace fastprimer
