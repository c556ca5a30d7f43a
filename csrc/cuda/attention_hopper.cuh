// Attention's forward pass on Hopper: one warp's thread copies tiles (TMA), two warpgroups multiply them (wgmma), each 64 rows of
// queries. The mathematics and the rows are those of attention_forward.cuh; so are a sum's order and its rounding.
//
// Rows. TMA fetches a box of all G heads of a group times ROWS / G queries, so a tile holds queries of the whole group, row r being
// query r / G with head r % G, and rows that are left over (ROWS % G) hold nothing and are not stored.
//
// Overlap. While a tile's weights are multiplied with its values, the next tile's scores are made, and the softmax of these runs while
// the former product goes on. Weights never leave the registers: the layout of a product is that of a factor.
#pragma once
#include "attention_softmax.cuh"
#include "hopper.cuh"

namespace fastprimer {

template <int WIDTH>
struct HopperForwardShape {
  static constexpr int ROWS = 2 * PRODUCT_ROWS, KEYS = WIDTH <= 128 ? 128 : 64, STAGES = 2;
  static constexpr int CONSUMERS = 2 * WARPGROUP, THREADS = WARPGROUP + CONSUMERS;
  static constexpr int COLUMNS = WIDTH < 128 ? WIDTH : 128;  // of o, in one product
};

// The shared memory of a block. A tile is free until it is asked for, full when it has arrived, and free when all consumers have used it.
template <class T, int WIDTH>
struct HopperForwardShared {
  using Shape = HopperForwardShape<WIDTH>;
  T q[Shape::ROWS * WIDTH], k[Shape::STAGES][Shape::KEYS * WIDTH], v[Shape::STAGES][Shape::KEYS * WIDTH];
  Barrier q_full, k_full[Shape::STAGES], v_full[Shape::STAGES], k_free[Shape::STAGES], v_free[Shape::STAGES];

  __device__ __forceinline__ void init_barriers() {
    barrier_init(q_full, 1);
    for (int stage = 0; stage < Shape::STAGES; stage++) {
      barrier_init(k_full[stage], 1);
      barrier_init(v_full[stage], 1);
      barrier_init(k_free[stage], Shape::CONSUMERS / 32);
      barrier_init(v_free[stage], Shape::CONSUMERS / 32);
    }
    barrier_init_done();
  }
};

static_assert(sizeof(HopperForwardShared<bfloat16, 64>) <= 227 << 10 && sizeof(HopperForwardShared<bfloat16, 128>) <= 227 << 10 &&
                  sizeof(HopperForwardShared<bfloat16, 256>) <= 227 << 10,
              "more than a block can have");

// The queries of a block, and the keys that any of them sees; of these, those that all see.
struct HopperForwardTile {
  int tokens, first_query, begin, end, begin_all, end_all;

