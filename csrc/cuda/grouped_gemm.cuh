// Products of tiles, for groups of rows of any length: the main loop of all products of the mixture of experts.
//
// A block makes a tile of ROWS x COLUMNS of a product a b, DEPTH of its terms at a time, from two panels that it fetches in STAGES: while
// one is multiplied, the next are on their way. A panel comes in one of two forms, whichever its matrix has in memory:
//
//   Along   a line of the panel lies along the depth: memory is (lines, depth), and each line has a place of its own (gathered tokens)
//   Across  a line of the panel lies across it:       memory is (depth, lines), and each step of the depth may have a place of its own
//
// What lies outside of a panel is 0 in its tile, so that a NaN that is not part of the product cannot become part of it. Nothing is padded
// in memory.
//
// Each warp makes 16 MT x 8 NT of the tile. With i = lane / 4 and j = 2 (lane % 4), element e of acc[m][n] is row 16 m + i + 8 (e / 2),
// column 8 n + j + e % 2: mma's layout. float32 has no matrix instruction that is as exact, so its products are made of fused
// multiply-adds in the same layout.
#pragma once
#include "tile.cuh"

namespace fastprimer {

// The four warps of a block make 128 x 128 (LARGE), or 64 x 64 for groups of few rows and for float32. The larger a warp's part, the less
// is read from shared memory for each product; 64 x 64 are as much as there are registers for. BLOCKS are to run at once on a
// multiprocessor: while one waits for a panel, or writes its tile, the others multiply.
template <class T, bool LARGE>
struct GemmShape {
  static constexpr int ROWS = LARGE ? 128 : 64, COLUMNS = ROWS, THREADS = 128;
  static constexpr int DEPTH = 128 / sizeof(T);
  static constexpr int MT = LARGE ? 4 : 2, NT = LARGE ? 8 : 4;
  static constexpr int STAGES = LARGE ? 2 : 3, BLOCKS = LARGE ? 2 : sizeof(T) == 2 ? 4 : 3;
  static constexpr int WARPS_ACROSS = COLUMNS / (8 * NT), PANEL = ROWS * DEPTH;
  static constexpr size_t STAGED = ROWS * COLUMNS * sizeof(float), PANELS = 2 * STAGES * PANEL * sizeof(T);
  static constexpr size_t SHARED = STAGED > PANELS ? STAGED : PANELS;
  static_assert(SHARED <= SHARED_EVERYWHERE);
};

// Copies the first `count` of a chunk's elements, the rest are zeros; asynchronously where 16-byte accesses are allowed (wide).
template <class T>
__device__ __forceinline__ void fetch_chunk(T* to, const T* from, int count, bool wide) {
  if (wide) {
    copy_async(to, from, count * static_cast<int>(sizeof(T)));
  } else {
    Vector<T, CHUNK<T>> v;
#pragma unroll
    for (int e = 0; e < CHUNK<T>; e++) v.data[e] = e < count ? from[e] : T{};
    store(to, v);
  }
}

__device__ __forceinline__ int count_in_chunk(int left, int chunk) { return left < 0 ? 0 : left < chunk ? left : chunk; }

// See above. Each thread fetches a chunk of EACH lines; of where they are it keeps numbers, which take half the registers of addresses.
template <class T, class Shape>
struct Along {
  static constexpr bool ACROSS = false;
  static constexpr int CHUNKS = Shape::DEPTH / CHUNK<T>, STEP = Shape::THREADS / CHUNKS, EACH = Shape::ROWS / STEP;
  using Panel = Tile<T, Shape::DEPTH>;

  const T* data;
  int64_t stride;
  int depth;
  bool wide;
  int places[EACH];  // -1: there is none

  // place_of(i) is the row of memory that line i of the panel is, or -1.
  template <class PlaceOf>
  __device__ __forceinline__ Along(const T* data, int64_t stride, int depth, bool wide, PlaceOf place_of)
      : data(data), stride(stride), depth(depth), wide(wide) {
#pragma unroll
    for (int i = 0; i < EACH; i++) places[i] = place_of(static_cast<int>(threadIdx.x) / CHUNKS + i * STEP);
  }

