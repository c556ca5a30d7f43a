// A matrix product d = a b: a (M, K), b (K, N) in bfloat16 or float16, d (M, N) in float32, all row-major. It is no operation of
// fastprimer. It is the smallest kernel that uses cp.async, ldmatrix and mma together the way attention does, and so the emulator's own
// test, the compile gate's, and (probe.cu) the hardware's. K and N must be multiples of 8.
//
// A block of four warps makes a 64 x 64 tile of d, each warp 32 x 32 of it, from 64 x 32 tiles of a and 32 x 64 tiles of b, two of each:
// while one is multiplied, the next is on its way. Tiles are stored in chunks of 8 elements (16 bytes), permuted within a row so that
// the eight rows of an 8 x 8 matrix lie in different banks.
#pragma once
#include "device.cuh"

namespace fastprimer {

constexpr int GEMM_TILE = 64, GEMM_DEPTH = 32, GEMM_THREADS = 128;

template <class T>
struct GemmStage {
  T a[GEMM_TILE][GEMM_DEPTH];
  T b[GEMM_DEPTH][GEMM_TILE];

  __device__ __forceinline__ T* a_chunk(int row, int chunk) { return &a[row][((chunk ^ (row / 2)) % 4) * 8]; }
  __device__ __forceinline__ T* b_chunk(int row, int chunk) { return &b[row][((chunk ^ row) % 8) * 8]; }
};

// Starts the copies of one stage. What lies outside a or b becomes zero.
template <class T>
__device__ __forceinline__ void gemm_fetch(GemmStage<T>& stage, const T* a, const T* b, int M, int N, int K, int m0, int n0, int k0) {
  for (int i = threadIdx.x; i < GEMM_TILE * GEMM_DEPTH / 8; i += GEMM_THREADS) {
    const int row = i / 4, chunk = i % 4, k = k0 + chunk * 8;
    const bool inside = m0 + row < M && k < K;
    copy_async(stage.a_chunk(row, chunk), inside ? a + static_cast<int64_t>(m0 + row) * K + k : a, inside ? 16 : 0);
  }
  for (int i = threadIdx.x; i < GEMM_DEPTH * GEMM_TILE / 8; i += GEMM_THREADS) {
    const int row = i / 8, chunk = i % 8, n = n0 + chunk * 8;
    const bool inside = k0 + row < K && n < N;
    copy_async(stage.b_chunk(row, chunk), inside ? b + static_cast<int64_t>(k0 + row) * N + n : b, inside ? 16 : 0);
  }
  copy_async_commit();
}

// d += a b over one stage, for the warp whose part begins at (m, n) of the tile.
template <class T>
__device__ __forceinline__ void gemm_multiply(GemmStage<T>& stage, float (&d)[2][4][4], int m, int n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < GEMM_DEPTH; k += 16) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++) load_matrix<false>(a[i], stage.a_chunk(m + 16 * i + lane % 16, k / 8 + lane / 16));
#pragma unroll
    for (int j = 0; j < 2; j++) load_matrix<true>(b[j], stage.b_chunk(k + lane % 16, n / 8 + 2 * j + lane / 16));
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply_accumulate<T>(d[i][j], a[i], column);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(GEMM_THREADS) gemm_kernel(const T* a, const T* b, float* d, int M, int N, int K) {
  GemmStage<T>* stages = reinterpret_cast<GemmStage<T>*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m0 = blockIdx.y * GEMM_TILE, n0 = blockIdx.x * GEMM_TILE;
  const int m_warp = warp / 2 * 32, n_warp = warp % 2 * 32;

  float sums[2][4][4] = {};
  gemm_fetch(stages[0], a, b, M, N, K, m0, n0, 0);
  for (int k0 = 0, stage = 0; k0 < K; k0 += GEMM_DEPTH, stage ^= 1) {
    if (k0 + GEMM_DEPTH < K) {
      gemm_fetch(stages[stage ^ 1], a, b, M, N, K, m0, n0, k0 + GEMM_DEPTH);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();  // the stage has arrived, for every thread
    gemm_multiply(stages[stage], sums, m_warp, n_warp);
    __syncthreads();  // nobody reads the stage any more
  }

#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int m = m0 + m_warp + 16 * i + lane / 4 + e / 2 * 8;
        const int n = n0 + n_warp + 8 * j + lane % 4 * 2 + e % 2;
        if (m < M && n < N) d[static_cast<int64_t>(m) * N + n] = sums[i][j][e];
      }
    }
  }
}

template <class T>
Error gemm(Cuda device, const T* a, const T* b, float* d, int M, int N, int K) {
  const dim3 grid((N + GEMM_TILE - 1) / GEMM_TILE, (M + GEMM_TILE - 1) / GEMM_TILE);
  return launch(gemm_kernel<T>, grid, dim3(GEMM_THREADS), 2 * sizeof(GemmStage<T>), device, a, b, d, M, N, K);
}

}  // namespace fastprimer
