// What attention's kernels for Hopper share: tiles that a producer copies (TMA) and two warpgroups of consumers multiply (wgmma).
//
// Rows. TMA fetches a box of all G heads of a group times ROWS / G queries, so a tile holds queries of the whole group, row r being
// query r / G with head r % G; rows that are left over (ROWS % G) are in no box.
//
// Stages. A tile is full when its copies have arrived, and free when all consumers have used it; the producer begins with free ones.
#pragma once
#include "attention_tile.cuh"
#include "hopper.cuh"

namespace fastprimer {

constexpr int HOPPER_OWN = 2 * PRODUCT_ROWS;  // rows of a block: 64 for each warpgroup of consumers
constexpr int HOPPER_CONSUMERS = 2 * WARPGROUP, HOPPER_THREADS = WARPGROUP + HOPPER_CONSUMERS;

constexpr int HOPPER_STAGES = 2;

// Which stage is next, and the parity of its phase.
struct Stage {
  int index = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void operator++() {
    if (++index == HOPPER_STAGES) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The queries of a block, and the keys that any of them sees; of these, those that all see.
struct HopperQueries {
  int tokens, first_query, begin, end, begin_all, end_all;

  __device__ __forceinline__ explicit HopperQueries(const AttentionBlock& at)
      : tokens(HOPPER_OWN / at.G), first_query(at.tile_from_last(at.S, tokens) * tokens) {
    const int last_query = min(at.S, first_query + tokens) - 1;
    begin = at.first_key_of(first_query);
    end = at.end_key_of(last_query);
    begin_all = at.first_key_of(last_query);
    end_all = at.end_key_of(first_query);
  }

  // Rows of the sequence: the first, and the end of those that are there.
  __device__ __forceinline__ int first_row(const AttentionBlock& at) const { return first_query * at.G; }
  __device__ __forceinline__ int end_row(const AttentionBlock& at) const { return min(at.S, first_query + tokens) * at.G; }
};

// Starts to copy a tile, panel by panel: boxes of the map that begin at (head, token, sequence).
template <int ROWS, int WIDTH, class T>
__device__ __forceinline__ void copy_panels(T* tile, const TensorMap& map, Barrier& full, int head, int64_t token, int sequence) {
#pragma unroll
  for (int panel = 0; panel < WIDTH / PANEL; panel++) {
    copy_tile(tile + panel * ROWS * PANEL, map, full, panel * PANEL, head, static_cast<int>(token), sequence);
  }
}

// The first row of the calling warp in its warpgroup, and of the warpgroup in the block's rows.
__device__ __forceinline__ int warp_row() { return threadIdx.x % WARPGROUP / 32 * 16; }
__device__ __forceinline__ int warpgroup_row() { return (threadIdx.x / WARPGROUP - 1) * PRODUCT_ROWS; }

// Starts acc = a b^T for 64 rows of a tile of A_ROWS, and all rows of b.
template <int A_ROWS, int WIDTH, class T, int N>
__device__ __forceinline__ void start_transposed(float (&acc)[1][N][4], const T* a, const T* b) {
#pragma unroll
  for (int d = 0; d < WIDTH; d += PRODUCT_DEPTH) {
    const uint64_t a_part = matrix_descriptor(a + d / PANEL * A_ROWS * PANEL + d % PANEL, 0);
    const uint64_t b_part = matrix_descriptor(b + d / PANEL * 8 * N * PANEL + d % PANEL, 0);
    warpgroup_multiply<T>(acc[0], a_part, b_part, d > 0);
  }
  warpgroup_commit();
}

// Starts acc += a b, with a in registers, for all rows of b, in products of up to 128 columns.
template <class T, int K, int COLUMNS>
__device__ __forceinline__ void start_sum(float (&acc)[1][COLUMNS][4], const uint32_t (&a)[K][4], const T* b) {
  constexpr int N = COLUMNS < 16 ? COLUMNS : 16, ROWS = K * PRODUCT_DEPTH;
#pragma unroll
  for (int k = 0; k < K; k++) {
#pragma unroll
    for (int column = 0; column < COLUMNS; column += N) {
      auto& part = reinterpret_cast<float (&)[N][4]>(acc[0][column]);
      const T* rows = b + column * 8 / PANEL * ROWS * PANEL + k * PRODUCT_DEPTH * PANEL;
      warpgroup_multiply<T>(part, a[k], matrix_descriptor(rows, ROWS * PANEL_ROW), true);
    }
  }
  warpgroup_commit();
}

// A product as it is left in registers, as the factor of the next.
template <class T, int N>
__device__ __forceinline__ void to_factor(uint32_t (&factor)[N / 2][4], const float (&product)[1][N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; k++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float (&pair)[4] = product[0][2 * k + e / 2];
      factor[k][e] = narrow_pair<T>(pair[e % 2 * 2], pair[e % 2 * 2 + 1]);
    }
  }
}

// All consumers wait for each other.
__device__ __forceinline__ void sync_consumers() { sync_threads(1, HOPPER_CONSUMERS); }

// Zeros the rows of a tile from `first` on, by all consumers, and lets products see it: past a sequence, or past what matters to a
// block, may stand anything, and 0 · nan is nan.
template <int ROWS, int WIDTH, class T>
__device__ __forceinline__ void clear_rows(T* tile, int first) {
  constexpr int CHUNKS = PANEL / CHUNK<T>;
  for (int i = threadIdx.x - WARPGROUP; i < (ROWS - first) * CHUNKS * (WIDTH / PANEL); i += HOPPER_CONSUMERS) {
    const int row = first + i / CHUNKS % (ROWS - first), panel = i / CHUNKS / (ROWS - first);
    store(tile + (panel * ROWS + row) * PANEL + i % CHUNKS * CHUNK<T>, Vector<T, CHUNK<T>>{});
  }
  fence_async();
  sync_consumers();
}

// The calling warp has used a tile, and what else came with it.
__device__ __forceinline__ void release(Barrier& free) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(free);
}

// Writes the warpgroup's rows of acc, times `factor`, to rows first_row + warpgroup_row() .. below `end`, by way of its rows of `tile`.
template <int WIDTH, class T, bool GROUPED>
__device__ __forceinline__ void write_panels(const float (&acc)[1][WIDTH / 8][4], const float (&factor)[1][2], T* tile,
                                             const Rows<T, GROUPED>& to, int first_row, int end) {
  sync_threads(2 + threadIdx.x / WARPGROUP, WARPGROUP);  // nobody reads the warpgroup's rows any more
#pragma unroll
  for (int panel = 0; panel < WIDTH / PANEL; panel++) {
    const auto& part = reinterpret_cast<const float (&)[1][PANEL / 8][4]>(acc[0][panel * PANEL / 8]);
    const Tile<T, PANEL> place{tile + panel * HOPPER_OWN * PANEL};
    write_rows(part, factor, place, warpgroup_row() + warp_row(), to.from(panel * PANEL), first_row, end);
  }
}

}  // namespace fastprimer
