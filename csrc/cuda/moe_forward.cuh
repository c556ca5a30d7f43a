// The mixture of experts' forward pass on CUDA: hidden and u, then z, then y. The mathematics: fastprimer/ops/moe.py.
//
// Pairs are worked on in the order of moe_dispatch.cuh, one expert after the other, so that a tile of rows has one expert's weights. What
// lies in that order is scratch: u = silu(a) b, and z = w down u, a row for each place.
#pragma once
#include <cmath>

#include "grouped_gemm.cuh"
#include "moe_dispatch.cuh"
#include "swiglu.cuh"

namespace fastprimer {

constexpr int COMBINE_THREADS = 256;

__device__ __forceinline__ GatedActivation silu() { return {1, 0, INFINITY, 0}; }

// Scratch in the order of places, rows aligned to 16 bytes, and what may be read and written 16 bytes at a time.
struct MoeForwardScratch {
  void *u, *z;
  int64_t stride_u, stride_z;
  bool wide_x, wide_gate_up, wide_down, wide_hidden;
};

// A block's rows, places begin .. end - 1 of expert e, and its columns. Blocks that share rows follow each other: together they read all of
// an expert's weights, which the L2 cache then has for the expert's next rows.
struct MoeTile {
  int e, begin, end, column;

  __device__ __forceinline__ MoeTile(const MoeDispatch& at, int columns, int width) {
    const int across = (columns + width - 1) / width, tile = blockIdx.x / across;
    column = blockIdx.x % across * width;
    e = at.tile_expert[tile];
    begin = e < 0 ? 0 : at.tile_begin[tile];
    end = e < 0 ? 0 : min(begin + (1 << at.row_bits), at.begins[e + 1]);
  }

