// RoPE: tensors in, tensors out. Reads the strides of queries and keys, and calls the kernel of the tensors' device.
#include "rope.h"

#include <tuple>

#include "tensor.h"

namespace fastprimer {
namespace {

RopeHeads heads_of(const Tensor& x, Tensor& rotated) {
  const bool packed = x.dim() == 3;
  return {.x = x.const_data_ptr(),
          .stride_batch = packed ? 0 : x.stride(0),
          .stride_token = x.stride(x.dim() - 3),
          .stride_head = x.stride(x.dim() - 2),
          .rotated = rotated.mutable_data_ptr(),
          .heads = x.size(x.dim() - 2)};
}

void check_arguments(const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos, const Tensor& sin,
                     const std::optional<Tensor>& positions) {
  STD_TORCH_CHECK(q.dim() == 3 || q.dim() == 4, "fastprimer: q: expected shape (B, S, H, D) or (N, H, D)");
  if (k) {
    check_kind("k", *k, q);
    bool fits = k->dim() == q.dim();
    for (int64_t d = 0; fits && d < q.dim(); d++) fits = d == q.dim() - 2 || k->size(d) == q.size(d);
    STD_TORCH_CHECK(fits, "fastprimer: k: expected shape (..., Hk, D) of q's batch, tokens and head size");
  }
  STD_TORCH_CHECK(cos.dim() == 2 && cos.size(1) > 0 && 2 * cos.size(1) <= q.size(q.dim() - 1) &&
                      cos.get_device_index() == q.get_device_index() &&
                      (cos.scalar_type() == q.scalar_type() || cos.scalar_type() == ScalarType::Float),
                  "fastprimer: cos: expected shape (P, R/2) with 0 < R <= D, q's dtype or float32, and q's device");
  check_like("sin", sin, cos);
  if (positions) {
    bool fits = positions->dim() == q.dim() - 2 && positions->get_device_index() == q.get_device_index() &&
                (positions->scalar_type() == ScalarType::Int || positions->scalar_type() == ScalarType::Long);
    for (int64_t d = 0; fits && d < positions->dim(); d++) fits = positions->size(d) == q.size(d);
    STD_TORCH_CHECK(fits, "fastprimer: positions: expected int32 or int64 (B, S) or (N,) on q's device");
  } else {
    STD_TORCH_CHECK(cos.size(0) >= q.size(q.dim() - 3), "fastprimer: cos: expected a row for every position");
  }
}

template <class Device>
std::tuple<Tensor, Tensor> rotate(const Tensor& q_, const std::optional<Tensor>& k_, const Tensor& cos_, const Tensor& sin_,
                                  const std::optional<Tensor>& positions, bool interleaved, bool inverse) {
  check_arguments(q_, k_, cos_, sin_, positions);
  const On<Device> on(q_);
  const Tensor q = with_adjacent_features(q_), k = k_ ? with_adjacent_features(*k_) : q;
  const Rows cos(cos_), sin(sin_);
  Tensor q_rotated = empty(q, q.sizes(), q.scalar_type());
  Tensor k_rotated = empty(q, k_ ? k.sizes() : NOTHING, q.scalar_type());
  if (q_rotated.numel() + k_rotated.numel() == 0) return {q_rotated, k_rotated};
  const bool packed = q.dim() == 3;
  check(rope(on.device, {.q = heads_of(q, q_rotated),
                         .k = k_ ? heads_of(k, k_rotated) : RopeHeads{},
                         .cos = cos.data(),
                         .stride_cos_row = cos.stride_row,
                         .sin = sin.data(),
                         .stride_sin_row = sin.stride_row,
                         .positions = positions ? positions->const_data_ptr() : nullptr,
                         .stride_positions_batch = positions && !packed ? positions->stride(0) : 0,
                         .stride_positions_token = positions ? positions->stride(packed ? 0 : 1) : 0,
                         .positions_are_64_bit = positions && positions->scalar_type() == ScalarType::Long,
                         .B = packed ? 1 : q.size(0),
                         .S = q.size(q.dim() - 3),
                         .D = q.size(q.dim() - 1),
                         .R = 2 * cos.C,
                         .P = cos_.size(0),
                         .dtype = dtype_of(q),
                         .table_dtype = dtype_of(cos_),
                         .interleaved = interleaved,
                         .inverse = inverse}),
        "rope");
  return {q_rotated, k_rotated};
}

template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& q, std::optional<Tensor> k, const Tensor& cos, const Tensor& sin,
                                   std::optional<Tensor> positions, bool interleaved) {
  return rotate<Device>(q, k, cos, sin, positions, interleaved, false);
}

template <class Device>
std::tuple<Tensor, Tensor> backward(const Tensor& dq, std::optional<Tensor> dk, const Tensor& cos, const Tensor& sin,
                                    std::optional<Tensor> positions, bool interleaved) {
  return rotate<Device>(dq, dk, cos, sin, positions, interleaved, true);
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_IMPL(Device, m) {
  m.impl("rope_forward", TORCH_BOX(&fastprimer::forward<Device>));
  m.impl("rope_backward", TORCH_BOX(&fastprimer::backward<Device>));
}
