// Attention on Hopper: launches of its kernels. Compiled for sm_90a only; attention.cu says what comes here.
#include "attention_backward_hopper.cuh"
#include "attention_forward_hopper.cuh"
#include "attention_launch.cuh"

namespace fastprimer {
namespace {

// Heads as a tensor (features, heads, tokens, sequences), in boxes of a panel's features, `heads_box` heads and `tokens_box` tokens.
template <class T>
Error encode_heads(TensorMap& map, const AttentionProblem& problem, const Heads& heads, int64_t features, int64_t H, int64_t tokens,
                   int heads_box, int tokens_box) {
  const int64_t sequences = problem.cu_seqlens_q == nullptr ? problem.B : 1;
  const auto stride = [](int64_t size, int64_t of_tensor) { return size > 1 ? of_tensor : PANEL; };  // of one: any that TMA allows
  return encode_tiles<T>(map, heads.data, {features, H, tokens, sequences},
                         {stride(H, heads.stride_head), stride(tokens, heads.stride_token), stride(sequences, heads.stride_batch)},
                         {PANEL, heads_box, tokens_box, 1});
}

// Tensor maps of a problem's q, k, v and do.
template <class T>
struct Maps {
  TensorMap q, k, v, dout;

  // In boxes of as many rows of queries, and of as many keys.
  Error encode(const AttentionProblem& problem, int rows, int keys) {
    const int G = static_cast<int>(problem.H / problem.Hk);
    if (Error error = encode_heads<T>(q, problem, problem.q, problem.D, problem.H, problem.tokens_q, G, rows / G)) return error;
    if (Error error = encode_heads<T>(k, problem, problem.k, problem.D, problem.Hk, problem.tokens_k, 1, keys)) return error;
    return encode_heads<T>(v, problem, problem.v, problem.Dv, problem.Hk, problem.tokens_k, 1, keys);
  }
  Error encode(const AttentionBackward& args, int rows, int keys) {
    const AttentionProblem& problem = args.problem;
    const int G = static_cast<int>(problem.H / problem.Hk);
    if (Error error = encode(problem, rows, keys)) return error;
    return encode_heads<T>(dout, problem, args.dout, problem.Dv, problem.H, problem.tokens_q, G, rows / G);
  }
};

template <class Shared>
constexpr size_t shared_bytes() {
  static_assert(sizeof(Shared) <= 227 << 10, "more than a block can have");
  return sizeof(Shared);
}

template <class T, int WIDTH>
Error forward(Cuda device, const AttentionForward& args, const AttentionOptions& options) {
  using Shared = HopperForward<T, WIDTH>;
  const int64_t G = args.problem.H / args.problem.Hk;
  Maps<T> maps;
  if (Error error = maps.encode(args.problem, HOPPER_OWN, Shared::KEYS)) return error;
  return launch_tiles(attention_forward_hopper<T, WIDTH>, device, args.problem.S, static_cast<int>(HOPPER_OWN / G), HOPPER_THREADS,
                      shared_bytes<Shared>(), args, options, maps.q, maps.k, maps.v);
}

template <class T, int WIDTH, bool CAPPED>
Error backward(Cuda device, const AttentionBackward& args, const AttentionOptions& options) {
  const int64_t G = args.problem.H / args.problem.Hk;
  Maps<T> maps;
  if (Error error = maps.encode(args, HOPPER_QUERIES, HOPPER_OWN)) return error;
  if (Error error = launch_tiles(attention_backward_keys_hopper<T, WIDTH, CAPPED>, device, args.problem.T, HOPPER_OWN, HOPPER_THREADS,
                                 shared_bytes<HopperBackwardKeys<T, WIDTH>>(), args, options, maps.q, maps.k, maps.v, maps.dout)) {
    return error;
  }
  if (Error error = maps.encode(args, HOPPER_OWN, HOPPER_KEYS)) return error;
  return launch_tiles(attention_backward_queries_hopper<T, WIDTH, CAPPED>, device, args.problem.S, static_cast<int>(HOPPER_OWN / G),
                      HOPPER_THREADS, shared_bytes<HopperBackwardQueries<T, WIDTH>>(), args, options, maps.q, maps.k, maps.v, maps.dout);
}

constexpr Error NOT_SERVED = "the kernels for Hopper do not serve this dtype, head size and softcap";

}  // namespace

Error attention_forward_hopper(Cuda device, const AttentionForward& args, const AttentionOptions& options) {
  return by_shape(args.problem, [&](auto element, auto width) -> Error {
    if constexpr (sizeof(element) == 2) {
      return forward<decltype(element), width>(device, args, options);
    } else {
      return NOT_SERVED;
    }
  });
}

Error attention_backward_hopper(Cuda device, const AttentionBackward& args, const AttentionOptions& options) {
  return by_shape(args.problem, [&](auto element, auto width) -> Error {
    if constexpr (sizeof(element) == 2) {
      if (width <= HOPPER_MOST_FEATURES_CAPPED && options.softcap > 0) {
        return backward<decltype(element), HOPPER_MOST_FEATURES_CAPPED, true>(device, args, options);
      }
      if (width <= HOPPER_MOST_FEATURES_BACKWARD && options.softcap == 0) {
        return backward < decltype(element), width<128 ? 64 : 128, false>(device, args, options);
      }
    }
    return NOT_SERVED;
  });
}

}  // namespace fastprimer
