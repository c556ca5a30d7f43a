// SwiGLU and its relatives on CUDA. The mathematics: fastprimer/ops/swiglu.py.
//
// How a row lies in a grid. A row of F numbers is F / V vectors of V: 16 bytes each, or V = 1 where a pointer or a stride does not
// allow that. threads = blockDim.x threads of a block share K threads vectors of a row, blockDim.y rows make a block, gridDim.x
// blocks make a row. Thread t of a block holds the vectors
//
//   t, t + threads, ..., t + (K - 1) threads
//
// all of which it loads before it uses the first. The F % V last numbers go one by one to the threads of the row's last block.
#pragma once
#include <cmath>

#include "../swiglu.h"
#include "device.cuh"

namespace fastprimer {

constexpr int SWIGLU_THREADS = 256;  // the most in a block

// K above: vectors of each input that a thread has under way.
template <int V>
constexpr int SWIGLU_VECTORS = V > 1 ? 2 : 4;

// sigma(t) and sigma(t) (1 - sigma(t)), without overflow or cancellation.
struct Sigmoid {
  float value, derivative;
};

template <class T>
__device__ __forceinline__ Sigmoid sigmoid(float t) {
  float e, r;
  if constexpr (sizeof(T) == 2) {
    e = fast_exp(-fabsf(t));
    r = fast_reciprocal(1 + e);
  } else {
    e = expf(-fabsf(t));
    r = 1 / (1 + e);
  }
  return {t < 0 ? e * r : r, e * r * r};
}

// The chapter's alpha, beta, L and o. A NaN passes through the clamps.
struct GatedActivation {
  float alpha, beta, limit, offset;

  __device__ __forceinline__ float clamp_gate(float a) const { return smaller(a, limit); }
  __device__ __forceinline__ float clamp_up(float b) const { return larger(-limit, smaller(b, limit)); }

  // t; the square is kept finite, for without beta an infinite one would make a NaN.
  __device__ __forceinline__ float exponent(float a) const { return a * (alpha + beta * fminf(a * a, 3e38f)); }

  template <class T>
  __device__ __forceinline__ float forward(float gate, float up) const {
    const float a = clamp_gate(gate);
    return a * sigmoid<T>(exponent(a)).value * (clamp_up(up) + offset);
  }

  template <class T>
  __device__ __forceinline__ void backward(float dy, float gate, float up, float& dgate, float& dup) const {
    const float a = clamp_gate(gate), b = clamp_up(up);
    const Sigmoid sigma = sigmoid<T>(exponent(a));
    const float p = a * sigma.derivative;
    const float slope = sigma.value + alpha * p + 3 * beta * (p * a * a);
    dgate = (gate > limit ? 0 : dy) * slope * (b + offset);
    dup = (fabsf(up) > limit ? 0 : dy) * (a * sigma.value);
  }
};

// A block's part of a row: `vectors` of them from number `begin` on. Only the beginning needs 64 bits.
struct SwiGluBlock {
  int64_t begin;
  int vectors;

  __device__ __forceinline__ SwiGluBlock(int64_t vectors_of_row, int K) : begin(static_cast<int64_t>(blockIdx.x) * blockDim.x * K) {
    const int64_t left = vectors_of_row - begin, most = blockDim.x * K;
    vectors = static_cast<int>(left < most ? left : most);
  }