  __device__ __forceinline__ void fetch(T* stage, int first) const {
    const int chunk = threadIdx.x % CHUNKS, at = first + chunk * CHUNK<T>, count = count_in_chunk(depth - at, CHUNK<T>);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const bool inside = places[i] >= 0 && count > 0;
      const T* from = inside ? data + places[i] * stride + at : data;
      fetch_chunk(Panel{stage}.chunk(threadIdx.x / CHUNKS + i * STEP, chunk), from, inside ? count : 0, wide);
    }
  }
};

template <class T, class Shape>
struct Across {
  static constexpr bool ACROSS = true;
  static constexpr int CHUNKS = Shape::COLUMNS / CHUNK<T>, STEP = Shape::THREADS / CHUNKS, EACH = Shape::DEPTH / STEP;
  using Panel = Tile<T, Shape::COLUMNS>;

  const T* data;  // where the panel's first line begins
  int64_t stride;
  const int* places;  // of the steps of the depth; null: one after the other
  int depth, lines;
  bool wide;

  __device__ __forceinline__ void fetch(T* stage, int first) const {
    const int chunk = threadIdx.x % CHUNKS, count = count_in_chunk(lines - chunk * CHUNK<T>, CHUNK<T>);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int row = threadIdx.x / CHUNKS + i * STEP, k = first + row;
      const bool inside = k < depth && count > 0;
      const int64_t place = !inside ? 0 : places == nullptr ? k : places[k];
      fetch_chunk(Panel{stage}.chunk(row, chunk), inside ? data + place * stride + chunk * CHUNK<T> : data, inside ? count : 0, wide);
    }
  }
};

// acc += a b for one step of the depth, for the warp whose part begins at (row, column) of the tile; 16 bits.
template <class A, class B, class T, int MT, int NT>
__device__ __forceinline__ void multiply_step(float (&acc)[MT][NT][4], T* a, T* b, int depth, int row, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    uint32_t a_part[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const typename A::Panel panel{a};
      if constexpr (A::ACROSS) {
        load_matrix<true>(a_part[m], panel.chunk(k + lane / 16 * 8 + lane % 8, row / 8 + 2 * m + lane / 8 % 2));
      } else {
        load_matrix<false>(a_part[m], panel.chunk(row + 16 * m + lane % 16, k / 8 + lane / 16));
      }
    }
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b_part[4];
      const typename B::Panel panel{b};
      if constexpr (B::ACROSS) {
        load_matrix<true>(b_part, panel.chunk(k + lane % 16, column / 8 + n + lane / 16));
      } else {
        load_matrix<false>(b_part, panel.chunk(column + 8 * n + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
      }
      const uint32_t left[2] = {b_part[0], b_part[1]}, right[2] = {b_part[2], b_part[3]};
#pragma unroll
      for (int m = 0; m < MT; m++) {
        multiply_accumulate<T>(acc[m][n], a_part[m], left);
        multiply_accumulate<T>(acc[m][n + 1], a_part[m], right);
      }
    }
  }
}

// The same in float32. The terms of a step are added up on their own, so that a long sum has fewer roundings.
template <class A, class B, int MT, int NT>
__device__ __forceinline__ void multiply_step(float (&acc)[MT][NT][4], float* a, float* b, int depth, int row, int column) {
  const int lane = threadIdx.x % 32;
  const typename A::Panel a_panel{a};
  const typename B::Panel b_panel{b};
  float sum[MT][NT][4] = {};
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {
    Vector<float, 4> a_part[2 * MT];
#pragma unroll
    for (int m = 0; m < 2 * MT; m++) {
      const int line = row + 8 * m + lane / 4;
      if constexpr (A::ACROSS) {
#pragma unroll
        for (int i = 0; i < 4; i++) a_part[m].data[i] = a_panel.chunk(k + i, line / 4)[line % 4];
      } else {
        a_part[m] = load<4>(a_panel.chunk(line, k / 4));
      }
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float b_part[4][2];
      if constexpr (B::ACROSS) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const Vector<float, 2> pair = load<2>(b_panel.pair(k + i, column / 8 + n, lane));
          b_part[i][0] = pair.data[0];
          b_part[i][1] = pair.data[1];
        }
      } else {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const Vector<float, 4> line = load<4>(b_panel.chunk(column + 8 * n + lane % 4 * 2 + c, k / 4));
#pragma unroll
          for (int i = 0; i < 4; i++) b_part[i][c] = line.data[i];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int e = 0; e < 4 * MT; e++) sum[e / 4][n][e % 4] += a_part[e / 2].data[i] * b_part[i][e % 2];
      }
    }
  }
