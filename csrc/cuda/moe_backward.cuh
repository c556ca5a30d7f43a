// The mixture of experts' backward pass on CUDA. The mathematics: fastprimer/ops/moe.py; the order of pairs: moe_dispatch.cuh.
//
// Scratch, a row for each place: dhidden = [da; db], wu = w u, and the rows of dx of single pairs. d itself is never in memory.
#pragma once
#include "moe_forward.cuh"

namespace fastprimer {

struct MoeBackwardScratch {
  void *dhidden, *wu, *dx;
  int64_t stride_dhidden, stride_wu, stride_dx;
  float* dots;  // (tiles of F, pairs): parts of dweights
  bool wide_dy, wide_gate_up, wide_down, wide_hidden, wide_dhidden;
};

// d = dy down, and from it dhidden, wu and the tile's part of d u. 2 C F FLOPs a pair. Moves dy's rows, gathered, once for each tile of F,
// an expert's down once for each tile of its rows, hidden in, and 3 F elements a pair out.
template <class T, bool LARGE>
__global__ void __launch_bounds__(GemmShape<T, LARGE>::THREADS, GemmShape<T, LARGE>::BLOCKS)
    moe_dhidden(const MoeBackward args, const MoeDispatch at, const MoeBackwardScratch scratch) {
  using Shape = GemmShape<T, LARGE>;
  const MoeProblem& problem = args.problem;
  const int C = static_cast<int>(problem.C), F = static_cast<int>(problem.F);
  const MoeTile tile(at, F, Shape::COLUMNS);
  if (tile.e < 0) return;

  const T* dy = static_cast<const T*>(args.dy);
  const T* down = static_cast<const T*>(problem.down) + tile.e * problem.stride_down_expert + tile.column;
  const Along<T, Shape> a(dy, args.stride_dy_row, C, scratch.wide_dy, [&](int i) { return tile.token(at, i); });
  const Across<T, Shape> b{down, problem.stride_down_row, nullptr, C, F - tile.column, scratch.wide_down};
  const StagedTile<Shape> product = multiply_panels<Shape>(a, b, C, static_cast<T*>(nullptr));

  for (int i = threadIdx.x; i < Shape::ROWS * product.CHUNKS; i += Shape::THREADS) {
    const int row = i / product.CHUNKS, chunk = i % product.CHUNKS, place = tile.begin + row, f = tile.column + 8 * chunk;
    const int count = place < tile.end ? min(F - f, 8) : 0;
    float dot = 0;
    if (count > 0) {
      const int64_t pair = at.pair_at[place];
      const float w = problem.weights[pair];
      const T* hidden = static_cast<const T*>(args.hidden) + pair * (2 * F) + f;
      float d[8], gate[8], up[8], wu[8];
      product.load_chunk(d, row, chunk);
      load_chunk(gate, hidden, count, scratch.wide_hidden);
      load_chunk(up, hidden + F, count, scratch.wide_hidden);
#pragma unroll
      for (int v = 0; v < 8; v++) {
        const float u = silu().forward<T>(gate[v], up[v]);
        if (v < count) dot += d[v] * u;
        wu[v] = w * u;
        silu().backward<T>(w * d[v], gate[v], up[v], gate[v], up[v]);
      }
      T* dhidden = static_cast<T*>(scratch.dhidden) + place * scratch.stride_dhidden + f;
      store_chunk(dhidden, gate, count, scratch.wide_dhidden);
      store_chunk(dhidden + F, up, count, scratch.wide_dhidden);
      store_chunk(static_cast<T*>(scratch.wu) + place * scratch.stride_wu + f, wu, count, true);
    }
    dot = warp_sum(dot, product.CHUNKS);  // a row's chunks are in lanes next to each other
    if (chunk == 0 && place < tile.end) scratch.dots[static_cast<int64_t>(tile.column / Shape::COLUMNS) * at.pairs + place] = dot;
  }
}

// The rows of dx of single pairs, dhidden gate_up. 4 C F FLOPs a pair. Moves dhidden's rows once for each tile of C, an expert's gate_up
// once for each tile of its rows, and C elements a pair out.
template <class T, bool LARGE>
__global__ void __launch_bounds__(GemmShape<T, LARGE>::THREADS, GemmShape<T, LARGE>::BLOCKS)
    moe_dx(const MoeBackward args, const MoeDispatch at, const MoeBackwardScratch scratch) {
  using Shape = GemmShape<T, LARGE>;
  const MoeProblem& problem = args.problem;
  const int C = static_cast<int>(problem.C), depth = 2 * static_cast<int>(problem.F);
  const MoeTile tile(at, C, Shape::COLUMNS);
  if (tile.e < 0) return;

  const T* dhidden = static_cast<const T*>(scratch.dhidden);
  const T* gate_up = static_cast<const T*>(problem.gate_up) + tile.e * problem.stride_gate_up_expert + tile.column;
  const Along<T, Shape> a(dhidden, scratch.stride_dhidden, depth, true, [&](int i) { return tile.place(i); });
  const Across<T, Shape> b{gate_up, problem.stride_gate_up_row, nullptr, depth, C - tile.column, scratch.wide_gate_up};
  const StagedTile<Shape> product = multiply_panels<Shape>(a, b, depth, static_cast<T*>(nullptr));

  for (int i = threadIdx.x; i < Shape::ROWS * product.CHUNKS; i += Shape::THREADS) {
    const int row = i / product.CHUNKS, chunk = i % product.CHUNKS, place = tile.begin + row, c = tile.column + 8 * chunk;
    if (place >= tile.end || c >= C) continue;
    float dx[8];
    product.load_chunk(dx, row, chunk);
    store_chunk(static_cast<T*>(scratch.dx) + place * scratch.stride_dx + c, dx, min(C - c, 8), true);
  }
}

// What a weight gradient is made of: for every expert, a^T b over its places, (E, rows, columns).
struct MoeOuter {
  const void *a, *b;  // (places or tokens, rows), (places or tokens, columns)
  int64_t stride_a, stride_b;
  bool gather_a, gather_b;  // from tokens
  bool wide_a, wide_b, wide_out;
  int rows, columns;
  void* out;
};

// dgate_up = dhidden^T x and ddown = dy^T wu: one block for each tile of each expert's gradient, over all of the expert's places; an expert
// without any gets zeros. 2 rows columns FLOPs a pair. Moves a once for each tile of columns and b once for each tile of rows, and the
// gradient out.
template <class T, bool LARGE>
__global__ void __launch_bounds__(GemmShape<T, LARGE>::THREADS, GemmShape<T, LARGE>::BLOCKS)
    moe_dexperts(const MoeDispatch at, const MoeOuter outer) {
  using Shape = GemmShape<T, LARGE>;
  const int across = (outer.columns + Shape::COLUMNS - 1) / Shape::COLUMNS, down = (outer.rows + Shape::ROWS - 1) / Shape::ROWS;
  const int first_column = blockIdx.x % across * Shape::COLUMNS, first_row = blockIdx.x / across % down * Shape::ROWS;
  const int e = blockIdx.x / across / down, begin = at.begins[e], count = at.begins[e + 1] - begin;

  const auto panel = [&](const void* data, int64_t stride, bool gather, int first, int lines, bool wide) -> Across<T, Shape> {
    const T* line = static_cast<const T*>(data) + first;
    if (gather) return {line, stride, at.token_at + begin, count, lines - first, wide};
    return {line + begin * stride, stride, nullptr, count, lines - first, wide};
  };
  const Across<T, Shape> a = panel(outer.a, outer.stride_a, outer.gather_a, first_row, outer.rows, outer.wide_a);
  const Across<T, Shape> b = panel(outer.b, outer.stride_b, outer.gather_b, first_column, outer.columns, outer.wide_b);
  const StagedTile<Shape> product = multiply_panels<Shape>(a, b, count, static_cast<T*>(nullptr));

  T* out = static_cast<T*>(outer.out) + (static_cast<int64_t>(e) * outer.rows + first_row) * outer.columns + first_column;
  for (int i = threadIdx.x; i < Shape::ROWS * product.CHUNKS; i += Shape::THREADS) {
    const int row = i / product.CHUNKS, column = i % product.CHUNKS * 8, left = outer.columns - first_column - column;
    if (first_row + row >= outer.rows || left <= 0) continue;
    float v[8];
    product.load_chunk(v, row, i % product.CHUNKS);
    store_chunk(out + static_cast<int64_t>(row) * outer.columns + column, v, min(left, 8), outer.wide_out);
  }
}

// A pair's gradient of its weight: the sum of its parts, tile after tile. A thread for each pair.
__global__ void __launch_bounds__(COMBINE_THREADS) moe_dweights(const MoeDispatch at, const float* dots, int tiles, float* dweights) {
  const int pair = blockIdx.x * COMBINE_THREADS + threadIdx.x;
  if (pair >= at.pairs) return;
  const int place = at.place_of[pair];
  float sum = 0;
  for (int tile = 0; tile < tiles && place >= 0; tile++) sum += dots[static_cast<int64_t>(tile) * at.pairs + place];
  dweights[pair] = sum;
}

}  // namespace fastprimer
