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

// Moves x once in and y once out, 2 N C elements; with residual 4 N C. The row waits in registers for its sum.
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
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int j = threadIdx.x + k * blockDim.x;
      if (j < vectors) h[k] = load<V>(x + j * V);
    }
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

// What both backward kernels do with one vector. First: its part of the row's sum of g h_hat, and of dweight.
template <class T, int V>
__device__ __forceinline__ float gather(const Vector<T, V>& dy, const Vector<T, V>& h, float rstd, const float (&w)[V],
                                        float (&dweight)[V]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; i++) {
    const float h_hat = widen(h.data[i]) * rstd;
    sum += widen(dy.data[i]) * w[i] * h_hat;
    dweight[i] += widen(dy.data[i]) * h_hat;
  }
  return sum;
}

// Then: dx = rstd (g - h_hat mean) + dh.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> input_gradient(const Vector<T, V>& dy, const Vector<T, V>& h, float rstd, float mean,
                                                       const float (&w)[V], const T* dh) {
  float dx[V];
#pragma unroll
  for (int i = 0; i < V; i++) dx[i] = rstd * (widen(dy.data[i]) * w[i] - widen(h.data[i]) * rstd * mean);
  if (dh != nullptr) {
    float more[V];
    widen(load<V>(dh), more);
#pragma unroll
    for (int i = 0; i < V; i++) dx[i] += more[i];
  }
  return narrow<T>(dx);
}

// Adds the rows of a block to one row of partial sums, column by column, in the order of the rows.
template <int V, int K>
__device__ __forceinline__ void store_partial(const float (&dweight)[K][V], float* partial, int C) {
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int rows = blockDim.y, columns = blockDim.x * V;
#pragma unroll
  for (int k = 0; k < K; k++) {
    if (rows == 1) {
      const int column = (k * blockDim.x + threadIdx.x) * V;
      Vector<float, V> sum;
#pragma unroll
      for (int i = 0; i < V; i++) sum.data[i] = dweight[k][i];
      if (column < C) store(partial + column, sum);
      continue;
    }
#pragma unroll
    for (int i = 0; i < V; i++) sums[thread * V + i] = dweight[k][i];
    __syncthreads();
    for (int i = thread; i < columns && k * columns + i < C; i += blockDim.x * rows) {
      float sum = 0;
      for (int r = 0; r < rows; r++) sum += sums[r * columns + i];
      partial[k * columns + i] = sum;
    }
    __syncthreads();
  }
}

// Moves dy and h once in and dx once out, 3 N C elements (4 N C with dh), and the partial sums. Persistent: about as many blocks as
// the device holds at once, each with a stride of rows, so that a thread adds dweight of its columns up in registers.
template <class T, int V, int K>
__global__ void __launch_bounds__(RMS_NORM_THREADS, K == 1 ? 2 : 1)
    rms_norm_backward_rows(const RmsNormBackward args, const RmsNormWeight weight) {
  float dweight[K][V] = {};
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < args.N;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const int vectors = row < args.N ? static_cast<int>(args.C / V) : 0;
    const T* dy_row = at_row(static_cast<const T*>(args.dy), row, args.stride_dy_row);
    const T* h_row = at_row(static_cast<const T*>(args.h), row, args.stride_h_row);
    const T* dh_row = at_row(static_cast<const T*>(args.dh), row, args.stride_dh_row);
    T* dx_row = at_row(static_cast<T*>(args.dx), row, args.C);
    const float rstd = row < args.N ? static_cast<const float*>(args.rstd)[row] : 0;

    Vector<T, V> dy[K] = {}, h[K] = {};
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int j = threadIdx.x + k * blockDim.x;
      if (j < vectors) {
        dy[k] = load<V>(dy_row + j * V);
        h[k] = load<V>(h_row + j * V);
      }
    }
    float sum = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int j = threadIdx.x + k * blockDim.x;
      if (j < vectors) {
        float w[V];
        weight.factors<T>(j * V, w);
        sum += gather(dy[k], h[k], rstd, w, dweight[k]);
      }
    }
    const float mean = row_sum(sum, turn) / static_cast<float>(args.C);
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int j = threadIdx.x + k * blockDim.x;
      if (j < vectors) {
        float w[V];
        weight.factors<T>(j * V, w);
        store(dx_row + j * V, input_gradient(dy[k], h[k], rstd, mean, w, at_row(dh_row, j, V)));
      }
    }
  }
  if (weight.data != nullptr) {
    store_partial(dweight, at_row(static_cast<float*>(args.partial), blockIdx.x, args.C), static_cast<int>(args.C));
  }
}

// For rows too wide for registers: one block a row, read twice, 5 N C elements (6 N C with dh); dweight is added up in the block's row
// of the workspace, where each column belongs to one thread: 2 N C numbers of float32 more, which the L2 cache holds.
template <class T, int V>
__global__ void __launch_bounds__(RMS_NORM_THREADS) rms_norm_backward_wide(const RmsNormBackward args, const RmsNormWeight weight) {
  const int vectors = static_cast<int>(args.C / V);
  float* partial = at_row(static_cast<float*>(args.partial), blockIdx.x, args.C);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < args.N; row += gridDim.x) {
    const T* dy = at_row(static_cast<const T*>(args.dy), row, args.stride_dy_row);
    const T* h = at_row(static_cast<const T*>(args.h), row, args.stride_h_row);
    const T* dh = at_row(static_cast<const T*>(args.dh), row, args.stride_dh_row);
    T* dx = at_row(static_cast<T*>(args.dx), row, args.C);
    const float rstd = static_cast<const float*>(args.rstd)[row];

    LongSum sum;
#pragma unroll 2
    for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
      float w[V];
      weight.factors<T>(j * V, w);
      Vector<float, V> dweight = {};
      if (weight.data != nullptr && row != blockIdx.x) dweight = load<V>(partial + j * V);
      sum.add(gather(load<V>(dy + j * V), load<V>(h + j * V), rstd, w, dweight.data));
      if (weight.data != nullptr) store(partial + j * V, dweight);
    }
    const float mean = row_sum(sum.sum, turn) / static_cast<float>(args.C);
#pragma unroll 2
    for (int j = threadIdx.x; j < vectors; j += blockDim.x) {
      float w[V];
      weight.factors<T>(j * V, w);
      store(dx + j * V, input_gradient(load<V>(dy + j * V), load<V>(h + j * V), rstd, mean, w, at_row(dh, j, V)));
    }
  }
}

constexpr int RMS_NORM_LINES = 16;  // the most in a block

// The second pass of dweight: 32 columns a block. Line i of blockDim.y adds partial rows i, i + lines, ..., and one thread a column
// adds the lines: always the same order. Moves partials C numbers in.
template <class W>
__global__ void __launch_bounds__(32 * RMS_NORM_LINES) rms_norm_dweight(const float* partial, int64_t partials, int64_t C, W* dweight) {
  FASTPRIMER_SHARED(line_sums, float[RMS_NORM_LINES][32]);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const int lines = blockDim.y;
  float sum = 0;
  if (column < C) {
    for (int64_t p = threadIdx.y; p < partials; p += lines) sum += partial[p * C + column];
  }
  line_sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= C) return;
  for (int i = 1; i < lines; i++) sum += line_sums[i][threadIdx.x];
  dweight[column] = narrow<W>(sum);
}

}  // namespace fastprimer
