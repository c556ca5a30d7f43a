// Decoding on CUDA: which kernels serve a call, and in what shape.
#include <algorithm>

#include "attention_options.h"
#include "decoding.cuh"

namespace fastprimer {
namespace {

constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 4;  // more than run at once, so that sequences of different lengths even out
constexpr int64_t LEAST_KEYS = 256;               // that are worth a split

bool widest(const Decoding& args) { return std::max(args.D, args.Dv) > 128; }

// Warps that have rows of their own, 16 each; a key/value head with more rows takes several tiles. The widest heads take two at least,
// those of float32 just two, so that 99 KiB of shared memory are enough.
int row_warps(const Decoding& args) {
  if (args.S * (args.H / args.Hk) <= 16) return widest(args) ? 2 : 1;
  return widest(args) && args.dtype == Dtype::float32 ? 2 : 4;
}

// A matter of shapes and of the device: lengths are not known here.
DecodingOptions cut(const Decoding& args) {
  const int64_t rows = args.S * (args.H / args.Hk), tile = 16 * row_warps(args);
  DecodingOptions options = {};
  options.row_tiles = static_cast<int>((rows + tile - 1) / tile);
  const int64_t blocks = args.B * args.Hk * options.row_tiles, wanted = BLOCKS_PER_MULTIPROCESSOR * multiprocessors();
  const int64_t seen = args.left < 0 ? args.room : std::min(args.room, args.left + args.S);
  const int64_t splits = std::min((wanted + blocks - 1) / blocks, (seen + LEAST_KEYS - 1) / LEAST_KEYS);
  options.splits = static_cast<int>(std::max<int64_t>(splits, 1));
  options.part_features = static_cast<int>((args.Dv + 3) / 4 * 4);
  return options;
}

Error unsupported(const Decoding& args) {
  if (args.D > 256 || args.Dv > 256) return "heads of more than 256 features are not supported";
  if (!(args.scale >= 0x1p-100)) return "scale must be at least 2^-100";
  if (args.room > ATTENTION_MOST_TOKENS || args.page_size > ATTENTION_MOST_TOKENS || args.pages > 0x7FFFFFFF) {
    return "caches of 2^30 tokens a sequence are not supported";
  }
  if (args.B * args.S * args.H > 0x7FFFFFFF) return "too many sequences, queries and heads for one launch";
  return nullptr;
}

template <class T>
DecodingOptions options_of(const Decoding& args) {
  AttentionProblem problem = {};
  problem.q = args.q;
  problem.k = args.k_cache;
  problem.v = args.v_cache;
  problem.left = args.left;
  problem.right = args.right;
  problem.scale = args.scale;
  problem.softcap = args.softcap;
  DecodingOptions options = cut(args);
  static_cast<AttentionOptions&>(options) = options_of<T>(problem);
  return options;
}

// One warp for each of `rows`.
template <class... Parameters, class... Arguments>
Error launch_warps(void (*kernel)(Parameters...), Cuda device, int64_t rows, const Arguments&... arguments) {
  constexpr int64_t WARPS = DECODING_THREADS / 32;
  return launch(kernel, dim3(static_cast<unsigned>((rows + WARPS - 1) / WARPS)), dim3(DECODING_THREADS), 0, device, arguments...);
}

template <class T, int WIDTH, int ROW_WARPS>
Error launch_parts(Cuda device, const Decoding& args, const DecodingOptions& options) {
  const int64_t blocks = args.B * args.Hk * options.splits * options.row_tiles;
  if (blocks > 0x7FFFFFFF) return "too many sequences, heads and tokens for one launch";
  return launch(decoding_parts<T, WIDTH, ROW_WARPS>, dim3(static_cast<unsigned>(blocks)), dim3(DECODING_THREADS),
                DecodingShape<T, WIDTH, ROW_WARPS>::SHARED, device, args, options);
}

template <class T, int WIDTH>
Error launch_parts(Cuda device, const Decoding& args, const DecodingOptions& options) {
  if constexpr (sizeof(T) == 2 || WIDTH <= 128) {
    if (row_warps(args) == 4) return launch_parts<T, WIDTH, 4>(device, args, options);
  }
  return launch_parts<T, WIDTH, WIDTH <= 128 ? 1 : 2>(device, args, options);
}

template <class T>
Error launch_parts(Cuda device, const Decoding& args, const DecodingOptions& options) {
  if (std::max(args.D, args.Dv) <= 64) return launch_parts<T, 64>(device, args, options);
  return widest(args) ? launch_parts<T, 256>(device, args, options) : launch_parts<T, 128>(device, args, options);
}

}  // namespace

int64_t decoding_workspace(Cuda, const Decoding& args) {
  const DecodingOptions options = cut(args);
  return args.B * args.S * args.H * options.splits * (options.part_features + 2);
}

Error decoding(Cuda device, const Decoding& args) {
  if (Error error = unsupported(args)) return error;
  return by_dtype(args.dtype, [&](auto element) -> Error {
    using T = decltype(element);
    const DecodingOptions options = options_of<T>(args);
    if (args.appended > 0) {
      if (Error error = launch_warps(decoding_append<T>, device, args.B * args.S * args.Hk, args)) return error;
    }
    if (Error error = launch_parts<T>(device, args, options)) return error;
    return launch_warps(decoding_combine<T>, device, args.B * args.S * args.H, args, options);
  });
}

}  // namespace fastprimer
