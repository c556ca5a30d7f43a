// Attention's backward pass on CUDA, from lse: delta, then dk and dv by tiles of keys, then dq by tiles of queries, then dsinks. Every
// kernel writes what it alone computes, in an order that only shapes decide.
#pragma once
#include "attention_query_row.cuh"

namespace fastprimer {

// OWN: the rows whose gradients a block makes, 16 a warp. OTHER: how many of the rows that it passes by it takes at a time.
template <class T, int WIDTH>
struct BackwardShape {
  static constexpr bool SHORT = sizeof(T) == 2;
  static constexpr int THREADS = SHORT || WIDTH <= 128 ? 128 : 64, OWN = THREADS / 2;
  static constexpr int OTHER = SHORT ? 4096 / WIDTH : WIDTH <= 64 ? 32 : WIDTH <= 128 ? 16 : 8;
  static constexpr size_t TILES = (2 * OWN + 4 * OTHER) * WIDTH * sizeof(T);
  static_assert(TILES + 2 * OTHER * sizeof(QueryRow) <= SHARED_EVERYWHERE);
  static constexpr bool SEPARATE = WIDTH > 128;  // dk and dv do not fit in registers together
};

constexpr int DELTA_THREADS = 256, DELTA_LANES = 8;

// delta = do · o - dlse, in eight lanes a row. Moves do and o once in, 2 B S H Dv elements, and dlse; delta once out.
template <class T>
__global__ void __launch_bounds__(DELTA_THREADS) attention_delta(const AttentionBackward args, const AttentionOptions options) {
  const AttentionProblem& problem = args.problem;
  const int64_t S = args.stride_lse_head, rows = (problem.cu_seqlens_q == nullptr ? problem.B : 1) * S * problem.H;
  constexpr int ROWS = DELTA_THREADS / DELTA_LANES;
  const int lane = threadIdx.x % DELTA_LANES, Dv = static_cast<int>(problem.Dv);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * ROWS; first < rows; first += static_cast<int64_t>(gridDim.x) * ROWS) {
    const int64_t wanted = first + threadIdx.x / DELTA_LANES, row = wanted < rows ? wanted : rows - 1;
    const int64_t token = row / problem.H, h = row % problem.H, b = token / S, i = token % S;
    const T* dout =
        static_cast<const T*>(args.dout.data) + b * args.dout.stride_batch + i * args.dout.stride_token + h * args.dout.stride_head;
    const T* o = static_cast<const T*>(args.o) + row * Dv;
    float sum = 0;
    if (options.wide_dout && options.wide_o) {
      for (int d = lane * CHUNK<T>; d < Dv; d += DELTA_LANES * CHUNK<T>) {
        float dout_wide[CHUNK<T>], o_wide[CHUNK<T>];
        widen(load<CHUNK<T>>(dout + d), dout_wide);
        widen(load<CHUNK<T>>(o + d), o_wide);
#pragma unroll
        for (int e = 0; e < CHUNK<T>; e++) sum += dout_wide[e] * o_wide[e];
      }
    } else {
      for (int d = lane; d < Dv; d += DELTA_LANES) sum += widen(dout[d]) * widen(o[d]);
    }
    sum = warp_sum(sum, DELTA_LANES);
    const int64_t at = b * args.stride_lse_batch + h * args.stride_lse_head + i;
    if (args.lse[at] == -INFINITY) {
      sum = 0;  // The row sees nothing, whatever dlse is there.
    } else if (args.dlse != nullptr) {
      sum -= args.dlse[at];
    }
    if (lane == 0 && wanted < rows) args.delta[at] = sum;
  }
}