  // The place of row i, or -1.
  __device__ __forceinline__ int place(int i) const { return begin + i < end ? begin + i : -1; }
  __device__ __forceinline__ int token(const MoeDispatch& at, int i) const { return begin + i < end ? at.token_at[begin + i] : -1; }
};

// hidden = x gate_up^T, and u. Of the columns of a block half are gates and half the ups that belong to them, in turns of 8 NT / 2, so that
// what becomes one number of u is in one warp's part. 4 C F FLOPs a pair. Moves x's rows, gathered, once for each tile of F, an expert's
// gate_up once for each tile of its rows, and 3 F elements a pair out.
template <class T, bool LARGE>
__global__ void __launch_bounds__(GemmShape<T, LARGE>::THREADS, GemmShape<T, LARGE>::BLOCKS)
    moe_hidden(const MoeForward args, const MoeDispatch at, const MoeForwardScratch scratch) {
  using Shape = GemmShape<T, LARGE>;
  constexpr int TURN = 8 * Shape::NT / 2, WIDTH = Shape::COLUMNS / 2;
  const MoeProblem& problem = args.problem;
  const int C = static_cast<int>(problem.C), F = static_cast<int>(problem.F);
  const MoeTile tile(at, F, WIDTH);
  if (tile.e < 0) return;

  const T* x = static_cast<const T*>(problem.x);
  const T* gate_up = static_cast<const T*>(problem.gate_up) + tile.e * problem.stride_gate_up_expert;
  const Along<T, Shape> a(x, problem.stride_x_row, C, scratch.wide_x, [&](int i) { return tile.token(at, i); });
  const Along<T, Shape> b(gate_up, problem.stride_gate_up_row, C, scratch.wide_gate_up, [&](int i) {
    const int f = tile.column + i / (2 * TURN) * TURN + i % TURN;
    return f < F ? i / TURN % 2 * F + f : -1;
  });
  const StagedTile<Shape> product = multiply_panels<Shape>(a, b, C, static_cast<T*>(nullptr));

  constexpr int CHUNKS = WIDTH / 8, IN_TURN = TURN / 8;
  for (int i = threadIdx.x; i < Shape::ROWS * CHUNKS; i += Shape::THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS, place = tile.begin + row, f = tile.column + 8 * chunk, count = min(F - f, 8);
    if (place >= tile.end || count <= 0) continue;
    float gate[8], up[8], u[8];
    const int first = chunk / IN_TURN * 2 * IN_TURN + chunk % IN_TURN;
    product.load_chunk(gate, row, first);
    product.load_chunk(up, row, first + IN_TURN);
#pragma unroll
    for (int v = 0; v < 8; v++) {
      gate[v] = widen(narrow<T>(gate[v]));  // u is that of hidden as it is saved
      up[v] = widen(narrow<T>(up[v]));
      u[v] = silu().forward<T>(gate[v], up[v]);
    }
    T* hidden = static_cast<T*>(args.hidden) + at.pair_at[place] * (int64_t{2} * F) + f;
    store_chunk(hidden, gate, count, scratch.wide_hidden);
    store_chunk(hidden + F, up, count, scratch.wide_hidden);
    store_chunk(static_cast<T*>(scratch.u) + place * scratch.stride_u + f, u, count, true);
  }
}

// z = w (u down^T). 2 C F FLOPs a pair. Moves u's rows once for each tile of C, an expert's down once for each tile of its rows, and C
// elements a pair out.
template <class T, bool LARGE>
__global__ void __launch_bounds__(GemmShape<T, LARGE>::THREADS, GemmShape<T, LARGE>::BLOCKS)
    moe_down(const MoeForward args, const MoeDispatch at, const MoeForwardScratch scratch) {
  using Shape = GemmShape<T, LARGE>;
  const MoeProblem& problem = args.problem;
  const int C = static_cast<int>(problem.C), F = static_cast<int>(problem.F);
  const MoeTile tile(at, C, Shape::COLUMNS);
  if (tile.e < 0) return;

  const T* u = static_cast<const T*>(scratch.u);
  const T* down = static_cast<const T*>(problem.down) + tile.e * problem.stride_down_expert;
  const Along<T, Shape> a(u, scratch.stride_u, F, true, [&](int i) { return tile.place(i); });
  const Along<T, Shape> b(down, problem.stride_down_row, F, scratch.wide_down,
                          [&](int i) { return tile.column + i < C ? tile.column + i : -1; });
  const StagedTile<Shape> product = multiply_panels<Shape>(a, b, F, static_cast<T*>(nullptr));

  for (int i = threadIdx.x; i < Shape::ROWS * product.CHUNKS; i += Shape::THREADS) {
    const int row = i / product.CHUNKS, chunk = i % product.CHUNKS, place = tile.begin + row, c = tile.column + 8 * chunk;
    if (place >= tile.end || c >= C) continue;
    const float w = problem.weights[at.pair_at[place]];
    float z[8];
    product.load_chunk(z, row, chunk);
#pragma unroll
    for (int v = 0; v < 8; v++) z[v] *= w;
    store_chunk(static_cast<T*>(scratch.z) + place * scratch.stride_z + c, z, min(C - c, 8), true);
  }
}

// A token's row is the sum of its pairs' rows, in their order. A thread for each 8 numbers. Moves C elements a pair in, C a token out.
template <class T>
__global__ void __launch_bounds__(COMBINE_THREADS)
    moe_combine(const MoeDispatch at, const void* rows, int64_t stride, void* out, int64_t N, int C, bool wide) {
  const int chunks = (C + 7) / 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * COMBINE_THREADS + threadIdx.x, n = i / chunks;
  const int c = static_cast<int>(i % chunks) * 8;
  if (n >= N) return;
  const int* places = at.place_of + n * at.K;
  float sum[8] = {};
#pragma unroll 4
  for (int k = 0; k < at.K; k++) {
    const int place = places[k];
    float row[8];
    widen(load<8>(static_cast<const T*>(rows) + max(place, 0) * stride + c), row);  // asked for without a look: loads overlap
#pragma unroll
    for (int v = 0; v < 8; v++) sum[v] += place < 0 ? 0 : row[v];
  }
  store_chunk(static_cast<T*>(out) + n * C + c, sum, min(C - c, 8), wide);
}

}  // namespace fastprimer
