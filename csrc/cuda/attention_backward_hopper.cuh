// Attention's backward pass on Hopper: dk and dv by tiles of keys, and dq by tiles of queries, as in attention_backward.cuh, where delta
// and dsinks are. Two warpgroups of consumers have 64 rows each, and while one makes ds from s and dp, the other multiplies.
#pragma once
#include "attention_hopper_tile.cuh"
#include "attention_query_row.cuh"

namespace fastprimer {

// Options whose softcap the compiler knows to be none if not CAPPED: its code takes registers that the other kernels need.
template <bool CAPPED>
__device__ __forceinline__ AttentionOptions with_cap(AttentionOptions options) {
  if (!CAPPED) options.softcap = 0;
  return options;
}

// The tiles of a block in shared memory. OWN: the rows whose gradients it makes, k and v, or q and do. OTHER: those that it passes by.
template <class T, int WIDTH, int OTHER>
struct HopperBackward {
  T own[2][HOPPER_OWN * WIDTH], other[HOPPER_STAGES][2][OTHER * WIDTH];
  Barrier own_full, full[HOPPER_STAGES], free[HOPPER_STAGES];

  __device__ __forceinline__ void init_barriers(int producers) {
    barrier_init(own_full, 1);
    for (int stage = 0; stage < HOPPER_STAGES; stage++) {
      barrier_init(full[stage], producers);
      barrier_init(free[stage], HOPPER_CONSUMERS / 32);
    }
    barrier_init_done();
  }

  // Starts s = own[0] other[0]^T and dp = own[1] other[1]^T, and waits for them.
  __device__ __forceinline__ void multiply(float (&s)[1][OTHER / 8][4], float (&dp)[1][OTHER / 8][4], int stage) {
    warpgroup_fence(s[0], dp[0]);
    start_transposed<HOPPER_OWN, WIDTH>(s, own[0] + warpgroup_row() * PANEL, other[stage][0]);
    start_transposed<HOPPER_OWN, WIDTH>(dp, own[1] + warpgroup_row() * PANEL, other[stage][1]);
    warpgroup_wait<0>(s[0], dp[0]);
  }
};

constexpr int HOPPER_QUERIES = 64, HOPPER_KEYS = 128;  // that are passed by at a time

template <class T, int WIDTH>
struct HopperBackwardKeys : HopperBackward<T, WIDTH, HOPPER_QUERIES> {
  QueryRow rows[HOPPER_STAGES][HOPPER_QUERIES];
};

// The keys of a block, and the queries that see any of them, in tiles of `tokens`.
struct HopperKeys {
  int first_key, tokens, begin, end;

