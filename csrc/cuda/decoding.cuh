// Decoding on CUDA, in three kernels: the new tokens are appended; blocks go side by side through the keys that all queries of a
// sequence see; and what they found is put together, row by row, with the few keys that only some of the queries see.
#pragma once
#include "../decoding.h"
#include "attention_forward.cuh"

namespace fastprimer {

struct DecodingOptions : AttentionOptions {
  int splits, row_tiles;  // into how many parts the keys, and the rows of a key/value head, are cut
  int part_features;      // Dv, rounded up so that a part's rows are read and written 16 bytes at a time
};

// The tokens of a sequence, the new ones included, and of them those that every query sees.
struct DecodingSequence {
  int b, S, T, left, right, begin, end;

  // Memory-safe whatever the lengths on the device are.
  __device__ __forceinline__ DecodingSequence(const Decoding& args, const DecodingOptions& options, int b)
      : b(b), S(static_cast<int>(args.S)), left(options.left), right(options.right) {
    const int room = static_cast<int>(args.room), cached = min(max(args.cache_seqlens[b], 0), room);
    T = min(cached + static_cast<int>(args.appended), room);
    begin = first_key_of(S - 1);
    end = max(begin, end_key_of(0));
  }

  // The keys that query i sees: from a first one to before an end, which may come before the first.
  __device__ __forceinline__ int first_key_of(int i) const { return max(0, i + T - S - left); }
  __device__ __forceinline__ int end_key_of(int i) const { return min(T, i + T - S + right + 1); }

  // Keys of a part, a multiple of `step`, when they are cut in `splits`, and how many parts are not empty.
  __device__ __forceinline__ int part_keys(int splits, int step) const {
    return (end - begin + splits * step - 1) / (splits * step) * step;
  }
  __device__ __forceinline__ int parts(int splits, int step) const {
    const int keys = part_keys(splits, step);
    return keys == 0 ? 0 : (end - begin + keys - 1) / keys;
  }
};

// The rows of a cache that hold the tokens of one sequence and head: `fetch` reads them like Rows.
template <class T>
struct CachedRows {
  T* data;               // of the sequence, or with pages of page 0
  const int32_t* pages;  // of the sequence; null: contiguous
  int64_t stride_page, stride_token;
  int page_size, last_page, features;
  bool wide;

  __device__ __forceinline__ CachedRows(const Decoding& args, const Heads& cache, int64_t features, bool wide, int b, int hk)
      : data(static_cast<T*>(const_cast<void*>(cache.data)) + hk * cache.stride_head),
        pages(args.block_table == nullptr ? nullptr : args.block_table + b * args.pages_of_sequence),
        stride_page(cache.stride_batch),
        stride_token(cache.stride_token),
        page_size(static_cast<int>(args.page_size)),
        last_page(static_cast<int>(args.pages) - 1),
        features(static_cast<int>(features)),
        wide(wide) {
    if (pages == nullptr) data += b * stride_page;
  }