  __device__ __forceinline__ HopperForwardTile(const AttentionBlock& at, int rows)
      : tokens(rows / at.G), first_query(at.tile_from_last(at.S, tokens) * tokens) {
    const int last_query = min(at.S, first_query + tokens) - 1;
    begin = at.first_key_of(first_query);
    end = at.end_key_of(last_query);
    begin_all = at.first_key_of(last_query);
    end_all = at.end_key_of(first_query);
  }
};

// Waits until a tile is free, and copies rows first .. of a head into it, panel by panel.
template <int ROWS, int WIDTH, class T>
__device__ __forceinline__ void load_keys(T* tile, const TensorMap& map, Barrier& full, Barrier& free, unsigned parity, int head, int first,
                                          int sequence) {
  barrier_wait(free, parity ^ 1);
  barrier_expect(full, ROWS * WIDTH * static_cast<int>(sizeof(T)));
#pragma unroll
  for (int panel = 0; panel < WIDTH / PANEL; panel++) {
    copy_tile(tile + panel * ROWS * PANEL, map, full, panel * PANEL, head, first, sequence);
  }
}

// What the producer does.
template <class T, int WIDTH>
__device__ __forceinline__ void load_forward(HopperForwardShared<T, WIDTH>& shared, const AttentionBlock& at, const HopperForwardTile& tile,
                                             int sequence, const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map) {
  using Shape = HopperForwardShape<WIDTH>;
  if (tile.begin >= tile.end) return;
  barrier_expect(shared.q_full, tile.tokens * at.G * WIDTH * static_cast<int>(sizeof(T)));
#pragma unroll
  for (int panel = 0; panel < WIDTH / PANEL; panel++) {
    copy_tile(shared.q + panel * Shape::ROWS * PANEL, q_map, shared.q_full, panel * PANEL, at.hk * at.G,
              static_cast<int>(at.first_query) + tile.first_query, sequence);
  }
  int stage = 0;
  unsigned parity = 0;
  for (int first = tile.begin; first < tile.end; first += Shape::KEYS) {
    const int token = static_cast<int>(at.first_key) + first;
    load_keys<Shape::KEYS, WIDTH>(shared.k[stage], k_map, shared.k_full[stage], shared.k_free[stage], parity, at.hk, token, sequence);
    load_keys<Shape::KEYS, WIDTH>(shared.v[stage], v_map, shared.v_full[stage], shared.v_free[stage], parity, at.hk, token, sequence);
    if (++stage == Shape::STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// Starts s = q k^T, for the warpgroup's rows of q.
template <int ROWS, int KEYS, int WIDTH, class T>
__device__ __forceinline__ void start_scores(float (&s)[1][KEYS / 8][4], const T* q, const T* k) {
#pragma unroll
  for (int d = 0; d < WIDTH; d += PRODUCT_DEPTH) {
    const uint64_t q_part = matrix_descriptor(q + d / PANEL * ROWS * PANEL + d % PANEL, 0);
    const uint64_t k_part = matrix_descriptor(k + d / PANEL * KEYS * PANEL + d % PANEL, 0);
    warpgroup_multiply<T>(s[0], q_part, k_part, d > 0);
  }
  warpgroup_commit();
}

// Starts acc += weights v, in products of COLUMNS columns.
template <int COLUMNS, int KEYS, int WIDTH, class T>
__device__ __forceinline__ void start_sum(float (&acc)[1][WIDTH / 8][4], const uint32_t (&weights)[KEYS / PRODUCT_DEPTH][4], const T* v) {
#pragma unroll
  for (int k = 0; k < KEYS / PRODUCT_DEPTH; k++) {
#pragma unroll
    for (int column = 0; column < WIDTH; column += COLUMNS) {
      auto& part = reinterpret_cast<float (&)[COLUMNS / 8][4]>(acc[0][column / 8]);
      const T* rows = v + column / PANEL * KEYS * PANEL + k * PRODUCT_DEPTH * PANEL;
      warpgroup_multiply<T>(part, weights[k], matrix_descriptor(rows, KEYS * PANEL_ROW), true);
    }
  }
  warpgroup_commit();
}

// Scores as a product leaves them, as the factor of the next.
template <class T, int N>
__device__ __forceinline__ void to_factor(uint32_t (&factor)[N / 2][4], const float (&s)[1][N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float (&pair)[4] = s[0][2 * k + e / 2];
      factor[k][e] = narrow_pair<T>(pair[e % 2 * 2], pair[e % 2 * 2 + 1]);
    }
  }
}

// Zeros the rows of a tile from `first` on, by all consumers, and lets products see it: past a sequence, or past what a tile's queries
// see, may stand anything, and 0 · nan is nan.
template <int THREADS, int ROWS, int WIDTH, class T>
__device__ __forceinline__ void clear_rows(T* tile, int first) {
  constexpr int CHUNKS = PANEL / CHUNK<T>;
  for (int i = threadIdx.x % THREADS; i < (ROWS - first) * CHUNKS * (WIDTH / PANEL); i += THREADS) {
    const int row = first + i / CHUNKS % (ROWS - first), panel = i / CHUNKS / (ROWS - first);
    store(tile + (panel * ROWS + row) * PANEL + i % CHUNKS * CHUNK<T>, Vector<T, CHUNK<T>>{});
  }
  fence_async();
  sync_threads(1, THREADS);
}

__device__ __forceinline__ void release(Barrier& free) {
  if (threadIdx.x % 32 == 0) barrier_arrive(free);
}

// What a warpgroup of consumers does: its rows of o before they are divided by the sum of weights, and their softmax.
template <class T, int WIDTH>
__device__ __forceinline__ void multiply_forward(float (&o)[1][WIDTH / 8][4], OnlineSoftmax<1>& softmax,
                                                 HopperForwardShared<T, WIDTH>& shared, int row_a, const AttentionBlock& at,
                                                 const HopperForwardTile& tile, const AttentionOptions& options) {
  using Shape = HopperForwardShape<WIDTH>;
  constexpr int KEYS = Shape::KEYS, ROWS = Shape::ROWS;
  const int row_warp = tile.first_query * at.G + row_a + threadIdx.x % WARPGROUP / 32 * 16;
  const T* q = shared.q + row_a * PANEL;
  float s[1][KEYS / 8][4], rescale[1][2];
  uint32_t weights[KEYS / PRODUCT_DEPTH][4];

  // From the scores of the tile of keys at `first` to weights.
  const auto weigh = [&](int first) {
    if (options.softcap > 0) cap(s, options);
    if (first < tile.begin_all || first + KEYS > tile.end_all) hide(s, first, at, row_warp);
    softmax.add(s, options.exponent, rescale);
  };

  barrier_wait(shared.q_full, 0);
  barrier_wait(shared.k_full[0], 0);
  warpgroup_fence(s[0]);
  start_scores<ROWS, KEYS, WIDTH>(s, q, shared.k[0]);
  warpgroup_wait<0>(s[0]);
  release(shared.k_free[0]);
  weigh(tile.begin);
  to_factor<T>(weights, s);

  int stage = 0;
  unsigned parity = 0;
  for (int first = tile.begin + KEYS; first < tile.end; first += KEYS) {
    const int next = stage + 1 == Shape::STAGES ? 0 : stage + 1;
    const unsigned next_parity = next == 0 ? parity ^ 1 : parity;
    barrier_wait(shared.k_full[next], next_parity);
    warpgroup_fence(s[0]);
    start_scores<ROWS, KEYS, WIDTH>(s, q, shared.k[next]);
    barrier_wait(shared.v_full[stage], parity);
    warpgroup_fence(o[0], weights);
    start_sum<Shape::COLUMNS, KEYS, WIDTH>(o, weights, shared.v[stage]);
    warpgroup_wait<1>(s[0]);
    release(shared.k_free[next]);
    weigh(first);
    warpgroup_wait<0>(o[0]);
    release(shared.v_free[stage]);
    scale_rows(o, rescale);
    to_factor<T>(weights, s);
    stage = next;
    parity = next_parity;
  }

  barrier_wait(shared.v_full[stage], parity);
  const int rows = (tile.end - tile.begin - 1) % KEYS + 1;  // of the last tile
  if (rows < KEYS) clear_rows<Shape::CONSUMERS, KEYS, WIDTH>(shared.v[stage], rows);
  warpgroup_fence(o[0], weights);
  start_sum<Shape::COLUMNS, KEYS, WIDTH>(o, weights, shared.v[stage]);
  warpgroup_wait<0>(o[0]);
}

// One block for each tile of queries of each key/value head and sequence. Moves q once in and o once out, 2 B S H D elements, and lse;
// and for each tile of ROWS rows, which are ROWS Hk / H queries of a whole group, the keys and values that any of them sees. Computes
// 2 (D + Dv) products and sums for each of these and each row.
template <class T, int WIDTH>
__global__ void __launch_bounds__(HopperForwardShape<WIDTH>::THREADS, 1)
    attention_forward_hopper(const AttentionForward args, const AttentionOptions options, const __grid_constant__ TensorMap q_map,
                             const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map) {
  using Shape = HopperForwardShape<WIDTH>;
  const AttentionProblem& problem = args.problem;
  const AttentionBlock at(problem, options);
  const HopperForwardTile tile(at, Shape::ROWS);
  if (tile.first_query < 0) return;
  auto& shared = *reinterpret_cast<HopperForwardShared<T, WIDTH>*>(dynamic_shared());
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  if (threadIdx.x < WARPGROUP) {
    give_registers<24>();
    if (threadIdx.x == 0) load_forward(shared, at, tile, problem.cu_seqlens_q == nullptr ? at.b : 0, q_map, k_map, v_map);
    return;
  }
  take_registers<240>();

  const int warpgroup = threadIdx.x / WARPGROUP - 1, row_a = warpgroup * PRODUCT_ROWS;
  OnlineSoftmax<1> softmax;
  float o[1][WIDTH / 8][4] = {};
  if (tile.begin < tile.end) multiply_forward(o, softmax, shared, row_a, at, tile, options);

  const int first_row = tile.first_query * at.G, rows = min(at.S, tile.first_query + tile.tokens) * at.G;
  const int row_warp = row_a + threadIdx.x % WARPGROUP / 32 * 16;
  float factor[1][2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first_row + row_warp + 8 * r + threadIdx.x % 32 / 4;
    const float sink = problem.sinks == nullptr ? -INFINITY : problem.sinks[at.hk * at.G + row % at.G] * LOG2_E;
    float lse;
    factor[0][r] = softmax.finish(0, r, options.exponent, sink, lse);
    if (row < rows && threadIdx.x % 4 == 0) args.lse[at.lse_at(args, row)] = lse;
  }
  sync_threads(2 + warpgroup, WARPGROUP);  // nobody reads the warpgroup's queries any more
  const auto to = at.template query_outputs<T>(args.o, problem, problem.Dv, options.wide_o);
#pragma unroll
  for (int panel = 0; panel < WIDTH / PANEL; panel++) {
    const auto& part = reinterpret_cast<const float (&)[1][PANEL / 8][4]>(o[0][panel * PANEL / 8]);
    const Tile<T, PANEL> place{shared.q + panel * Shape::ROWS * PANEL};
    write_rows(part, factor, place, row_warp, to.from(panel * PANEL), first_row, rows);
  }
}

}  // namespace fastprimer