// dk and dv, or one of them. One block for each tile of OWN keys of each key/value head and sequence. Moves k and v once in and dk and
// dv once out; and for each tile q and do of the queries, of the whole group, that see any of its keys.
template <class T, int WIDTH, bool DK, bool DV>
__global__ void __launch_bounds__(BackwardShape<T, WIDTH>::THREADS)
    attention_backward_keys(const AttentionBackward args, const AttentionOptions options) {
  using Shape = BackwardShape<T, WIDTH>;
  constexpr int THREADS = Shape::THREADS, OWN = Shape::OWN, OTHER = Shape::OTHER;
  const AttentionProblem& problem = args.problem;
  const AttentionBlock at(problem, options);
  const int first_key = at.tile * OWN, last_key = min(at.T, first_key + OWN) - 1;
  if (first_key >= at.T) return;

  T* shared = reinterpret_cast<T*>(dynamic_shared());
  const Tile<T, WIDTH> k_tile{shared}, v_tile{shared + OWN * WIDTH};
  const auto q_tile = [&](int stage) { return Tile<T, WIDTH>{shared + (2 * OWN + stage * 2 * OTHER) * WIDTH}; };
  const auto dout_tile = [&](int stage) { return Tile<T, WIDTH>{shared + (2 * OWN + (stage * 2 + 1) * OTHER) * WIDTH}; };
  FASTPRIMER_SHARED(query_rows, QueryRow[2][OTHER]);
  const auto q = at.template queries<T>(problem.q, problem.D, options.wide_q);
  const auto dout = at.template queries<T>(args.dout, problem.Dv, options.wide_dout);

  const int begin = at.first_query_of(first_key) * at.G, end = at.end_query_of(last_key) * at.G;
  const auto fetch_queries = [&](int first, int stage) {
    fetch<OTHER, THREADS>(q_tile(stage), q, first, end);
    fetch<OTHER, THREADS>(dout_tile(stage), dout, first, end);
    copy_async_commit();
  };
  if (begin < end) {
    fetch<OWN, THREADS>(k_tile, at.template keys<T>(problem.k, problem.D, options.wide_k), first_key, at.T);
    if (DK) fetch<OWN, THREADS>(v_tile, at.template keys<T>(problem.v, problem.Dv, options.wide_v), first_key, at.T);
    fetch_queries(begin, 0);
    if (threadIdx.x < OTHER) query_rows[0][threadIdx.x] = query_row(args, at, begin + threadIdx.x);
  }

  const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 * 16;
  float dk[1][DK ? WIDTH / 8 : 1][4] = {}, dv[1][DV ? WIDTH / 8 : 1][4] = {};
  for (int first = begin, stage = 0; first < end; first += OTHER, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the stage has arrived, for every thread, and nobody reads the other any more
    QueryRow next = {};
    if (first + OTHER < end) {
      fetch_queries(first + OTHER, stage ^ 1);
      if (threadIdx.x < OTHER) next = query_row(args, at, first + OTHER + threadIdx.x);
    }

    float s[1][OTHER / 8][4] = {}, dp[1][OTHER / 8][4] = {};
    multiply_transposed(s, k_tile, row_warp, q_tile(stage));
    if (options.softcap > 0) cap(s, options);
    if constexpr (DK) multiply_transposed(dp, v_tile, row_warp, dout_tile(stage));
    const bool all_visible =
        first + OTHER <= end && at.first_key_of((first + OTHER - 1) / at.G) <= first_key && first_key + OWN <= at.end_key_of(first / at.G);
#pragma unroll
    for (int n = 0; n < OTHER / 4; n++) {
      const QueryRow row = query_rows[stage][n / 2 * 8 + lane % 4 * 2 + n % 2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int key = first_key + row_warp + 8 * r + lane / 4, e = 2 * r + n % 2;
        backward_of(s[0][n / 2][e], dp[0][n / 2][e], row, all_visible || (key >= row.begin && key < row.end), options);
      }
    }
    if constexpr (DV) multiply(dv, s, dout_tile(stage));
    if constexpr (DK) multiply(dk, dp, q_tile(stage));
    if (threadIdx.x < OTHER) query_rows[stage ^ 1][threadIdx.x] = next;
  }

  if constexpr (DK) {
    const auto to = at.template key_outputs<T>(args.dk, problem, problem.D, options.wide_dk);
    write_rows(dk, {{options.scale, options.scale}}, k_tile, row_warp, to, first_key, at.T);
  }
  if constexpr (DV) {
    const auto to = at.template key_outputs<T>(args.dv, problem, problem.Dv, options.wide_dv);
    write_rows(dv, {{1, 1}}, v_tile, row_warp, to, first_key, at.T);
  }
}

