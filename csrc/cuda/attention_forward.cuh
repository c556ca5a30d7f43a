// Attention's forward pass on CUDA: products in tensor cores (mma), an online softmax in registers.
#pragma once
#include "attention_softmax.cuh"

namespace fastprimer {

// A block's tile of queries, and how many keys it takes at a time. 16 MT queries a warp: with MT = 2 each part of a key or value that
// is read from shared memory is used twice, where registers allow it.
template <class T, int WIDTH>
struct ForwardShape {
  static constexpr bool SHORT = sizeof(T) == 2;
  static constexpr int MT = SHORT && WIDTH == 64 ? 2 : 1;
  static constexpr int KEYS = SHORT ? (WIDTH <= 128 ? 64 : 32) : (WIDTH <= 128 ? 32 : 16);
  static constexpr int THREADS = SHORT && WIDTH == 128 ? 256 : SHORT || WIDTH <= 128 ? 128 : 64, QUERIES = THREADS / 32 * 16 * MT;
  static constexpr size_t SHARED = (QUERIES + 4 * KEYS) * WIDTH * sizeof(T);
  static_assert(SHARED <= SHARED_EVERYWHERE);
};

// One block for each tile of queries of each key/value head and sequence. Moves q once in and o once out, 2 B S H D elements, and lse;
// and for each tile of QUERIES rows, which are QUERIES Hk / H queries of a whole group, the keys and values that any of them sees. Two
// stages of keys and values: while one is multiplied, the next is on its way.
template <class T, int WIDTH>
__global__ void __launch_bounds__(ForwardShape<T, WIDTH>::THREADS)
    attention_forward_tiles(const AttentionForward args, const AttentionOptions options) {
  using Shape = ForwardShape<T, WIDTH>;
  constexpr int MT = Shape::MT, KEYS = Shape::KEYS, THREADS = Shape::THREADS, QUERIES = Shape::QUERIES;
  const AttentionProblem& problem = args.problem;
  const AttentionBlock at(problem, options);
  const int rows = at.S * at.G, first_row = at.tile_from_last(rows, QUERIES) * QUERIES;
  if (first_row < 0) return;

  const Tile<T, WIDTH> q_tile{reinterpret_cast<T*>(dynamic_shared())};
  const Tile<T, WIDTH> stages{q_tile.data + QUERIES * WIDTH};
  const auto k_tile = [&](int stage) { return Tile<T, WIDTH>{stages.data + stage * 2 * KEYS * WIDTH}; };
  const auto v_tile = [&](int stage) { return Tile<T, WIDTH>{stages.data + (stage * 2 + 1) * KEYS * WIDTH}; };
  const auto k = at.template keys<T>(problem.k, problem.D, options.wide_k), v = at.template keys<T>(problem.v, problem.Dv, options.wide_v);

  // The keys that any query of the tile sees, and of them those that all see.
  const int first_query = first_row / at.G, last_query = min(at.S - 1, (first_row + QUERIES - 1) / at.G);
  const int begin = at.first_key_of(first_query), end = at.end_key_of(last_query);
  const int begin_all = at.first_key_of(last_query), end_all = at.end_key_of(first_query);
  const auto fetch_keys = [&](int first, int stage) {
    fetch<KEYS, THREADS>(k_tile(stage), k, first, end);
    fetch<KEYS, THREADS>(v_tile(stage), v, first, end);
    copy_async_commit();
  };
  if (begin < end) {
    fetch<QUERIES, THREADS>(q_tile, at.template queries<T>(problem.q, problem.D, options.wide_q), first_row, rows);
    fetch_keys(begin, 0);
  }

  const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 * 16 * MT;
  OnlineSoftmax<MT> softmax;
  float o[MT][WIDTH / 8][4] = {};
  for (int first = begin, stage = 0; first < end; first += KEYS, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the stage has arrived, for every thread, and nobody reads the other any more
    if (first + KEYS < end) fetch_keys(first + KEYS, stage ^ 1);

    float s[MT][KEYS / 8][4] = {};
    multiply_transposed(s, q_tile, row_warp, k_tile(stage));
    if (options.softcap > 0) cap(s, options);
    if (first < begin_all || first + KEYS > end_all) hide(s, first, at, first_row + row_warp);
    float rescale[MT][2];
    softmax.add(s, options.exponent, rescale);
    scale_rows(o, rescale);
    multiply(o, s, v_tile(stage));
  }

  float factor[MT][2];
#pragma unroll
  for (int m = 0; m < 2 * MT; m++) {
    const int row = first_row + row_warp + 8 * m + lane / 4;
    const float sink = problem.sinks == nullptr ? -INFINITY : problem.sinks[at.hk * at.G + row % at.G] * LOG2_E;
    float lse;
    factor[m / 2][m % 2] = softmax.finish(m / 2, m % 2, options.exponent, sink, lse);
    if (row < rows && lane % 4 == 0) args.lse[at.lse_at(args, row)] = lse;
  }
  write_rows(o, factor, q_tile, row_warp, at.template query_outputs<T>(args.o, problem, problem.Dv, options.wide_o), first_row, rows);
}

}  // namespace fastprimer