#pragma unroll
  for (int e = 0; e < 4 * MT * NT; e++) acc[e / (4 * NT)][e / 4 % NT][e % 4] += sum[e / (4 * NT)][e / 4 % NT][e % 4];
}

// The tile's numbers in float32, in shared memory, for all threads: what the main loop leaves.
template <class Shape>
struct StagedTile {
  static constexpr int V = 8, CHUNKS = Shape::COLUMNS / V;  // of V numbers
  Tile<float, Shape::COLUMNS> tile;

  __device__ __forceinline__ void load_chunk(float (&v)[V], int row, int chunk) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Vector<float, 4> part = load<4>(tile.chunk(row, 2 * chunk + half));
#pragma unroll
      for (int e = 0; e < 4; e++) v[4 * half + e] = part.data[e];
    }
  }
};

// The product of two panels of the same depth. Every thread of the block calls it, once.
template <class Shape, class A, class B, class T>
__device__ __forceinline__ StagedTile<Shape> multiply_panels(const A& a, const B& b, int depth, T*) {
  constexpr int MT = Shape::MT, NT = Shape::NT;
  T* stages = reinterpret_cast<T*>(dynamic_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / Shape::WARPS_ACROSS * 16 * MT, column = warp % Shape::WARPS_ACROSS * 8 * NT;
  const int steps = (depth + Shape::DEPTH - 1) / Shape::DEPTH;
  const auto fetch = [&](int step, int stage) {
    if (step < steps) {
      a.fetch(stages + stage * 2 * Shape::PANEL, step * Shape::DEPTH);
      b.fetch(stages + (stage * 2 + 1) * Shape::PANEL, step * Shape::DEPTH);
    }
    copy_async_commit();  // a group for every step, empty or not, so that the same number of later ones may be pending
  };
#pragma unroll
  for (int step = 0; step < Shape::STAGES - 1; step++) fetch(step, step);

  float acc[MT][NT][4] = {};
  for (int step = 0, stage = 0; step < steps; step++) {
    copy_async_wait<Shape::STAGES - 2>();
    __syncthreads();  // the stage has arrived, for every thread, and nobody reads the one before any more
    fetch(step + Shape::STAGES - 1, stage == 0 ? Shape::STAGES - 1 : stage - 1);
    T* panels = stages + stage * 2 * Shape::PANEL;
    multiply_step<A, B>(acc, panels, panels + Shape::PANEL, Shape::DEPTH, row, column);
    stage = stage + 1 == Shape::STAGES ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  __syncthreads();  // nobody reads a stage any more

  const StagedTile<Shape> staged{{reinterpret_cast<float*>(dynamic_shared())}};
#pragma unroll
  for (int m = 0; m < 2 * MT; m++) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const Vector<float, 2> pair = {{acc[m / 2][n][m % 2 * 2], acc[m / 2][n][m % 2 * 2 + 1]}};
      store(staged.tile.pair(row + 8 * m + lane / 4, column / 8 + n, lane), pair);
    }
  }
  __syncthreads();
  return staged;
}

// Eight numbers to and from memory: the first `count` of them, in accesses of 16 bytes where all are there and that is allowed.
template <class T>
__device__ __forceinline__ void load_chunk(float (&v)[8], const T* from, int count, bool wide) {
  if (wide && count >= 8) {
    widen(load<8>(from), v);
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = e < count ? widen(from[e]) : 0;
  }
}
template <class T>
__device__ __forceinline__ void store_chunk(T* to, const float (&v)[8], int count, bool wide) {
  if (wide && count >= 8) {
    store(to, narrow<T>(v));
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (e < count) to[e] = narrow<T>(v[e]);
    }
  }
}

}  // namespace fastprimer