  __device__ __forceinline__ T* row(int j) const {
    if (pages == nullptr) return data + j * stride_token;
    const int page = static_cast<unsigned>(j) / static_cast<unsigned>(page_size);
    return data + min(max(pages[page], 0), last_page) * stride_page + (j - page * page_size) * stride_token;
  }
};

constexpr int DECODING_THREADS = 128;

// Parts have a multiple of so many keys.
template <class T>
constexpr int DECODING_STEP = sizeof(T) == 2 ? 64 : 32;

// Writes the new keys and values, B S Hk (D + Dv) elements, into the caches. One warp for each token and head.
template <class T>
__global__ void __launch_bounds__(DECODING_THREADS) decoding_append(const Decoding args) {
  const int lane = threadIdx.x % 32, heads = static_cast<int>(args.Hk), S = static_cast<int>(args.S);
  const int row = blockIdx.x * (DECODING_THREADS / 32) + threadIdx.x / 32;
  if (row >= args.B * S * heads) return;
  const int b = row / (S * heads), i = row / heads % S, hk = row % heads;
  const int64_t position = static_cast<int64_t>(args.cache_seqlens[b]) + i;
  if (position < 0 || position >= args.room) return;
  const auto copy = [&](const Heads& from, const Heads& cache, int64_t features) {
    const T* source = static_cast<const T*>(from.data) + b * from.stride_batch + i * from.stride_token + hk * from.stride_head;
    T* target = CachedRows<T>(args, cache, features, false, b, hk).row(static_cast<int>(position));
    for (int d = lane; d < features; d += 32) target[d] = source[d];
  };
  copy(args.k, args.k_cache, args.D);
  copy(args.v, args.v_cache, args.Dv);
}

// A block's rows of queries, 16 a warp, and how many keys it takes at a time. Warps that do not differ in their rows share the keys.
template <class T, int WIDTH, int ROW_WARPS>
struct DecodingShape {
  static constexpr int WARPS = DECODING_THREADS / 32, ROWS = 16 * ROW_WARPS, KEY_WARPS = WARPS / ROW_WARPS;
  static constexpr int KEYS = DECODING_STEP<T> / (WIDTH == 256 ? 2 : 1), WARP_KEYS = KEYS / KEY_WARPS;
  static constexpr size_t SHARED = (ROWS + 4 * KEYS) * WIDTH * sizeof(T);
  static_assert(SHARED + 2 * KEY_WARPS * ROWS * sizeof(float) <= SHARED_EVERYWHERE);
  static constexpr int BLOCKS = WIDTH == 64 ? 1 : 0;  // at once, for ptxas: it aims at more than fit, and spills; 0: as it likes
  static constexpr int LD_SUMS = WIDTH + 8;           // eight more: the rows that a warp writes together lie in different banks
  static_assert(KEY_WARPS * ROWS * LD_SUMS * sizeof(float) <= SHARED, "the sums take the place of queries, keys and values");
};

// A part's o, sum of weights and logarithm of their unit: what a split contributes to row r of a key/value head.
struct DecodingParts {
  float *o, *top, *total;  // of a sequence and head: (splits, rows, part_features), (splits, rows), (splits, rows)
  int rows, features;

