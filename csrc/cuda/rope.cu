// RoPE on CUDA: which kernel serves a call, and in what shape.
#include <algorithm>

#include "rope.cuh"

namespace fastprimer {
namespace {

constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 64;    // a bound on the grid, far above what runs at once
constexpr int64_t THREADS_PER_MULTIPROCESSOR = 512;  // below as many, more threads with less to do are quicker

template <int V, bool INTERLEAVED>
Error rotate(Cuda device, const Rope& args, void (*kernel)(Rope)) {
  using Unit = RopeUnit<V, INTERLEAVED>;
  constexpr int64_t heads_per_thread = ROPE_ACCESSES / Unit::VECTORS;
  const int64_t tokens = args.B * args.S, heads = args.q.heads + args.k.heads;
  const int64_t units = args.R / (2 * Unit::PAIRS) + (args.D - args.R) / V;
  int64_t lanes = (heads + heads_per_thread - 1) / heads_per_thread, most = ROPE_THREADS;
  const bool few = tokens * lanes * units < THREADS_PER_MULTIPROCESSOR * multiprocessors();
  if (few) {
    lanes = heads;
    most = 64;
  }
  const int64_t x = std::min<int64_t>(units, most);
  // If a block has no room for all lanes, each takes the heads of several of them; where there are few threads, more blocks do.
  const int64_t turns = (lanes + most / x - 1) / (most / x), y = (lanes + turns - 1) / turns;
  const int64_t z = std::min<int64_t>({tokens, most / (x * y), 64});
  const dim3 grid(std::min((tokens + z - 1) / z, BLOCKS_PER_MULTIPROCESSOR * multiprocessors()), few ? std::min<int64_t>(turns, 65535) : 1);
  return launch(kernel, grid, dim3(x, y, z), 0, device, args);
}

template <class T, int V>
bool aligned_heads(const RopeHeads& heads) {
  return aligned<T, V>(heads.x, heads.stride_batch) && aligned<T, V>(heads.x, heads.stride_token) &&
         aligned<T, V>(heads.x, heads.stride_head) && aligned<T, V>(heads.rotated, 0);
}

template <class T, int PAIRS>
bool aligned_tables(const Rope& args) {
  return aligned<T, PAIRS>(args.cos, args.stride_cos_row) && aligned<T, PAIRS>(args.sin, args.stride_sin_row);
}

// Whether units of 16-byte vectors make up every head, and lie where such accesses are allowed.
template <class T, int V, bool INTERLEAVED>
bool vectorizable(const Rope& args) {
  constexpr int PAIRS = RopeUnit<V, INTERLEAVED>::PAIRS;
  return args.R % (2 * PAIRS) == 0 && args.D % V == 0 && aligned_heads<T, V>(args.q) && aligned_heads<T, V>(args.k) &&
         (args.table_dtype == Dtype::float32 ? aligned_tables<float, PAIRS>(args) : aligned_tables<T, PAIRS>(args));
}

template <class T, bool INTERLEAVED>
Error rotate(Cuda device, const Rope& args) {
  constexpr int V = 16 / sizeof(T);
  return vectorizable<T, V, INTERLEAVED>(args) ? rotate<V, INTERLEAVED>(device, args, rope_heads<T, V, INTERLEAVED>)
                                               : rotate<1, INTERLEAVED>(device, args, rope_heads<T, 1, INTERLEAVED>);
}

}  // namespace

Error rope(Cuda device, const Rope& args) {
  if (args.table_dtype != args.dtype && args.table_dtype != Dtype::float32) return "cos and sin must have q's dtype or be float32";
  if (args.q.heads + args.k.heads > 1 << 30 || args.D > 1 << 30) return "more than 2^30 heads or features are not supported";
  return by_dtype(args.dtype, [&](auto element) -> Error {
    using T = decltype(element);
    return args.interleaved ? rotate<T, true>(device, args) : rotate<T, false>(device, args);
  });
}

}  // namespace fastprimer
