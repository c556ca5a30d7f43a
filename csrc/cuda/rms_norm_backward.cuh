// RMSNorm's backward pass on CUDA; how a row lies in a block says rms_norm.cuh.
#pragma once
#include "rms_norm.cuh"

namespace fastprimer {

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

// What a thread's columns are multiplied by: kept in registers if those of all rows have room there, else loaded for each row.
template <class T, int V, int K>
struct ColumnFactors {
  static constexpr bool KEPT = K <= 2;
  float kept[KEPT ? K : 1][V];

  __device__ __forceinline__ ColumnFactors(const RmsNormWeight& weight, int vectors) {
    if constexpr (KEPT) {
#pragma unroll
      for (int k = 0; k < K; k++) {
        const int j = threadIdx.x + k * blockDim.x;
        if (j < vectors) weight.factors<T>(j * V, kept[k]);
      }
    }
  }
  __device__ __forceinline__ void get(const RmsNormWeight& weight, int k, int j, float (&w)[V]) const {
    if constexpr (KEPT) {
#pragma unroll
      for (int i = 0; i < V; i++) w[i] = kept[k][i];
    } else {
      weight.factors<T>(j * V, w);
    }
  }
};

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
// the device holds at once, each with a stride of rows, so that a thread adds dweight of its columns up in registers. While a row is
// summed, the next one is on its way.
template <class T, int V, int K>
__global__ void __launch_bounds__(RMS_NORM_THREADS, K == 1 ? 2 : 1)
    rms_norm_backward_rows(const RmsNormBackward args, const RmsNormWeight weight) {
  const int columns = static_cast<int>(args.C / V);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const auto load_inputs = [&](Vector<T, V>(&dy)[K], Vector<T, V>(&h)[K], float& rstd, int64_t row) {
    const bool exists = row < args.N;
    rstd = exists ? static_cast<const float*>(args.rstd)[row] : 0;
    load_row(dy, at_row(static_cast<const T*>(args.dy), row, args.stride_dy_row), exists ? columns : 0);
    load_row(h, at_row(static_cast<const T*>(args.h), row, args.stride_h_row), exists ? columns : 0);
  };
  const ColumnFactors<T, V, K> factors(weight, columns);
  Vector<T, V> next_dy[K] = {}, next_h[K] = {};
  float next_rstd, dweight[K][V] = {};
  load_inputs(next_dy, next_h, next_rstd, static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y);
  int turn = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < args.N; first += step) {
    const int64_t row = first + threadIdx.y;
    const int vectors = row < args.N ? columns : 0;
    const T* dh_row = at_row(static_cast<const T*>(args.dh), row, args.stride_dh_row);
    T* dx_row = at_row(static_cast<T*>(args.dx), row, args.C);

    Vector<T, V> dy[K], h[K];
    const float rstd = next_rstd;
#pragma unroll
    for (int k = 0; k < K; k++) {
      dy[k] = next_dy[k];
      h[k] = next_h[k];
    }
    load_inputs(next_dy, next_h, next_rstd, row + step);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int j = threadIdx.x + k * blockDim.x;
      if (j < vectors) {
        float w[V];
        factors.get(weight, k, j, w);
        sum += gather(dy[k], h[k], rstd, w, dweight[k]);
      }
    }
    const float mean = row_sum(sum, turn) / static_cast<float>(args.C);
#pragma unroll
    for (int k = 0; k < K; k++) {
      const int j = threadIdx.x + k * blockDim.x;
      if (j < vectors) {
        float w[V];
        factors.get(weight, k, j, w);
        store(dx_row + j * V, input_gradient(dy[k], h[k], rstd, mean, w, at_row(dh_row, j, V)));
      }
    }
  }
  if (args.dweight != nullptr) {
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
      if (args.dweight != nullptr && row != blockIdx.x) dweight = load<V>(partial + j * V);
      sum.add(gather(load<V>(dy + j * V), load<V>(h + j * V), rstd, w, dweight.data));
      if (args.dweight != nullptr) store(partial + j * V, dweight);
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
