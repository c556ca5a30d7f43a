// Attention on Hopper: launches of the kernels in attention_hopper.cuh. Compiled for sm_90a only; attention.cu says what comes here.
#include "attention_hopper.cuh"
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

}  // namespace

Error attention_forward_hopper(Cuda device, const AttentionForward& args, const AttentionOptions& options) {
  const AttentionProblem& problem = args.problem;
  return by_shape(problem, [&](auto element, auto width) -> Error {
    using T = decltype(element);
    constexpr int WIDTH = decltype(width)::value;
    using Shape = HopperForwardShape<WIDTH>;
    static_assert(Shape::ROWS >= HOPPER_MOST_HEADS, "a tile has no room for a query of the group");
    if constexpr (sizeof(T) != 2) {
      return "float32 has no kernel for Hopper of its own";
    } else {
      const int G = static_cast<int>(problem.H / problem.Hk), tokens = Shape::ROWS / G;
      TensorMap q_map, k_map, v_map;
      if (Error error = encode_heads<T>(q_map, problem, problem.q, problem.D, problem.H, problem.tokens_q, G, tokens)) return error;
      if (Error error = encode_heads<T>(k_map, problem, problem.k, problem.D, problem.Hk, problem.tokens_k, 1, Shape::KEYS)) return error;
      if (Error error = encode_heads<T>(v_map, problem, problem.v, problem.Dv, problem.Hk, problem.tokens_k, 1, Shape::KEYS)) return error;
      return launch_tiles(attention_forward_hopper<T, WIDTH>, device, problem.S, tokens, Shape::THREADS,
                          sizeof(HopperForwardShared<T, WIDTH>), args, options, q_map, k_map, v_map);
    }
  });
}

}  // namespace fastprimer
