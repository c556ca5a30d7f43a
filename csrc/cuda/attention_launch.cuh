// What the launches of attention's CUDA kernels share.
#pragma once
#include "attention_options.h"

namespace fastprimer {

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

inline Error unsupported(const AttentionProblem& problem) {
  if (problem.D > 256 || problem.Dv > 256) return "heads of more than 256 features are not supported";
  if (!(problem.scale >= 0x1p-100)) return "scale must be at least 2^-100";
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
template <class Kernel, class Args, class... More>
Error launch_tiles(Kernel kernel, Cuda device, int64_t rows, int size, int threads, size_t shared, const Args& args,
                   const AttentionOptions& options, const More&... more) {
  const int64_t blocks = (rows + size - 1) / size * args.problem.Hk * args.problem.B;
  if (blocks == 0) return nullptr;
  if (blocks > 0x7FFFFFFF) return "too many sequences, heads and tokens for one launch";
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared, device, args, options, more...);
}

// Rows of queries in the longest sequence: queries times the heads of a group.
inline int64_t query_rows(const AttentionProblem& problem) { return problem.S * (problem.H / problem.Hk); }

// Hopper's own kernels, attention_hopper.cu, in builds for it. The heads of a group, and for the gradients also D and Dv, are limited,
// with a softcap more than without.
// Of the backward pass, these launches make dq, dk and dv, given delta.
constexpr int HOPPER_MOST_HEADS = 128, HOPPER_MOST_HEADS_BACKWARD = 64;
constexpr int HOPPER_MOST_FEATURES_BACKWARD = 128, HOPPER_MOST_FEATURES_CAPPED = 64;
#ifdef FASTPRIMER_HOPPER
constexpr bool HOPPER_BUILT = true;
Error attention_forward_hopper(Cuda device, const AttentionForward& args, const AttentionOptions& options);
Error attention_backward_hopper(Cuda device, const AttentionBackward& args, const AttentionOptions& options);
#else
constexpr bool HOPPER_BUILT = false;
inline Error attention_forward_hopper(Cuda, const AttentionForward&, const AttentionOptions&) { return "built without sm_90a"; }
inline Error attention_backward_hopper(Cuda, const AttentionBackward&, const AttentionOptions&) { return "built without sm_90a"; }
#endif

}  // namespace fastprimer
