// Attention: what the binding hands to a kernel, on any device. The mathematics: fastprimer/ops/attention.py.
#pragma once
#include "kernel.h"

namespace fastprimer {

// Where queries, keys, values or their gradients lie: (B, tokens, heads, features), the features of a head next to each other.
struct Heads {
  const void* data;
  int64_t stride_batch, stride_token, stride_head;
};

// H query heads, Hk key/value heads: query head h belongs to key/value head h / (H / Hk). D features of q and k, Dv of v.
//
// Dense: B sequences of S queries and T keys. Packed: sequence b has the queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 of all
// that follow each other along `token`, and the keys likewise; then S and T bound the lengths of the sequences, and stride_batch is
// 0. In both, query i of S_b sees key j of T_b if i + T_b - S_b - left <= j <= i + T_b - S_b + right.
struct AttentionProblem {
  Heads q, k, v;
  const float* sinks;           // (H,); null: none
  const int32_t* cu_seqlens_q;  // (B + 1,); null: dense
  const int32_t* cu_seqlens_k;
  int64_t B, S, T, H, Hk, D, Dv;
  int64_t tokens_q, tokens_k;  // S and T, or the tokens of all packed sequences
  int64_t left, right;         // UNLIMITED, or >= 0
  double scale;
  double softcap;  // 0: none
  Dtype dtype;     // of q, k, v, o and their gradients

  static constexpr int64_t UNLIMITED = -1;
};

// o (B, S, H, Dv) and lse (B, H, S) in float32, both contiguous; packed: o (N, H, Dv), lse (H, N).
struct AttentionForward {
  AttentionProblem problem;
  void* o;
  float* lse;
  int64_t stride_lse_batch, stride_lse_head;  // H S and S; packed: 0 and N
};

// dq, dk, dv contiguous, like q, k, v.
struct AttentionBackward {
  AttentionProblem problem;
  Heads dout;         // the gradient of o
  const float* dlse;  // laid out as lse; null: lse was not used
  const void* o;
  const float* lse;
  int64_t stride_lse_batch, stride_lse_head;
  float* delta;  // workspace, laid out as lse: rowsum(do o) - dlse
  void* dq;
  void* dk;
  void* dv;
  float* dsinks;  // (H,); null without sinks
};

Error attention_forward(Cpu, const AttentionForward& args);
Error attention_forward(Cuda, const AttentionForward& args);
Error attention_backward(Cpu, const AttentionBackward& args);
Error attention_backward(Cuda, const AttentionBackward& args);

}  // namespace fastprimer