// dq. One block for each tile of OWN queries of each key/value head and sequence. Moves q and do once in and dq once out; and for each
// tile the keys and values that any of its queries sees.
template <class T, int WIDTH>
__global__ void __launch_bounds__(BackwardShape<T, WIDTH>::THREADS)
    attention_backward_queries(const AttentionBackward args, const AttentionOptions options) {
  using Shape = BackwardShape<T, WIDTH>;
  constexpr int THREADS = Shape::THREADS, OWN = Shape::OWN, OTHER = Shape::OTHER;
  const AttentionProblem& problem = args.problem;
  const AttentionBlock at(problem, options);
  const int rows = at.S * at.G, first_row = at.tile_from_last(rows, OWN) * OWN;
  if (first_row < 0) return;

  T* shared = reinterpret_cast<T*>(dynamic_shared());
  const Tile<T, WIDTH> q_tile{shared}, dout_tile{shared + OWN * WIDTH};
  const auto k_tile = [&](int stage) { return Tile<T, WIDTH>{shared + (2 * OWN + stage * 2 * OTHER) * WIDTH}; };
  const auto v_tile = [&](int stage) { return Tile<T, WIDTH>{shared + (2 * OWN + (stage * 2 + 1) * OTHER) * WIDTH}; };
  const auto k = at.template keys<T>(problem.k, problem.D, options.wide_k), v = at.template keys<T>(problem.v, problem.Dv, options.wide_v);

  const int first_query = first_row / at.G, last_query = min(at.S - 1, (first_row + OWN - 1) / at.G);
  const int begin = at.first_key_of(first_query), end = at.end_key_of(last_query);
  const int begin_all = at.first_key_of(last_query), end_all = at.end_key_of(first_query);
  const auto fetch_keys = [&](int first, int stage) {
    fetch<OTHER, THREADS>(k_tile(stage), k, first, end);
    fetch<OTHER, THREADS>(v_tile(stage), v, first, end);
    copy_async_commit();
  };
  if (begin < end) {
    fetch<OWN, THREADS>(q_tile, at.template queries<T>(problem.q, problem.D, options.wide_q), first_row, rows);
    fetch<OWN, THREADS>(dout_tile, at.template queries<T>(args.dout, problem.Dv, options.wide_dout), first_row, rows);
    fetch_keys(begin, 0);
  }

  const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 * 16;
  const QueryRow row[2] = {query_row(args, at, first_row + row_warp + lane / 4), query_row(args, at, first_row + row_warp + 8 + lane / 4)};
  float dq[1][WIDTH / 8][4] = {};
  for (int first = begin, stage = 0; first < end; first += OTHER, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the stage has arrived, for every thread, and nobody reads the other any more
    if (first + OTHER < end) fetch_keys(first + OTHER, stage ^ 1);

    float s[1][OTHER / 8][4] = {}, dp[1][OTHER / 8][4] = {};
    multiply_transposed(s, q_tile, row_warp, k_tile(stage));
    if (options.softcap > 0) cap(s, options);
    multiply_transposed(dp, dout_tile, row_warp, v_tile(stage));
    const bool all_visible = begin_all <= first && first + OTHER <= end_all;
#pragma unroll
    for (int n = 0; n < OTHER / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int key = first + 8 * n + lane % 4 * 2 + e % 2;
        backward_of(s[0][n][e], dp[0][n][e], row[e / 2], all_visible || (key >= row[e / 2].begin && key < row[e / 2].end), options);
      }
    }
    if (!all_visible) {
      __syncthreads();  // the scores are made
      clear_nan<OTHER, THREADS>(k_tile(stage), threadIdx.x);
      __syncthreads();
    }
    multiply(dq, dp, k_tile(stage));
  }
  const auto to = at.template query_outputs<T>(args.dq, problem, problem.D, options.wide_dq);
  write_rows(dq, {{options.scale, options.scale}}, q_tile, row_warp, to, first_row, rows);
}

constexpr int DSINKS_THREADS = 256;

// One block for each head: dsink = - sum of exp(sink - lse) delta. Moves lse and delta once in.
static __global__ void __launch_bounds__(DSINKS_THREADS) attention_dsinks(const AttentionBackward args) {
  const AttentionProblem& problem = args.problem;
  const int64_t h = blockIdx.x, S = args.stride_lse_head, rows = (problem.cu_seqlens_q == nullptr ? problem.B : 1) * S;
  float sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += DSINKS_THREADS) {
    const int64_t at = row / S * args.stride_lse_batch + h * args.stride_lse_head + row % S;
    const float lse = args.lse[at];
    if (lse != -INFINITY) sum -= expf(problem.sinks[h] - lse) * args.delta[at];
  }
  FASTPRIMER_SHARED(partial, float[DSINKS_THREADS / 32]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < DSINKS_THREADS / 32; warp++) sum += partial[warp];
  args.dsinks[h] = sum;
}

}  // namespace fastprimer