  __device__ __forceinline__ explicit HopperKeys(const AttentionBlock& at)
      : first_key(at.tile * HOPPER_OWN),
        tokens(HOPPER_QUERIES / at.G),
        begin(at.first_query_of(first_key)),
        end(at.end_query_of(min(at.T, first_key + HOPPER_OWN) - 1)) {}
};

// What a warp of producers does for dk and dv: one thread copies tiles, all fetch what else is needed of their rows.
template <class T, int WIDTH>
__device__ __forceinline__ void load_queries(HopperBackwardKeys<T, WIDTH>& shared, const AttentionBackward& args, const AttentionBlock& at,
                                             const HopperKeys& keys, const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                                             const TensorMap& dout_map) {
  constexpr int ROW_BYTES = WIDTH * sizeof(T);
  const int sequence = args.problem.cu_seqlens_q == nullptr ? at.b : 0, rows = keys.tokens * at.G;
  if (keys.begin < keys.end && threadIdx.x == 0) {
    barrier_expect(shared.own_full, 2 * HOPPER_OWN * ROW_BYTES);
    copy_panels<HOPPER_OWN, WIDTH>(shared.own[0], k_map, shared.own_full, at.hk, at.first_key + keys.first_key, sequence);
    copy_panels<HOPPER_OWN, WIDTH>(shared.own[1], v_map, shared.own_full, at.hk, at.first_key + keys.first_key, sequence);
  }
  Stage stage;
  for (int token = keys.begin; token < keys.end; token += keys.tokens, ++stage) {
    auto& full = shared.full[stage.index];
    auto& tiles = shared.other[stage.index];
    barrier_wait(shared.free[stage.index], stage.parity ^ 1);
    for (int r = threadIdx.x; r < HOPPER_QUERIES; r += 32) {
      shared.rows[stage.index][r] = r < rows ? query_row(args, at, token * at.G + r) : QueryRow{INFINITY, 0, 0, 0};
    }
    if (threadIdx.x > 0) {
      barrier_arrive(full);
    } else {
      barrier_expect(full, 2 * rows * ROW_BYTES);
      copy_panels<HOPPER_QUERIES, WIDTH>(tiles[0], q_map, full, at.hk * at.G, at.first_query + token, sequence);
      copy_panels<HOPPER_QUERIES, WIDTH>(tiles[1], dout_map, full, at.hk * at.G, at.first_query + token, sequence);
    }
  }
}

// What a warpgroup of consumers does for its rows of dk and dv: S^T = K Q^T, so that P^T and dS^T are factors as they are.
template <class T, int WIDTH>
__device__ __forceinline__ void sum_keys(float (&dk)[1][WIDTH / 8][4], float (&dv)[1][WIDTH / 8][4], HopperBackwardKeys<T, WIDTH>& shared,
                                         const AttentionBlock& at, const HopperKeys& keys, const AttentionOptions& options) {
  constexpr int OTHER = HOPPER_QUERIES;
  const int lane = threadIdx.x % 32, rows = keys.tokens * at.G, key = keys.first_key + warpgroup_row() + warp_row() + lane / 4;
  if (rows < OTHER) {
    for (auto& tiles : shared.other) {
      clear_rows<OTHER, WIDTH>(tiles[0], rows);
      clear_rows<OTHER, WIDTH>(tiles[1], rows);
    }
  }
  barrier_wait(shared.own_full, 0);
  Stage stage;
  for (int token = keys.begin; token < keys.end; token += keys.tokens, ++stage) {
    const T *q = shared.other[stage.index][0], *dout = shared.other[stage.index][1];
    barrier_wait(shared.full[stage.index], stage.parity);
    const int left = (keys.end - token) * at.G;
    if (left < rows) {
      clear_rows<OTHER, WIDTH>(shared.other[stage.index][0], left);
      clear_rows<OTHER, WIDTH>(shared.other[stage.index][1], left);
    }
    float s[1][OTHER / 8][4], dp[1][OTHER / 8][4];
    shared.multiply(s, dp, stage.index);
    if (options.softcap > 0) cap(s, options);
    const int last = token + keys.tokens - 1;
    const bool all_visible =
        last < keys.end && at.first_key_of(last) <= keys.first_key && keys.first_key + HOPPER_OWN <= at.end_key_of(token);
#pragma unroll
    for (int n = 0; n < OTHER / 4; n++) {
      const QueryRow row = shared.rows[stage.index][n / 2 * 8 + lane % 4 * 2 + n % 2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int e = 2 * r + n % 2;
        backward_of(s[0][n / 2][e], dp[0][n / 2][e], row, all_visible || (key + 8 * r >= row.begin && key + 8 * r < row.end), options);
      }
    }
    uint32_t p[OTHER / PRODUCT_DEPTH][4], ds[OTHER / PRODUCT_DEPTH][4];
    to_factor<T>(p, s);
    to_factor<T>(ds, dp);
    warpgroup_fence(dv[0], dk[0], p, ds);
    start_sum(dv, p, dout);
    start_sum(dk, ds, q);
    warpgroup_wait<0>(dv[0], dk[0]);
    release(shared.free[stage.index]);
  }
}

// dk and dv. One block for each tile of HOPPER_OWN keys of each key/value head and sequence. Moves k and v once in and dk and dv once
// out; and for each tile q and do of the queries, of the whole group, that see any of its keys. Each of these rows and each key of the
// tile costs 4 (D + Dv) FLOPs.
template <class T, int WIDTH, bool CAPPED>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    attention_backward_keys_hopper(const AttentionBackward args, const AttentionOptions given, const __grid_constant__ TensorMap q_map,
                                   const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                                   const __grid_constant__ TensorMap dout_map) {
  const AttentionProblem& problem = args.problem;
  const AttentionOptions options = with_cap<CAPPED>(given);
  const AttentionBlock at(problem, options);
  const HopperKeys keys(at);
  if (keys.first_key >= at.T) return;
  auto& shared = *reinterpret_cast<HopperBackwardKeys<T, WIDTH>*>(dynamic_shared());
  if (threadIdx.x == 0) shared.init_barriers(32);
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    give_registers<40>();
    if (threadIdx.x < 32) load_queries(shared, args, at, keys, q_map, k_map, v_map, dout_map);
    return;
  }
  take_registers<232>();
  float dk[1][WIDTH / 8][4] = {}, dv[1][WIDTH / 8][4] = {};
  if (keys.begin < keys.end) sum_keys(dk, dv, shared, at, keys, options);
  const auto dk_to = at.template key_outputs<T>(args.dk, problem, problem.D, options.wide_dk);
  const auto dv_to = at.template key_outputs<T>(args.dv, problem, problem.Dv, options.wide_dv);
  write_panels<WIDTH>(dk, {{options.scale, options.scale}}, shared.own[0], dk_to, keys.first_key, at.T);
  write_panels<WIDTH>(dv, {{1, 1}}, shared.own[1], dv_to, keys.first_key, at.T);
}

template <class T, int WIDTH>
using HopperBackwardQueries = HopperBackward<T, WIDTH, HOPPER_KEYS>;

