// RMSNorm on CUDA. The mathematics: fastprimer/ops/rms_norm.py.
//
// How a row lies in a block. A row of C numbers is C / V vectors of V: 16 bytes each, or V = 1 where a pointer, a stride or C does
// not allow that. threads = blockDim.x threads share a row, blockDim.y rows make a block, and thread t of a row holds its vectors
//
//   t, t + threads, t + 2 threads, ...    K of them in registers, or ("wide") as many as the row has, from memory every time
//
// threads is a power of two up to 32, so that a row lies in one warp and its sum needs shuffles only, or a multiple of 32, and the
// sums of its warps meet in shared memory. Rows past the end have no vectors but take part in all sums and barriers.
#pragma once
#include "../rms_norm.h"
#include "device.cuh"

namespace fastprimer {

constexpr int RMS_NORM_THREADS = 512;  // the most in a block: leaves 128 registers to each

// Where a row begins; null where there is no such argument.
template <class T>
__device__ __forceinline__ T* at_row(T* p, int64_t row, int64_t stride_row) {
  return p == nullptr ? nullptr : p + row * stride_row;
}

// What h_hat is multiplied by: weight + weight_offset, or 1 without weight.
struct RmsNormWeight {
  const void* data;
  bool is_float;
  float offset;

  template <class T, int V>
  __device__ __forceinline__ void factors(int column, float (&w)[V]) const {
    if (data == nullptr) {
#pragma unroll
      for (int i = 0; i < V; i++) w[i] = 1;
      return;
    }
    if (is_float) {
      widen(load<V>(static_cast<const float*>(data) + column), w);
    } else {
      widen(load<V>(static_cast<const T*>(data) + column), w);
    }
#pragma unroll
    for (int i = 0; i < V; i++) w[i] += offset;
  }
};

// The sum over all threads of a row, given to all of them. `turn` alternates between two buffers: what one call reads, the next does
// not write, so that one barrier a call is enough.
__device__ __forceinline__ float row_sum(float v, int& turn) {
  FASTPRIMER_SHARED(partial, float[2][RMS_NORM_THREADS / 32]);
  if (blockDim.x <= 32) return warp_sum(v, blockDim.x);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  v = warp_sum(v);
  if (thread % 32 == 0) partial[turn][thread / 32] = v;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < warps; i++) sum += partial[turn][first + i];
  turn ^= 1;
  return sum;
}

template <int V>
__device__ __forceinline__ float sum_of_squares(const float (&h)[V]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; i++) sum += h[i] * h[i];
  return sum;
}

// A long sum that carries along what each addition rounds away (Kahan).
struct LongSum {
  float sum = 0, lost = 0;

  __device__ __forceinline__ void add(float v) {
    const float corrected = v - lost;
    const float next = sum + corrected;
    lost = (next - sum) - corrected;
    sum = next;
  }
};

template <class T, int V>
__device__ __forceinline__ Vector<T, V> add(const Vector<T, V>& a, const Vector<T, V>& b) {
  Vector<T, V> sum;
#pragma unroll
  for (int i = 0; i < V; i++) sum.data[i] = narrow<T>(widen(a.data[i]) + widen(b.data[i]));
  return sum;
}

template <class T, int V>
__device__ __forceinline__ Vector<T, V> scale(const Vector<T, V>& h, float rstd, const float (&w)[V]) {
  Vector<T, V> y;
#pragma unroll
  for (int i = 0; i < V; i++) y.data[i] = narrow<T>(widen(h.data[i]) * rstd * w[i]);
  return y;
}

__device__ __forceinline__ float reciprocal_root(float sum, int64_t C, float eps) { return 1 / sqrtf(sum / static_cast<float>(C) + eps); }

// A thread's vectors of a row; those beyond its end stay what they are.
template <class T, int V, int K>
__device__ __forceinline__ void load_row(Vector<T, V> (&h)[K], const T* row, int vectors) {
#pragma unroll
  for (int k = 0; k < K; k++) {
    const int j = threadIdx.x + k * blockDim.x;
    if (j < vectors) h[k] = load<V>(row + j * V);
  }
}

// Moves x once in and y once out, 2 N C elements; with residual 4 N C. The row waits in registers for its sum. Neither to ask for the next
// row, nor for the factors, before the sum is known has made it faster (H100).
template <class T, int V, int K>
__global__ void __launch_bounds__(RMS_NORM_THREADS)
    rms_norm_forward_rows(const RmsNormForward args, const RmsNormWeight weight, const float eps) {
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < args.N;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const int vectors = row < args.N ? static_cast<int>(args.C / V) : 0;
    const T* x = at_row(static_cast<const T*>(args.x), row, args.stride_x_row);
    const T* residual = at_row(static_cast<const T*>(args.residual), row, args.stride_residual_row);
    T* y = at_row(static_cast<T*>(args.y), row, args.C);

    Vector<T, V> h[K] = {};
    load_row(h, x, vectors);
    if (args.residual != nullptr) {
      T* h_out = at_row(static_cast<T*>(args.h), row, args.C);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const int j = threadIdx.x + k * blockDim.x;
        if (j < vectors) h[k] = add(h[k], load<V>(residual + j * V));
      }
#pragma unroll
      for (int k = 0; k < K; k++) {
        const int j = threadIdx.x + k * blockDim.x;
        if (j < vectors) store(h_out + j * V, h[k]);
      }
    }

    float sum = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      float wide[V];
      widen(h[k], wide);
      sum += sum_of_squares(wide);
    }
    const float rstd = reciprocal_root(row_sum(sum, turn), args.C, eps);
    if (threadIdx.x == 0 && row < args.N) static_cast<float*>(args.rstd)[row] = rstd;
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int j = threadIdx.x + k * blockDim.x;
      if (j < vectors) {
        float w[V];
        weight.factors<T>(j * V, w);
        store(y + j * V, scale(h[k], rstd, w));
      }
    }
  }
}

// For rows too wide for registers: one block a row, which is read a second time, most often from a cache: 3 N C elements; with
// residual 5 N C.
template <class T, int V>
__global__ void __launch_bounds__(RMS_NORM_THREADS)
    rms_norm_forward_wide(const RmsNormForward args, const RmsNormWeight weight, const float eps) {
  const int vectors = static_cast<int>(args.C / V);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < args.N; row += gridDim.x) {
    const T* x = at_row(static_cast<const T*>(args.x), row, args.stride_x_row);
    const T* residual = at_row(static_cast<const T*>(args.residual), row, args.stride_residual_row);
    T* h_out = args.residual == nullptr ? nullptr : at_row(static_cast<T*>(args.h), row, args.C);
    T* y = at_row(static_cast<T*>(args.y), row, args.C);

    LongSum sum;
#pragma unroll 4
    for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
      Vector<T, V> h = load<V>(x + j * V);
      if (args.residual != nullptr) {
        h = add(h, load<V>(residual + j * V));
        store(h_out + j * V, h);
      }
      float wide[V];
      widen(h, wide);
      sum.add(sum_of_squares(wide));
    }
    const float rstd = reciprocal_root(row_sum(sum.sum, turn), args.C, eps);
    if (threadIdx.x == 0) static_cast<float*>(args.rstd)[row] = rstd;
    const T* h = args.residual == nullptr ? x : h_out;
#pragma unroll 4
    for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
      float w[V];
      weight.factors<T>(j * V, w);
      store(y + j * V, scale(load<V>(h + j * V), rstd, w));
    }
  }
}

}  // namespace fastprimer
