// Attention on CUDA: which kernels serve a call, and in what shape.
#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_launch.cuh"

namespace fastprimer {
namespace {

constexpr int64_t DELTA_BLOCKS_PER_MULTIPROCESSOR = 32;  // a bound on the grid, above what runs at once

template <class T>
Error delta(Cuda device, const AttentionBackward& args, const AttentionOptions& options) {
  const AttentionProblem& problem = args.problem;
  const int64_t rows = (problem.cu_seqlens_q == nullptr ? problem.B : 1) * args.stride_lse_head * problem.H;
  if (rows == 0) return nullptr;
  constexpr int ROWS = DELTA_THREADS / DELTA_LANES;
  const int64_t blocks = std::min<int64_t>((rows + ROWS - 1) / ROWS, DELTA_BLOCKS_PER_MULTIPROCESSOR * multiprocessors());
  return launch(attention_delta<T>, dim3(static_cast<unsigned>(blocks)), dim3(DELTA_THREADS), 0, device, args, options);
}

template <class T, int WIDTH>
Error backward_keys(Cuda device, const AttentionBackward& args, const AttentionOptions& options) {
  using Shape = BackwardShape<T, WIDTH>;
  const auto launch_kernel = [&](auto kernel) {
    return launch_tiles(kernel, device, args.problem.T, Shape::OWN, Shape::THREADS, Shape::TILES, args, options);
  };
  if constexpr (Shape::SEPARATE) {
    if (Error error = launch_kernel(attention_backward_keys<T, WIDTH, true, false>)) return error;
    return launch_kernel(attention_backward_keys<T, WIDTH, false, true>);
  } else {
    return launch_kernel(attention_backward_keys<T, WIDTH, true, true>);
  }
}

template <class T, int WIDTH>
Error backward_queries(Cuda device, const AttentionBackward& args, const AttentionOptions& options) {
  using Shape = BackwardShape<T, WIDTH>;
  return launch_tiles(attention_backward_queries<T, WIDTH>, device, query_rows(args.problem), Shape::OWN, Shape::THREADS, Shape::TILES,
                      args, options);
}

// Whether TMA can load heads: their strides must be whole 16 bytes, `wide`, less than 2^40 bytes, and not 0 (an expanded tensor).
bool loadable(const AttentionProblem& problem, const Heads& heads, bool wide, int64_t H, int64_t tokens) {
  const auto fits = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride < int64_t{1} << 39); };
  return wide && tokens > 0 && tokens <= ATTENTION_MOST_TOKENS && fits(H, heads.stride_head) && fits(tokens, heads.stride_token) &&
         (problem.cu_seqlens_q != nullptr || fits(problem.B, heads.stride_batch));
}

// Whether Hopper's own kernels serve a call: on that GPU, for 16-bit elements that TMA can load and groups of which a tile has room for a
// query. The kernels for every GPU serve all others.
bool for_hopper(const AttentionProblem& problem, const AttentionOptions& options) {
  return HOPPER_BUILT && compute_capability() == 9 && problem.dtype != Dtype::float32 && problem.H / problem.Hk <= HOPPER_MOST_HEADS &&
         loadable(problem, problem.q, options.wide_q, problem.H, problem.tokens_q) &&
         loadable(problem, problem.k, options.wide_k, problem.Hk, problem.tokens_k) &&
         loadable(problem, problem.v, options.wide_v, problem.Hk, problem.tokens_k);
}

bool for_hopper(const AttentionBackward& args, const AttentionOptions& options) {
  const AttentionProblem& problem = args.problem;
  return for_hopper(problem, options) && problem.H / problem.Hk <= HOPPER_MOST_HEADS_BACKWARD &&
         std::max(problem.D, problem.Dv) <= (problem.softcap > 0 ? HOPPER_MOST_FEATURES_CAPPED : HOPPER_MOST_FEATURES_BACKWARD) &&
         loadable(problem, args.dout, options.wide_dout, problem.H, problem.tokens_q);
}

}  // namespace

Error attention_forward(Cuda device, const AttentionForward& args) {
  return by_shape(args.problem, [&](auto element, auto width) -> Error {
    using T = decltype(element);
    const AttentionOptions options = options_of<T>(args);
    if (for_hopper(args.problem, options)) return attention_forward_hopper(device, args, options);
    constexpr int WIDTH = decltype(width)::value;
    using Shape = ForwardShape<T, WIDTH>;
    return launch_tiles(attention_forward_tiles<T, WIDTH>, device, query_rows(args.problem), Shape::QUERIES, Shape::THREADS, Shape::SHARED,
                        args, options);
  });
}

Error attention_backward(Cuda device, const AttentionBackward& args) {
  return by_shape(args.problem, [&](auto element, auto width) -> Error {
    using T = decltype(element);
    constexpr int WIDTH = decltype(width)::value;
    const AttentionOptions options = options_of<T>(args);
    if (Error error = delta<T>(device, args, options)) return error;
    if (for_hopper(args, options)) {
      if (Error error = attention_backward_hopper(device, args, options)) return error;
    } else {
      if (Error error = backward_keys<T, WIDTH>(device, args, options)) return error;
      if (Error error = backward_queries<T, WIDTH>(device, args, options)) return error;
    }
    if (args.dsinks == nullptr) return nullptr;
    return launch(attention_dsinks, dim3(args.problem.H), dim3(DSINKS_THREADS), 0, device, args);
  });
}

}  // namespace fastprimer
