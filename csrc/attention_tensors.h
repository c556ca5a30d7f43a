// What the bindings of attention and decoding share: queries, keys and values as their kernels read them.
#pragma once
#include "attention.h"
#include "tensor.h"

namespace fastprimer {

inline Heads heads_of(const Tensor& x) {
  return {.data = x.const_data_ptr(),
          .stride_batch = x.dim() == 3 ? 0 : x.stride(0),
          .stride_token = x.stride(x.dim() - 3),
          .stride_head = x.stride(x.dim() - 2)};
}

inline Heads heads_of(const std::optional<Tensor>& x) { return x ? heads_of(*x) : Heads{}; }

inline std::optional<Tensor> with_adjacent_features(const std::optional<Tensor>& x) {
  if (!x) return std::nullopt;
  return with_adjacent_features(*x);
}

inline void check_sinks(const std::optional<Tensor>& sinks, const Tensor& q) {
  STD_TORCH_CHECK(
      !sinks || (sinks->dim() == 1 && sinks->size(0) == q.size(q.dim() - 2) && sinks->get_device_index() == q.get_device_index()),
      "fastprimer: sinks: expected shape (H,), on q's device");
}

inline int64_t limit_of(Integer side) {
  STD_TORCH_CHECK(!side || *side >= 0, "fastprimer: window: expected numbers >= 0 or None");
  return side.value_or(AttentionProblem::UNLIMITED);
}

}  // namespace fastprimer
