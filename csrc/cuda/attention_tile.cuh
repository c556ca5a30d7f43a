// What attention's CUDA kernels share: tiles in shared memory, their products, and which keys a query sees.
//
// Rows of queries. Key/value head hk serves the G = H / Hk query heads of its group, so a tile of queries holds all of them: row r of
// a sequence is query r / G with head hk G + r % G, and keys and values are loaded once for the group.
//
// Accumulators. A warp has MT times 16 rows of a product. With i = lane / 4 and j = 2 (lane % 4), element e of acc[m][n] is row
// 16 m + i + 8 (e / 2), column 8 n + j + e % 2: mma's layout, in float32 too.
//
// float32 has no matrix instruction that is as exact, so its products are made of fused multiply-adds in the same layout.
#pragma once
#include <cmath>

#include "../attention.h"
#include "tile.cuh"

namespace fastprimer {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Rows in global memory: of keys, or of queries (GROUPED, see above). wide: 16-byte accesses are allowed.
template <class T, bool GROUPED>
struct Rows {
  T* data;
  int64_t stride_token, stride_head;
  int G, features;
  bool wide;

  __device__ __forceinline__ T* row(int r) const {
    if constexpr (!GROUPED) return data + r * stride_token;
    const int token = static_cast<unsigned>(r) / static_cast<unsigned>(G);
    return data + token * stride_token + (r - token * G) * stride_head;
  }

