// What the host works out for the kernels of attention and decoding.
#pragma once
#include <algorithm>

#include "attention_tile.cuh"

namespace fastprimer {

template <class T>
bool wide(const Heads& heads) {
  constexpr int V = CHUNK<T>;
  return aligned<T, V>(heads.data, heads.stride_batch) && aligned<T, V>(heads.data, heads.stride_token) &&
         aligned<T, V>(heads.data, heads.stride_head);
}

template <class T>
AttentionOptions options_of(const AttentionProblem& problem) {
  const auto limit = [](int64_t side) {
    return static_cast<int>(side < 0 ? ATTENTION_MOST_TOKENS : std::min<int64_t>(side, ATTENTION_MOST_TOKENS));
  };
  AttentionOptions options = {};
  options.scale = static_cast<float>(problem.scale);
  options.softcap = static_cast<float>(problem.softcap);
  options.exponent = problem.softcap > 0 ? LOG2_E : static_cast<float>(problem.scale * 1.4426950408889634);
  options.left = limit(problem.left);
  options.right = limit(problem.right);
  options.wide_q = wide<T>(problem.q);
  options.wide_k = wide<T>(problem.k);
  options.wide_v = wide<T>(problem.v);
  return options;
}

}  // namespace fastprimer
