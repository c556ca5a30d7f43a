// The online softmax of attention's forward kernels: weights relative to the largest logit so far, in registers.
#pragma once
#include "attention_tile.cuh"

namespace fastprimer {

// The rows of a warp, key by key. A row's maximum so far, before `exponent`; the sum is of the lane's columns alone.
template <int MT>
struct OnlineSoftmax {
  float top[MT][2], total[MT][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < 2 * MT; m++) {
      top[m / 2][m % 2] = -INFINITY;
      total[m / 2][m % 2] = 0;
    }
  }

  // Turns more logits into weights relative to the maximum. All that was summed up before has to be multiplied by `rescale`.
  template <int N>
  __device__ __forceinline__ void add(float (&s)[MT][N][4], float exponent, float (&rescale)[MT][2]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float most = top[m][r];
#pragma unroll
        for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
        const float base = most == -INFINITY ? 0 : most * exponent;  // no key is visible yet: 2^(-inf - 0) = 0
        rescale[m][r] = fast_exp2(top[m][r] * exponent - base);
        top[m][r] = most;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; e++) sum += s[m][n][e] = fast_exp2(s[m][n][e] * exponent - base);
        }
        total[m][r] = total[m][r] * rescale[m][r] + sum;
      }
    }
  }

  // What the sums of row (m, r) have to be multiplied by, and lse, given the sink in base 2 (-inf: none).
  __device__ __forceinline__ float finish(int m, int r, float exponent, float sink, float& lse) const {
    float sum = total[m][r];
    sum += __shfl_xor_sync(FULL_WARP, sum, 1);
    sum += __shfl_xor_sync(FULL_WARP, sum, 2);
    const float logit = top[m][r] * exponent, most = fmaxf(logit, sink);
    const float base = most == -INFINITY ? 0 : most, rescale = fast_exp2(logit - base);
    sum = sum * rescale + fast_exp2(sink - base);
    lse = sum == 0 ? -INFINITY : LN_2 * (base + log2f(sum));
    return sum == 0 ? 0 : rescale / sum;
  }
};

template <int MT, int COLUMNS>
__device__ __forceinline__ void scale_rows(float (&acc)[MT][COLUMNS][4], const float (&factor)[MT][2]) {
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) acc[m][n][e] *= factor[m][e / 2];
    }
  }
}

// Hides, in scores whose first column is key `first` and whose first row, in this warp, is the block's row `row`, what queries do not see.
template <int MT, int N>
__device__ __forceinline__ void hide(float (&s)[MT][N][4], int first, const AttentionBlock& at, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 2 * MT; m++) {
    const int query = (row + 8 * m + lane / 4) / at.G, begin = at.first_key_of(query), end = at.end_key_of(query);
#pragma unroll
    for (int e = 0; e < N * 2; e++) {
      const int key = first + e / 2 * 8 + lane % 4 * 2 + e % 2;
      if (key < begin || key >= end) s[m / 2][e / 2][m % 2 * 2 + e % 2] = -INFINITY;
    }
  }
}

}  // namespace fastprimer
