// What the fused cross-entropy on CUDA computes between a library's products, besides the passes over logits: z in 16 bits, the scale of
// float16, tokens as the products read them, sums of their parts.
#pragma once
#include "cross_entropy.cuh"

namespace fastprimer {

// Moves N width numbers of float32, z, in and as many of 16 bits out. kept (N, stride_row), its shifts (N, blocks).
static __global__ void __launch_bounds__(LOSS_THREADS)
    cross_entropy_keep(const LossArgs in, const LossState* state, const Kept16 kept, int64_t stride_row, int64_t blocks) {
  const int64_t n = loss_token();
  if (n >= in.N) return;
  const float shift = in.counts(n) ? state[n].top - KEPT_TOP : 0;  // the z of an ignored token are 0
  float* shifts = kept.shift + n * blocks + in.first / KEPT_BLOCK;
  for (int64_t block = threadIdx.x; block * KEPT_BLOCK < in.width; block += blockDim.x) shifts[block] = shift;
  int16_t* row = kept.z + n * stride_row + in.first;
  along_row<LOSS_VECTOR<int16_t>>(in.row<float>(n), row, in.width, threadIdx.x, blockDim.x, [&](auto v, int64_t column) {
    constexpr int COUNT = sizeof v.data / sizeof v.data[0];
    Vector<int16_t, COUNT> steps;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const float number = (v.data[i] - shift) * KEPT_STEPS;
      steps.data[i] = static_cast<int16_t>(rintf(fminf(fmaxf(number, KEPT_LOWEST), -1.0f - KEPT_LOWEST)));
    }
    store(row + column, steps);
  });
}

// The scale of linear_cross_entropy_scale, by one block. |dl| <= |dtop| + |dloss|, times the scale below 2^15.
static __global__ void __launch_bounds__(LOSS_THREADS) cross_entropy_scale(const DlogitsArgs args, float* scale) {
  FASTPRIMER_SHARED(most, float[LOSS_THREADS]);
  float mine = 0;
  for (int64_t n = threadIdx.x; n < args.in.N; n += LOSS_THREADS) {
    if (!args.in.counts(n)) continue;
    const TokenGradient gradient(args, n);
    const float size = fabsf(gradient.top) + fabsf(static_cast<const float*>(args.gradients.dloss)[n]);
    if (size < INFINITY) mine = fmaxf(mine, size);  // what is not finite stays so at any scale
  }
  most[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < LOSS_THREADS; i++) mine = fmaxf(mine, most[i]);
  const int exponent = mine > 0 ? 14 - ilogbf(mine) : 0;
  *scale = ldexpf(1, min(exponent, 100));  // of which 1 / scale is a normal number too
}

// Moves N C elements in and as many out.
template <class T>
__global__ void __launch_bounds__(LOSS_THREADS)
    cross_entropy_tokens(const T* x, int64_t stride_x_row, const int64_t* target, int64_t ignore_index, int64_t N, int64_t C, T* to) {
  const int64_t n = loss_token();
  if (n >= N) return;
  const bool counts = target[n] != ignore_index;
  T* row = to + n * C;
  along_row<LOSS_VECTOR<T>>(x + n * stride_x_row, row, C, threadIdx.x, blockDim.x,
                            [&](auto v, int64_t c) { store(row + whole(c), counts ? v : decltype(v){}); });
}

// Moves `count` numbers of float32 in, twice where there is a sum, and as many elements out, which may be the sum itself.
template <class T>
__global__ void __launch_bounds__(LOSS_THREADS)
    cross_entropy_add(const float* sum, const float* part, int64_t count, const float* scale, T* out) {
  const float factor = scale == nullptr ? 1 : 1 / *scale;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  along_row<LOSS_VECTOR<T>, LOSS_BATCH / 2>(part, out, count, thread, threads, [&](auto v, int64_t i) {
    constexpr int COUNT = sizeof v.data / sizeof v.data[0];
    if (sum != nullptr) {
      const Vector<float, COUNT> before = load<COUNT>(sum + i);
#pragma unroll
      for (int k = 0; k < COUNT; k++) v.data[k] += before.data[k];
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) v.data[k] *= factor;
    store(out + i, narrow<T>(v.data));
  });
}

}  // namespace fastprimer