// What a thread of the producer does for dq.
template <class T, int WIDTH>
__device__ __forceinline__ void load_keys(HopperBackwardQueries<T, WIDTH>& shared, const AttentionBlock& at, const HopperQueries& queries,
                                          int sequence, const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                                          const TensorMap& dout_map) {
  constexpr int ROW_BYTES = WIDTH * sizeof(T);
  if (queries.begin >= queries.end) return;
  const int64_t token = at.first_query + queries.first_query;
  barrier_expect(shared.own_full, 2 * queries.tokens * at.G * ROW_BYTES);
  copy_panels<HOPPER_OWN, WIDTH>(shared.own[0], q_map, shared.own_full, at.hk * at.G, token, sequence);
  copy_panels<HOPPER_OWN, WIDTH>(shared.own[1], dout_map, shared.own_full, at.hk * at.G, token, sequence);
  Stage stage;
  for (int first = queries.begin; first < queries.end; first += HOPPER_KEYS, ++stage) {
    auto& full = shared.full[stage.index];
    auto& tiles = shared.other[stage.index];
    barrier_wait(shared.free[stage.index], stage.parity ^ 1);
    barrier_expect(full, 2 * HOPPER_KEYS * ROW_BYTES);
    copy_panels<HOPPER_KEYS, WIDTH>(tiles[0], k_map, full, at.hk, at.first_key + first, sequence);
    copy_panels<HOPPER_KEYS, WIDTH>(tiles[1], v_map, full, at.hk, at.first_key + first, sequence);
  }
}

// What a warpgroup of consumers does for its rows of dq.
template <class T, int WIDTH>
__device__ __forceinline__ void sum_queries(float (&dq)[1][WIDTH / 8][4], HopperBackwardQueries<T, WIDTH>& shared,
                                            const AttentionBackward& args, const AttentionBlock& at, const HopperQueries& queries,
                                            const AttentionOptions& options) {
  constexpr int OTHER = HOPPER_KEYS;
  const int lane = threadIdx.x % 32, first_row = queries.first_row(at) + warpgroup_row() + warp_row() + lane / 4;
  const QueryRow row[2] = {query_row(args, at, first_row), query_row(args, at, first_row + 8)};
  barrier_wait(shared.own_full, 0);
  Stage stage;
  for (int first = queries.begin; first < queries.end; first += OTHER, ++stage) {
    T* k = shared.other[stage.index][0];
    barrier_wait(shared.full[stage.index], stage.parity);
    if (queries.end - first < OTHER) clear_rows<OTHER, WIDTH>(k, queries.end - first);
    float s[1][OTHER / 8][4], dp[1][OTHER / 8][4];
    shared.multiply(s, dp, stage.index);
    if (options.softcap > 0) cap(s, options);
    const bool all_visible = queries.begin_all <= first && first + OTHER <= queries.end_all;
#pragma unroll
    for (int n = 0; n < OTHER / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int key = first + 8 * n + lane % 4 * 2 + e % 2;
        backward_of(s[0][n][e], dp[0][n][e], row[e / 2], all_visible || (key >= row[e / 2].begin && key < row[e / 2].end), options);
      }
    }
    if (!all_visible) {
      sync_consumers();  // the scores are made
      clear_nan<OTHER, HOPPER_CONSUMERS>(Tile<T, WIDTH>{k}, threadIdx.x - WARPGROUP);
      fence_async();
      sync_consumers();
    }
    uint32_t ds[OTHER / PRODUCT_DEPTH][4];
    to_factor<T>(ds, dp);
    warpgroup_fence(dq[0], ds);
    start_sum(dq, ds, k);
    warpgroup_wait<0>(dq[0]);
    release(shared.free[stage.index]);
  }
}

// dq. One block for each tile of HOPPER_OWN rows of queries of each key/value head and sequence. Moves q and do once in and dq once out;
// and for each tile the keys and values that any of its queries sees. Each of these and each row of the tile costs 4 D + 2 Dv FLOPs.
template <class T, int WIDTH, bool CAPPED>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    attention_backward_queries_hopper(const AttentionBackward args, const AttentionOptions given, const __grid_constant__ TensorMap q_map,
                                      const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                                      const __grid_constant__ TensorMap dout_map) {
  const AttentionProblem& problem = args.problem;
  const AttentionOptions options = with_cap<CAPPED>(given);
  const AttentionBlock at(problem, options);
  const HopperQueries queries(at);
  if (queries.first_query < 0) return;
  auto& shared = *reinterpret_cast<HopperBackwardQueries<T, WIDTH>*>(dynamic_shared());
  if (threadIdx.x == 0) shared.init_barriers(1);
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    give_registers<24>();
    const int sequence = problem.cu_seqlens_q == nullptr ? at.b : 0;
    if (threadIdx.x == 0) load_keys(shared, at, queries, sequence, q_map, k_map, v_map, dout_map);
    return;
  }
  take_registers<240>();
  float dq[1][WIDTH / 8][4] = {};
  if (queries.begin < queries.end) sum_queries(dq, shared, args, at, queries, options);
  const auto to = at.template query_outputs<T>(args.dq, problem, problem.D, options.wide_dq);
  write_panels<WIDTH>(dq, {{options.scale, options.scale}}, shared.own[0], to, queries.first_row(at), queries.end_row(at));
}

}  // namespace fastprimer