  // The same rows from a feature on.
  __device__ __forceinline__ Rows from(int feature) const {
    return {data + feature, stride_token, stride_head, G, features - feature, wide};
  }
};

// Starts to copy rows `first` .. first + ROWS - 1 into a tile; rows from `end` on and features past the last become zero.
template <int ROWS, int THREADS, class T, int WIDTH, class Source>
__device__ __forceinline__ void fetch(const Tile<T, WIDTH>& tile, const Source& from, int first, int end) {
  constexpr int CHUNKS = WIDTH / CHUNK<T>;
  const int chunk = threadIdx.x % CHUNKS, feature = chunk * CHUNK<T>;
  const int left = from.features - feature, count = left < 0 ? 0 : left < CHUNK<T> ? left : CHUNK<T>;
#pragma unroll
  for (int row = threadIdx.x / CHUNKS; row < ROWS; row += THREADS / CHUNKS) {
    const bool inside = first + row < end && count > 0;
    const T* source = inside ? from.row(first + row) + feature : from.data;
    if (from.wide) {
      copy_async(tile.chunk(row, chunk), source, inside ? count * static_cast<int>(sizeof(T)) : 0);
    } else {
      Vector<T, CHUNK<T>> v;
#pragma unroll
      for (int e = 0; e < CHUNK<T>; e++) v.data[e] = inside && e < count ? source[e] : T{};
      store(tile.chunk(row, chunk), v);
    }
  }
}

// acc += a b^T for the warp's rows of a, which begin at row_a, and all 8 N rows of b.
template <int MT, int N, class T, int WIDTH>
__device__ __forceinline__ void multiply_transposed(float (&acc)[MT][N][4], const Tile<T, WIDTH>& a, int row_a, const Tile<T, WIDTH>& b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
      uint32_t a_part[MT][4];
#pragma unroll
      for (int m = 0; m < MT; m++) load_matrix<false>(a_part[m], a.chunk(row_a + 16 * m + lane % 16, k / 8 + lane / 16));
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t b_part[4];
        load_matrix<false>(b_part, b.chunk(8 * n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
        const uint32_t left[2] = {b_part[0], b_part[1]}, right[2] = {b_part[2], b_part[3]};
#pragma unroll
        for (int m = 0; m < MT; m++) {
          multiply_accumulate<T>(acc[m][n], a_part[m], left);
          multiply_accumulate<T>(acc[m][n + 1], a_part[m], right);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < WIDTH / 4; k++) {
      Vector<T, 4> a_part[MT][2];
#pragma unroll
      for (int m = 0; m < 2 * MT; m++) a_part[m / 2][m % 2] = load<4>(a.chunk(row_a + 8 * m + lane / 4, k));
#pragma unroll
      for (int n = 0; n < 2 * N; n++) {
        const Vector<T, 4> b_part = load<4>(b.chunk(n / 2 * 8 + lane % 4 * 2 + n % 2, k));
#pragma unroll
        for (int m = 0; m < 2 * MT; m++) {
#pragma unroll
          for (int e = 0; e < 4; e++) acc[m / 2][n / 2][m % 2 * 2 + n % 2] += a_part[m / 2][m % 2].data[e] * b_part.data[e];
        }
      }
    }
  }
}

// acc += weights b: what multiply_transposed has left in registers, rounded to T, times the 8 N rows of b.
template <int MT, int N, class T, int WIDTH>
__device__ __forceinline__ void multiply(float (&acc)[MT][WIDTH / 8][4], const float (&weights)[MT][N][4], const Tile<T, WIDTH>& b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      uint32_t a_part[MT][4];
#pragma unroll
      for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float (&pair)[4] = weights[m][k + e / 2];
          a_part[m][e] = narrow_pair<T>(pair[e % 2 * 2], pair[e % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n += 2) {
        uint32_t b_part[4];
        load_matrix<true>(b_part, b.chunk(8 * k + lane % 16, n + lane / 16));
        const uint32_t left[2] = {b_part[0], b_part[1]}, right[2] = {b_part[2], b_part[3]};
#pragma unroll
        for (int m = 0; m < MT; m++) {
          multiply_accumulate<T>(acc[m][n], a_part[m], left);
          multiply_accumulate<T>(acc[m][n + 1], a_part[m], right);
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < 8 * N; k++) {
      const int holder = lane / 4 * 4 + k % 8 / 2;  // the lane that has column k of these rows
      float a_part[2 * MT];
#pragma unroll
      for (int m = 0; m < 2 * MT; m++) a_part[m] = __shfl_sync(FULL_WARP, weights[m / 2][k / 8][m % 2 * 2 + k % 2], holder);
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n++) {
        const Vector<T, 2> b_part = load<2>(b.pair(k, n, lane));
#pragma unroll
        for (int m = 0; m < 2 * MT; m++) {
#pragma unroll
          for (int e = 0; e < 2; e++) acc[m / 2][n][m % 2 * 2 + e] += a_part[m] * b_part.data[e];
        }
      }
    }
  }
}

// Writes the warp's rows of acc, each times its factor, to rows first_row + row_a ... below `end`. On the way they lie in the warp's
// rows of `tile`, which no other warp may still read, so that memory is written in accesses of 16 bytes.
template <int MT, class T, int WIDTH, bool GROUPED>
__device__ __forceinline__ void write_rows(const float (&acc)[MT][WIDTH / 8][4], const float (&factor)[MT][2], const Tile<T, WIDTH>& tile,
                                           int row_a, const Rows<T, GROUPED>& to, int first_row, int end) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < 2 * MT; m++) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
      Vector<T, 2> pair;
#pragma unroll
      for (int e = 0; e < 2; e++) pair.data[e] = narrow<T>(acc[m / 2][n][m % 2 * 2 + e] * factor[m / 2][m % 2]);
      store(tile.pair(row_a + 8 * m + lane / 4, n, lane), pair);
    }
  }
  __syncwarp();
  constexpr int CHUNKS = WIDTH / CHUNK<T>;
  for (int i = lane; i < 16 * MT * CHUNKS; i += 32) {
    const int row = row_a + i / CHUNKS, chunk = i % CHUNKS, left = to.features - chunk * CHUNK<T>;
    if (first_row + row >= end || left <= 0) continue;
    T* out = to.row(first_row + row) + chunk * CHUNK<T>;
    const Vector<T, CHUNK<T>> v = load<CHUNK<T>>(tile.chunk(row, chunk));
    if (to.wide) {
      store(out, v);
    } else {
#pragma unroll
      for (int e = 0; e < CHUNK<T>; e++) {
        if (e < left) out[e] = v.data[e];
      }
    }
  }
}

// What the host works out for all kernels.
struct AttentionOptions {
  float scale, softcap;  // softcap 0: none
  float exponent;        // from a logit, after a softcap, to base 2; without softcap the scale is in it
  int left, right;       // at most ATTENTION_MOST_TOKENS: no limit
  bool wide_q, wide_k, wide_v, wide_o, wide_dout, wide_dq, wide_dk, wide_dv;
};

constexpr int ATTENTION_MOST_TOKENS = (1 << 30) - 1;