  __device__ __forceinline__ DecodingParts(const Decoding& args, const DecodingOptions& options, int b, int hk)
      : rows(static_cast<int>(args.S * (args.H / args.Hk))), features(options.part_features) {
    const int64_t head = b * args.Hk + hk, count = static_cast<int64_t>(options.splits) * rows, all = args.B * args.Hk * count;
    o = args.workspace + head * count * features;
    top = args.workspace + all * features + head * count;
    total = top + all;
  }
  __device__ __forceinline__ int64_t at(int split, int r) const { return static_cast<int64_t>(split) * rows + r; }
};

// One block for each split, tile of rows, key/value head and sequence; those past the sequence's end have nothing to do. Moves the keys
// and values that all queries see once for each tile of ROWS rows, 2 T D elements a head, q, and a part for each split and row. Two
// stages of keys and values: while one is multiplied, the next is on its way.
template <class T, int WIDTH, int ROW_WARPS>
__global__ void __launch_bounds__(DECODING_THREADS, DecodingShape<T, WIDTH, ROW_WARPS>::BLOCKS)
    decoding_parts(const Decoding args, const DecodingOptions options) {
  using Shape = DecodingShape<T, WIDTH, ROW_WARPS>;
  constexpr int KEYS = Shape::KEYS, ROWS = Shape::ROWS, WARP_KEYS = Shape::WARP_KEYS, KEY_WARPS = Shape::KEY_WARPS;
  const int tile = blockIdx.x % options.row_tiles, split = blockIdx.x / options.row_tiles % options.splits;
  const int head = blockIdx.x / options.row_tiles / options.splits, b = head / static_cast<int>(args.Hk),
            hk = head % static_cast<int>(args.Hk);
  const DecodingSequence at(args, options, b);
  const int part_keys = at.part_keys(options.splits, DECODING_STEP<T>), begin = at.begin + split * part_keys,
            end = min(at.end, begin + part_keys);
  if (begin >= end) return;

  const int G = static_cast<int>(args.H / args.Hk), rows = at.S * G, first_row = tile * ROWS;
  const T* queries = static_cast<const T*>(args.q.data) + b * args.q.stride_batch + hk * G * args.q.stride_head;
  const Rows<const T, true> q{queries, args.q.stride_token, args.q.stride_head, G, static_cast<int>(args.D), options.wide_q};
  const CachedRows<const T> k(args, args.k_cache, args.D, options.wide_k, b, hk), v(args, args.v_cache, args.Dv, options.wide_v, b, hk);
  const Tile<T, WIDTH> q_tile{reinterpret_cast<T*>(dynamic_shared())};
  T* stages = q_tile.data + ROWS * WIDTH;
  const auto tile_of = [&](int stage, int which, int row) { return Tile<T, WIDTH>{stages + ((stage * 2 + which) * KEYS + row) * WIDTH}; };
  const auto fetch_keys = [&](int first, int stage) {
    fetch<KEYS, DECODING_THREADS>(tile_of(stage, 0, 0), k, first, end);
    fetch<KEYS, DECODING_THREADS>(tile_of(stage, 1, 0), v, first, end);
    copy_async_commit();
  };
  fetch<ROWS, DECODING_THREADS>(q_tile, q, first_row, rows);
  fetch_keys(begin, 0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, key_warp = warp % KEY_WARPS, row_warp = warp / KEY_WARPS * 16;
  OnlineSoftmax<1> softmax;
  float o[1][WIDTH / 8][4] = {};
  for (int first = begin, stage = 0; first < end; first += KEYS, stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the stage has arrived, for every thread, and nobody reads the other any more
    if (first + KEYS < end) fetch_keys(first + KEYS, stage ^ 1);

    const int first_of_warp = first + key_warp * WARP_KEYS;
    float s[1][WARP_KEYS / 8][4] = {};
    multiply_transposed(s, q_tile, row_warp, tile_of(stage, 0, key_warp * WARP_KEYS));
    if (options.softcap > 0) cap(s, options);
    if (first_of_warp + WARP_KEYS > end) {
#pragma unroll
      for (int e = 0; e < WARP_KEYS / 2; e++) {
        const int key = first_of_warp + e / 4 * 8 + lane % 4 * 2 + e % 2;
        if (key >= end) s[0][e / 4][e % 4] = -INFINITY;
      }
    }
    float rescale[1][2];
    softmax.add(s, options.exponent, rescale);
    scale_rows(o, rescale);
    multiply(o, s, tile_of(stage, 1, key_warp * WARP_KEYS));
  }

  // The warps that share rows put their sums side by side, in the place of queries, keys and values.
  FASTPRIMER_SHARED(tops, float[KEY_WARPS][ROWS]);
  FASTPRIMER_SHARED(totals, float[KEY_WARPS][ROWS]);
  float* sums = reinterpret_cast<float*>(q_tile.data);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = row_warp + 8 * r + lane / 4;
    float total = softmax.total[0][r];
    total += __shfl_xor_sync(FULL_WARP, total, 1);
    total += __shfl_xor_sync(FULL_WARP, total, 2);
    if (lane % 4 == 0) {
      tops[key_warp][row] = softmax.top[0][r] * options.exponent;
      totals[key_warp][row] = total;
    }
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
      const Vector<float, 2> pair = {o[0][n][2 * r], o[0][n][2 * r + 1]};
      store(sums + (key_warp * ROWS + row) * Shape::LD_SUMS + 8 * n + lane % 4 * 2, pair);
    }
  }
  __syncthreads();
  const DecodingParts parts(args, options, b, hk);
  for (int i = threadIdx.x; i < ROWS * (WIDTH / 4); i += DECODING_THREADS) {
    const int row = i / (WIDTH / 4), feature = i % (WIDTH / 4) * 4;
    if (first_row + row >= rows || feature >= options.part_features) continue;
    float top = -INFINITY, total = 0;
#pragma unroll
    for (int w = 0; w < KEY_WARPS; w++) top = fmaxf(top, tops[w][row]);
    Vector<float, 4> sum = {};
#pragma unroll
    for (int w = 0; w < KEY_WARPS; w++) {
      const float weight = top == -INFINITY ? 0 : fast_exp2(tops[w][row] - top);
      const Vector<float, 4> term = load<4>(sums + (w * ROWS + row) * Shape::LD_SUMS + feature);
      total += weight * totals[w][row];
#pragma unroll
      for (int e = 0; e < 4; e++) sum.data[e] += weight * term.data[e];
    }
    const int64_t part = parts.at(split, first_row + row);
    store(parts.o + part * options.part_features + feature, sum);
    if (feature == 0) {
      parts.top[part] = top;
      parts.total[part] = total;
    }
  }
}

