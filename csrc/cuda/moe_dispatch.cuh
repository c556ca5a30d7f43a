// Where tokens go: the pairs of the mixture of experts, sorted by expert, as csrc/moe.h numbers them.
//
// A counting sort that keeps the pairs of an expert in their order. The pairs are cut into chunks, one for each warp:
//
//   moe_count     how many pairs of each chunk go to each expert
//   moe_places    for each expert, where among its pairs those of each chunk begin
//   moe_offsets   where each expert's pairs begin; the tiles of rows that products are made of
//   moe_scatter   each pair to its place
//
// A warp counts 32 pairs at a time in its own shared memory: lanes with the same expert find each other by a match, the first of them
// counts for all. Nothing is atomic, so the order is a matter of the numbers alone; and nothing goes to the host, which sizes grids by a
// bound: an expert with n pairs has n / ROWS tiles, rounded up.
#pragma once
#include "../moe.h"
#include "device.cuh"

namespace fastprimer {

constexpr int MOE_MOST_EXPERTS = 8192;  // of which a warp has counters in shared memory
constexpr int OFFSETS_THREADS = 512, PLACES_THREADS = 128;

// All of it in scratch memory. "Place" is a number in the sorted order.
struct MoeDispatch {
  int pairs, E, K;
  int chunk, chunks;    // pairs of one chunk, a multiple of 32; how many chunks
  int row_bits, tiles;  // a tile has 2^row_bits rows; the bound
  int* counts;          // (E, chunks): pairs of a chunk, then the place of the first of them among its expert's
  int* begins;          // (E + 1): an expert's first place; before moe_offsets, how many pairs it has
  int* tile_expert;     // (tiles): -1 if there are fewer
  int* tile_begin;      // (tiles): the tile's first place
  int* pair_at;         // (pairs): the pair at a place; there are begins[E] places
  int* token_at;        // (pairs): its token
  int* place_of;        // (pairs): the place of a pair; -1 if its expert's number is none
};

// The expert of a pair, or -1.
__device__ __forceinline__ int expert_of(const MoeDispatch& at, const int64_t* experts, int pair) {
  if (pair >= at.pairs) return -1;
  const int64_t e = experts[pair];
  return e >= 0 && e < at.E ? static_cast<int>(e) : -1;
}

// Lets `each(pair, e, place)` know, for each pair of the warp's chunk, counters[e] and how many of the same expert came before it in this
// step, as their sum; then adds the step to the counters. All lanes call it.
template <class Each>
__device__ __forceinline__ void walk(const MoeDispatch& at, const int64_t* experts, int* counters, Each each) {
  const int lane = threadIdx.x, begin = blockIdx.x * at.chunk, end = min(begin + at.chunk, at.pairs);
  for (int first = begin; first < end; first += 32) {
    const int pair = first + lane, e = expert_of(at, experts, pair);
    const unsigned same = __match_any_sync(FULL_WARP, e), before = same & ((1u << lane) - 1);
    const int count = e < 0 ? 0 : counters[e];
    each(pair, e, count + __popc(before));
    __syncwarp();
    if (e >= 0 && before == 0) counters[e] = count + __popc(same);
    __syncwarp();
  }
}

// One warp for each chunk. Reads the experts, 8 bytes a pair, and writes E counts a chunk.
__global__ void __launch_bounds__(32) moe_count(const MoeDispatch at, const int64_t* experts) {
  int* counters = reinterpret_cast<int*>(dynamic_shared());
  for (int e = threadIdx.x; e < at.E; e += 32) counters[e] = 0;
  __syncwarp();
  walk(at, experts, counters, [](int, int, int) {});
  for (int e = threadIdx.x; e < at.E; e += 32) at.counts[static_cast<int64_t>(e) * at.chunks + blockIdx.x] = counters[e];
}

// The sum over the lanes before this one, and over all of them.
struct WarpScan {
  int before, all;

  __device__ __forceinline__ explicit WarpScan(int v) {
    const int lane = threadIdx.x % 32;
    int sum = v;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(FULL_WARP, sum, distance);
      if (lane >= distance) sum += other;
    }
    before = sum - v;
    all = __shfl_sync(FULL_WARP, sum, 31);
  }
};

// One warp for each expert: the sums of its counts. Moves E counts a chunk in and out.
__global__ void __launch_bounds__(PLACES_THREADS) moe_places(const MoeDispatch at) {
  const int e = blockIdx.x * (PLACES_THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (e >= at.E) return;
  int* counts = at.counts + static_cast<int64_t>(e) * at.chunks;
  int sum = 0;
  for (int first = 0; first < at.chunks; first += 32) {
    const int i = first + lane;
    const WarpScan scan(i < at.chunks ? counts[i] : 0);
    if (i < at.chunks) counts[i] = sum + scan.before;
    sum += scan.all;
  }
  if (lane == 0) at.begins[e] = sum;
}

// One block. Moves a few numbers for each expert and tile.
__global__ void __launch_bounds__(OFFSETS_THREADS) moe_offsets(const MoeDispatch at) {
  int* first_tile = reinterpret_cast<int*>(dynamic_shared());  // (E + 1)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) {
    int places = 0, tiles = 0;
    for (int first = 0; first < at.E; first += 32) {
      const int e = first + lane, count = e < at.E ? at.begins[e] : 0;
      const WarpScan place(count), tile((count + (1 << at.row_bits) - 1) >> at.row_bits);
      if (e < at.E) {
        at.begins[e] = places + place.before;
        first_tile[e] = tiles + tile.before;
      }
      places += place.all;
      tiles += tile.all;
    }
    if (lane == 0) {
      at.begins[at.E] = places;
      first_tile[at.E] = tiles;
    }
  }
  __syncthreads();
  for (int e = warp; e < at.E; e += OFFSETS_THREADS / 32) {
    for (int tile = first_tile[e] + lane; tile < first_tile[e + 1]; tile += 32) {
      at.tile_expert[tile] = e;
      at.tile_begin[tile] = at.begins[e] + ((tile - first_tile[e]) << at.row_bits);
    }
  }
  for (int tile = first_tile[at.E] + threadIdx.x; tile < at.tiles; tile += OFFSETS_THREADS) at.tile_expert[tile] = -1;
}

// One warp for each chunk. Reads the experts again, writes 12 bytes a pair. Of a pair without an expert it clears the row of `hidden`, so
// many numbers of 16 bits.
__global__ void __launch_bounds__(32) moe_scatter(const MoeDispatch at, const int64_t* experts, uint16_t* hidden, int64_t hidden_row) {
  int* counters = reinterpret_cast<int*>(dynamic_shared());
  const int lane = threadIdx.x;
  for (int e = lane; e < at.E; e += 32) counters[e] = at.begins[e] + at.counts[static_cast<int64_t>(e) * at.chunks + blockIdx.x];
  __syncwarp();
  walk(at, experts, counters, [&](int pair, int e, int place) {
    if (pair < at.pairs) at.place_of[pair] = e < 0 ? -1 : place;
    if (e >= 0) {
      at.pair_at[place] = pair;
      at.token_at[place] = pair / at.K;
    }
    const unsigned without = __ballot_sync(FULL_WARP, pair < at.pairs && e < 0);
    for (int other = 0; other < 32 && hidden != nullptr; other++) {
      if (!(without >> other & 1)) continue;
      uint16_t* row = hidden + (pair - lane + other) * hidden_row;
      for (int64_t i = lane; i < hidden_row; i += 32) row[i] = 0;
    }
  });
}

}  // namespace fastprimer