// c tanh(scale s / c): what a softcap c makes of scores.
template <int MT, int N>
__device__ __forceinline__ void cap(float (&s)[MT][N][4], const AttentionOptions& options) {
  const float into_tanh = options.scale / options.softcap;
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = options.softcap * tanhf(s[m][n][e] * into_tanh);
    }
  }
}

// The sequence, and the key/value head with its group, that a block works on. Blocks of all sequences and heads follow each other for
// each tile, so that the first tiles of all start first.
struct AttentionBlock {
  int tile, b, hk, G, S, T, left, right;
  int64_t first_query, first_key;  // of a packed sequence, among all tokens

  __device__ __forceinline__ AttentionBlock(const AttentionProblem& problem, const AttentionOptions& options)
      : G(static_cast<int>(problem.H / problem.Hk)), left(options.left), right(options.right) {
    const int heads = static_cast<int>(problem.Hk), sequences = static_cast<int>(problem.B);
    tile = blockIdx.x / (heads * sequences);
    b = blockIdx.x / heads % sequences;
    hk = blockIdx.x % heads;
    const bool packed = problem.cu_seqlens_q != nullptr;
    first_query = packed ? problem.cu_seqlens_q[b] : 0;
    first_key = packed ? problem.cu_seqlens_k[b] : 0;
    S = static_cast<int>(packed ? problem.cu_seqlens_q[b + 1] - first_query : problem.S);
    T = static_cast<int>(packed ? problem.cu_seqlens_k[b + 1] - first_key : problem.T);
  }

  // The block's tile of queries, the last one first: under a causal mask that sees most keys. Negative: there is none.
  __device__ __forceinline__ int tile_from_last(int rows, int size) const { return (rows + size - 1) / size - 1 - tile; }

  // The keys that query i sees, and the queries that see key j: from a first one to before an end, which may come before the first.
  __device__ __forceinline__ int first_key_of(int i) const { return max(0, i + T - S - left); }
  __device__ __forceinline__ int end_key_of(int i) const { return min(T, i + T - S + right + 1); }
  __device__ __forceinline__ int first_query_of(int j) const { return max(0, j + S - T - right); }
  __device__ __forceinline__ int end_query_of(int j) const { return min(S, j + S - T + left + 1); }

  template <class Element>
  __device__ __forceinline__ Rows<const Element, true> queries(const Heads& heads, int64_t features, bool wide) const {
    const Element* data = static_cast<const Element*>(heads.data) + b * heads.stride_batch + first_query * heads.stride_token;
    return {data + hk * G * heads.stride_head, heads.stride_token, heads.stride_head, G, static_cast<int>(features), wide};
  }
  template <class Element>
  __device__ __forceinline__ Rows<const Element, false> keys(const Heads& heads, int64_t features, bool wide) const {
    const Element* data = static_cast<const Element*>(heads.data) + b * heads.stride_batch + first_key * heads.stride_token;
    return {data + hk * heads.stride_head, heads.stride_token, 0, 1, static_cast<int>(features), wide};
  }

  // Contiguous outputs: (B, tokens, heads, features).
  template <class Element>
  __device__ __forceinline__ Rows<Element, true> query_outputs(void* data, const AttentionProblem& problem, int64_t features,
                                                               bool wide) const {
    const int64_t token = problem.cu_seqlens_q == nullptr ? b * problem.S : first_query;
    Element* first = static_cast<Element*>(data) + (token * problem.H + hk * G) * features;
    return {first, problem.H * features, features, G, static_cast<int>(features), wide};
  }
  template <class Element>
  __device__ __forceinline__ Rows<Element, false> key_outputs(void* data, const AttentionProblem& problem, int64_t features,
                                                              bool wide) const {
    const int64_t token = problem.cu_seqlens_k == nullptr ? b * problem.T : first_key;
    Element* first = static_cast<Element*>(data) + (token * problem.Hk + hk) * features;
    return {first, problem.Hk * features, 0, 1, static_cast<int>(features), wide};
  }

  // Where lse, or delta, of row r of the block's queries is.
  template <class Args>
  __device__ __forceinline__ int64_t lse_at(const Args& args, int r) const {
    const int i = static_cast<unsigned>(r) / static_cast<unsigned>(G);
    return b * args.stride_lse_batch + (hk * G + r - i * G) * args.stride_lse_head + first_query + i;
  }
};

}  // namespace fastprimer