  // Thread t's k-th vector, or the block's last, to load and then to forget: a load that may be skipped is a branch, at which the
  // loads before it are waited for.
  __device__ __forceinline__ int vector(int k) const {
    const int j = threadIdx.x + k * blockDim.x;
    return j < vectors ? j : vectors - 1;
  }
};

template <class T, int V>
__device__ __forceinline__ Vector<T, V> gated(const GatedActivation& activation, const Vector<T, V>& gate, const Vector<T, V>& up) {
  Vector<T, V> y;
#pragma unroll
  for (int i = 0; i < V; i++) y.data[i] = narrow<T>(activation.forward<T>(widen(gate.data[i]), widen(up.data[i])));
  return y;
}

// Gradients of one vector, written to dgate and dup.
template <class T, int V>
__device__ __forceinline__ void store_gradients(const GatedActivation& activation, const Vector<T, V>& dy, const Vector<T, V>& gate,
                                                const Vector<T, V>& up, T* dgate, T* dup) {
  float da[V], db[V];
#pragma unroll
  for (int i = 0; i < V; i++) activation.backward<T>(widen(dy.data[i]), widen(gate.data[i]), widen(up.data[i]), da[i], db[i]);
  store(dgate, narrow<T>(da));
  store(dup, narrow<T>(db));
}

// Moves gate and up once in and y once out: 3 N F elements.
template <class T, int V>
__global__ void __launch_bounds__(SWIGLU_THREADS) swiglu_forward_rows(const SwiGluForward args, const GatedActivation activation) {
  constexpr int K = SWIGLU_VECTORS<V>;
  const SwiGluBlock at(args.F / V, K);
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < args.N; row += gridDim.y * blockDim.y) {
    const T* gate = static_cast<const T*>(args.gate) + row * args.stride_gate_row + at.begin * V;
    const T* up = static_cast<const T*>(args.up) + row * args.stride_up_row + at.begin * V;
    T* y = static_cast<T*>(args.y) + whole(row * args.F + at.begin * V);

    if (at.vectors > 0) {
      Vector<T, V> a[K], b[K];
#pragma unroll
      for (int k = 0; k < K; k++) {
        const int i = at.vector(k) * V;
        a[k] = load<V>(gate + i);
        b[k] = load<V>(up + i);
      }
      issue_loads();
#pragma unroll
      for (int k = 0; k < K; k++) {
        const int j = threadIdx.x + k * blockDim.x;
        if (j < at.vectors) store(y + j * V, gated(activation, a[k], b[k]));
      }
    }
    if (blockIdx.x + 1 < gridDim.x) continue;
    const int end = static_cast<int>(args.F - at.begin * V);
    for (int i = at.vectors * V + threadIdx.x; i < end; i += blockDim.x) {
      store(y + i, gated(activation, load<1>(gate + i), load<1>(up + i)));
    }
  }
}

// Moves dy, gate and up once in, dgate and dup once out: 5 N F elements.
template <class T, int V>
__global__ void __launch_bounds__(SWIGLU_THREADS) swiglu_backward_rows(const SwiGluBackward args, const GatedActivation activation) {
  constexpr int K = SWIGLU_VECTORS<V>;
  const SwiGluBlock at(args.F / V, K);
  for (int64_t row = blockIdx.y * blockDim.y + threadIdx.y; row < args.N; row += gridDim.y * blockDim.y) {
    const T* dy = static_cast<const T*>(args.dy) + row * args.stride_dy_row + at.begin * V;
    const T* gate = static_cast<const T*>(args.gate) + row * args.stride_gate_row + at.begin * V;
    const T* up = static_cast<const T*>(args.up) + row * args.stride_up_row + at.begin * V;
    T* dgate = static_cast<T*>(args.dgate) + whole(row * args.stride_dgate_row + at.begin * V);
    T* dup = static_cast<T*>(args.dup) + whole(row * args.stride_dup_row + at.begin * V);

    if (at.vectors > 0) {
      Vector<T, V> upstream[K], a[K], b[K];
#pragma unroll
      for (int k = 0; k < K; k++) {
        const int i = at.vector(k) * V;
        upstream[k] = load<V>(dy + i);
        a[k] = load<V>(gate + i);
        b[k] = load<V>(up + i);
      }
      issue_loads();
#pragma unroll
      for (int k = 0; k < K; k++) {
        const int j = threadIdx.x + k * blockDim.x;
        if (j < at.vectors) store_gradients(activation, upstream[k], a[k], b[k], dgate + j * V, dup + j * V);
      }
    }
    if (blockIdx.x + 1 < gridDim.x) continue;
    const int end = static_cast<int>(args.F - at.begin * V);
    for (int i = at.vectors * V + threadIdx.x; i < end; i += blockDim.x) {
      store_gradients(activation, load<1>(dy + i), load<1>(gate + i), load<1>(up + i), dgate + i, dup + i);
    }
  }
}

}  // namespace fastprimer
