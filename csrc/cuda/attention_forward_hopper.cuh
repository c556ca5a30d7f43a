// Attention's forward pass on Hopper. The mathematics and the rows are those of attention_forward.cuh.
//
// Overlap. While a tile's weights are multiplied with its values, the next tile's scores are made, and the softmax of these runs while
// the former product goes on. Weights never leave the registers: the layout of a product is that of a factor.
#pragma once
#include "attention_hopper_tile.cuh"
#include "attention_softmax.cuh"

namespace fastprimer {

template <class T, int WIDTH>
struct HopperForward {
  static constexpr int KEYS = WIDTH <= 128 ? 128 : 64, TILE_BYTES = KEYS * WIDTH * sizeof(T);

  // Shared memory.
  T q[HOPPER_OWN * WIDTH], k[HOPPER_STAGES][KEYS * WIDTH], v[HOPPER_STAGES][KEYS * WIDTH];
  Barrier q_full, k_full[HOPPER_STAGES], v_full[HOPPER_STAGES], k_free[HOPPER_STAGES], v_free[HOPPER_STAGES];

  __device__ __forceinline__ void init_barriers() {
    barrier_init(q_full, 1);
    for (int stage = 0; stage < HOPPER_STAGES; stage++) {
      barrier_init(k_full[stage], 1);
      barrier_init(v_full[stage], 1);
      barrier_init(k_free[stage], HOPPER_CONSUMERS / 32);
      barrier_init(v_free[stage], HOPPER_CONSUMERS / 32);
    }
    barrier_init_done();
  }

  // What one thread of the producer does.
  __device__ __forceinline__ void load(const AttentionBlock& at, const HopperQueries& queries, int sequence, const TensorMap& q_map,
                                       const TensorMap& k_map, const TensorMap& v_map) {
    if (queries.begin >= queries.end) return;
    barrier_expect(q_full, queries.tokens * at.G * WIDTH * static_cast<int>(sizeof(T)));
    copy_panels<HOPPER_OWN, WIDTH>(q, q_map, q_full, at.hk * at.G, at.first_query + queries.first_query, sequence);
    Stage stage;
    for (int first = queries.begin; first < queries.end; first += KEYS, ++stage) {
      const auto load_keys = [&](T* tile, const TensorMap& map, Barrier& full, Barrier& free) {
        barrier_wait(free, stage.parity ^ 1);
        barrier_expect(full, TILE_BYTES);
        copy_panels<KEYS, WIDTH>(tile, map, full, at.hk, at.first_key + first, sequence);
      };
      load_keys(k[stage.index], k_map, k_full[stage.index], k_free[stage.index]);
      load_keys(v[stage.index], v_map, v_full[stage.index], v_free[stage.index]);
    }
  }

  // What a warpgroup of consumers does: its rows of o before they are divided by the sum of weights, and their softmax.
  __device__ __forceinline__ void multiply(float (&o)[1][WIDTH / 8][4], OnlineSoftmax<1>& softmax, const AttentionBlock& at,
                                           const HopperQueries& queries, const AttentionOptions& options) {
    const T* q_rows = q + warpgroup_row() * PANEL;
    float s[1][KEYS / 8][4], rescale[1][2];
    uint32_t weights[KEYS / PRODUCT_DEPTH][4];

    // From the scores of the tile of keys at `first` to weights.
    const auto weigh = [&](int first) {
      if (options.softcap > 0) cap(s, options);
      const bool all_visible = queries.begin_all <= first && first + KEYS <= queries.end_all;
      if (!all_visible) hide(s, first, at, queries.first_row(at) + warpgroup_row() + warp_row());
      softmax.add(s, options.exponent, rescale);
    };

    barrier_wait(q_full, 0);
    barrier_wait(k_full[0], 0);
    warpgroup_fence(s[0]);
    start_transposed<HOPPER_OWN, WIDTH>(s, q_rows, k[0]);
    warpgroup_wait<0>(s[0]);
    release(k_free[0]);
    weigh(queries.begin);
    to_factor<T>(weights, s);

    Stage stage;
    for (int first = queries.begin + KEYS; first < queries.end; first += KEYS) {
      const int now = stage.index;
      const unsigned parity = stage.parity;
      ++stage;
      barrier_wait(k_full[stage.index], stage.parity);
      warpgroup_fence(s[0]);
      start_transposed<HOPPER_OWN, WIDTH>(s, q_rows, k[stage.index]);
      barrier_wait(v_full[now], parity);
      warpgroup_fence(o[0], weights);
      start_sum(o, weights, v[now]);
      warpgroup_wait<1>(s[0]);
      release(k_free[stage.index]);
      weigh(first);
      warpgroup_wait<0>(o[0]);
      release(v_free[now]);
      scale_rows(o, rescale);
      to_factor<T>(weights, s);
    }

    barrier_wait(v_full[stage.index], stage.parity);
    const int rows = (queries.end - queries.begin - 1) % KEYS + 1;  // of the last tile
    if (rows < KEYS) clear_rows<KEYS, WIDTH>(v[stage.index], rows);
    warpgroup_fence(o[0], weights);
    start_sum(o, weights, v[stage.index]);
    warpgroup_wait<0>(o[0]);
  }
};

// One block for each tile of queries of each key/value head and sequence. Moves q once in and o once out, 2 B S H D elements, and lse;
// and for each tile of HOPPER_OWN rows, which are HOPPER_OWN Hk / H queries of a whole group, the keys and values that any of them sees.
// Each of these and each row of the tile costs 2 (D + Dv) FLOPs.
template <class T, int WIDTH>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    attention_forward_hopper(const AttentionForward args, const AttentionOptions options, const __grid_constant__ TensorMap q_map,
                             const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
  const AttentionProblem& problem = args.problem;
  const AttentionBlock at(problem, options);
  const HopperQueries queries(at);
  if (queries.first_query < 0) return;
  auto& shared = *reinterpret_cast<HopperForward<T, WIDTH>*>(dynamic_shared());
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    give_registers<24>();
    if (threadIdx.x == 0) shared.load(at, queries, problem.cu_seqlens_q == nullptr ? at.b : 0, q_map, k_map, v_map);
    return;
  }
  take_registers<240>();
  OnlineSoftmax<1> softmax;
  float o[1][WIDTH / 8][4] = {}, factor[1][2];
  if (queries.begin < queries.end) shared.multiply(o, softmax, at, queries, options);

  const int first_row = queries.first_row(at), end_row = queries.end_row(at);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first_row + warpgroup_row() + warp_row() + 8 * r + threadIdx.x % 32 / 4;
    const float sink = problem.sinks == nullptr ? -INFINITY : problem.sinks[at.hk * at.G + row % at.G] * LOG2_E;
    float lse;
    factor[0][r] = softmax.finish(0, r, options.exponent, sink, lse);
    if (row < end_row && threadIdx.x % 4 == 0) args.lse[at.lse_at(args, row)] = lse;
  }
  const auto to = at.template query_outputs<T>(args.o, problem, problem.Dv, options.wide_o);
  write_panels<WIDTH>(o, factor, shared.q, to, first_row, end_row);
}

}  // namespace fastprimer
