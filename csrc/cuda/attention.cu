// Attention on CUDA: which kernels serve a call, and in what shape.
#include <algorithm>

#include "attention_backward.cuh"
#include "attention_forward.cuh"
#include "attention_options.h"

namespace fastprimer {
namespace {

constexpr int64_t DELTA_BLOCKS_PER_MULTIPROCESSOR = 32;  // a bound on the grid, above what runs at once

template <class T>
AttentionOptions options_of(const AttentionForward& args) {
  AttentionOptions options = options_of<T>(args.problem);
  options.wide_o = aligned<T, CHUNK<T>>(args.o, args.problem.Dv);
  return options;
}

template <class T>
AttentionOptions options_of(const AttentionBackward& args) {
  AttentionOptions options = options_of<T>(args.problem);
  options.wide_o = aligned<T, CHUNK<T>>(args.o, args.problem.Dv);
  options.wide_dout = wide<T>(args.dout);
  options.wide_dq = aligned<T, CHUNK<T>>(args.dq, args.problem.D);
  options.wide_dk = aligned<T, CHUNK<T>>(args.dk, args.problem.D);
  options.wide_dv = aligned<T, CHUNK<T>>(args.dv, args.problem.Dv);
  return options;
}

Error unsupported(const AttentionProblem& problem) {
  if (problem.D > 256 || problem.Dv > 256) return "heads of more than 256 features are not supported";
  if (!(problem.scale > 0)) return "scale must be greater than 0";
  if (problem.S * (problem.H / problem.Hk) > ATTENTION_MOST_TOKENS || problem.T > ATTENTION_MOST_TOKENS) {
    return "sequences of 2^30 tokens are not supported";
  }
  return nullptr;
}

// Calls launch(T{}, WIDTH) with the element type, and with the width of the tiles that heads of D and Dv features fit in.
template <class Launch>
Error by_shape(const AttentionProblem& problem, Launch launch) {
  if (Error error = unsupported(problem)) return error;
  return by_dtype(problem.dtype, [&](auto element) -> Error {
    const int64_t features = std::max(problem.D, problem.Dv);
    if (features <= 64) return launch(element, std::integral_constant<int, 64>{});
    if (features <= 128) return launch(element, std::integral_constant<int, 128>{});
    return launch(element, std::integral_constant<int, 256>{});
  });
}

// One block for each tile of `size` rows, key/value head and sequence.
template <class Args>
Error launch_tiles(void (*kernel)(Args, AttentionOptions), Cuda device, int64_t rows, int size, int threads, size_t shared,
                   const Args& args, const AttentionOptions& options) {
  const int64_t blocks = (rows + size - 1) / size * args.problem.Hk * args.problem.B;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7FFFFFFF) return "too many sequences, heads and tokens for one launch";
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared, device, args, options);
}

// Rows of queries in the longest sequence: queries times the heads of a group.
int64_t query_rows(const AttentionProblem& problem) { return problem.S * (problem.H / problem.Hk); }

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

}  // namespace

Error attention_forward(Cuda device, const AttentionForward& args) {
  return by_shape(args.problem, [&](auto element, auto width) -> Error {
    using T = decltype(element);
    constexpr int WIDTH = decltype(width)::value;
    using Shape = ForwardShape<T, WIDTH>;
    return launch_tiles(attention_forward_tiles<T, WIDTH>, device, query_rows(args.problem), Shape::QUERIES, Shape::THREADS, Shape::SHARED,
                        args, options_of<T>(args));
  });
}

Error attention_backward(Cuda device, const AttentionBackward& args) {
  return by_shape(args.problem, [&](auto element, auto width) -> Error {
    using T = decltype(element);
    constexpr int WIDTH = decltype(width)::value;
    const AttentionOptions options = options_of<T>(args);
    if (Error error = delta<T>(device, args, options)) return error;
    if (Error error = backward_keys<T, WIDTH>(device, args, options)) return error;
    if (Error error = backward_queries<T, WIDTH>(device, args, options)) return error;
    if (args.dsinks == nullptr) return nullptr;
    return launch(attention_dsinks, dim3(args.problem.H), dim3(DSINKS_THREADS), 0, device, args);
  });
}

}  // namespace fastprimer