// A row's softmax, put together piece by piece; lane l has features l, l + 32, ...
struct DecodingRow {
  static constexpr int FEATURES = 256 / 32;
  float top = -INFINITY, total = 0, o[FEATURES] = {};

  // More weights, whose sum is more_total and whose unit is 2^more_top, and the sums of values that go with them.
  template <class Values>
  __device__ __forceinline__ void add(float more_top, float more_total, Values values) {
    const float most = fmaxf(top, more_top), base = most == -INFINITY ? 0 : most;
    const float rescale = fast_exp2(top - base), weight = fast_exp2(more_top - base);
    top = most;
    total = total * rescale + weight * more_total;
#pragma unroll
    for (int f = 0; f < FEATURES; f++) o[f] = o[f] * rescale + weight * values(f);
  }
};

// One warp for each row of o: adds up its parts in their order, and the keys that not all queries see, at most 2 S of them. Moves the
// parts, those keys and values, and o.
template <class T>
__global__ void __launch_bounds__(DECODING_THREADS) decoding_combine(const Decoding args, const DecodingOptions options) {
  const int lane = threadIdx.x % 32, H = static_cast<int>(args.H), S = static_cast<int>(args.S), G = H / static_cast<int>(args.Hk);
  const int D = static_cast<int>(args.D), Dv = static_cast<int>(args.Dv);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (DECODING_THREADS / 32) + threadIdx.x / 32;
  if (row >= args.B * S * H) return;
  const int b = static_cast<int>(row / (S * H)), i = static_cast<int>(row / H % S), h = static_cast<int>(row % H), hk = h / G;
  const DecodingSequence at(args, options, b);
  const T* q = static_cast<const T*>(args.q.data) + b * args.q.stride_batch + i * args.q.stride_token + h * args.q.stride_head;

  DecodingRow sums;
  const auto add_keys = [&](int begin, int end) {
    const CachedRows<const T> k(args, args.k_cache, args.D, false, b, hk), v(args, args.v_cache, args.Dv, false, b, hk);
    for (int j = begin; j < end; j++) {
      const T *key = k.row(j), *value = v.row(j);
      float s = 0;
      for (int d = lane; d < D; d += 32) s += widen(q[d]) * widen(key[d]);
      s = warp_sum(s);
      if (options.softcap > 0) s = options.softcap * tanhf(s * (options.scale / options.softcap));
      sums.add(s * options.exponent, 1, [&](int f) { return lane + 32 * f < Dv ? widen(value[lane + 32 * f]) : 0; });
    }
  };
  add_keys(at.first_key_of(i), min(at.begin, at.end_key_of(i)));
  const DecodingParts parts(args, options, b, hk);
  const int count = at.parts(options.splits, DECODING_STEP<T>);
  for (int split = 0; split < count; split++) {
    const int64_t part = parts.at(split, i * G + h % G);
    const float* o = parts.o + part * options.part_features;
    sums.add(parts.top[part], parts.total[part], [&](int f) { return lane + 32 * f < Dv ? o[lane + 32 * f] : 0; });
  }
  add_keys(max(at.end, at.first_key_of(i)), at.end_key_of(i));
  if (args.sinks != nullptr) sums.add(args.sinks[h] * LOG2_E, 1, [](int) { return 0; });

  const float share = sums.total == 0 ? 0 : 1 / sums.total;
  T* o = static_cast<T*>(args.o) + row * Dv;
#pragma unroll
  for (int f = 0; f < DecodingRow::FEATURES; f++) {
    if (lane + 32 * f < Dv) o[lane + 32 * f] = narrow<T>(sums.o[f] * share);
  }
  if (lane == 0) args.lse[(static_cast<int64_t>(b) * H + h) * S + i] = sums.total == 0 ? -INFINITY : LN_2 * (sums.top + log2f(sums.total));
}

}  // namespace fastprimer
