// Routing: tensors in, tensors out. Reads the strides of the logits, and calls the kernels of the tensors' device.
#include "routing.h"

#include <tuple>

#include "tensor.h"

namespace fastprimer {
namespace {

Weighting weighting_of(int64_t score, bool renormalize, double scale) {
  STD_TORCH_CHECK(score >= 0 && score <= 2, "fastprimer: score: expected a number in 0..2");
  return {static_cast<Score>(score), renormalize, scale};
}

void check_logits(const Tensor& logits, int64_t K) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "fastprimer: logits: expected shape (N, E)");
  STD_TORCH_CHECK(K >= 1 && K <= logits.size(1), "fastprimer: k: expected a number in 1..E");
}

template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& logits_, int64_t K, int64_t score, bool renormalize, std::optional<Tensor> bias_,
                                   Integer groups_, Integer top_groups_, double scale) {
  check_logits(logits_, K);
  const On<Device> on(logits_);
  const Rows logits(logits_);
  const int64_t N = logits.N, E = logits.C, groups = groups_.value_or(1), top_groups = top_groups_.value_or(1);
  STD_TORCH_CHECK(groups > 0 && E % groups == 0 && top_groups > 0 && top_groups <= groups && K <= top_groups * (E / groups),
                  "fastprimer: groups: expected a divisor of E, and k experts in top_groups of them");
  if (bias_) {
    check_shape("bias", *bias_, {E});
    STD_TORCH_CHECK(bias_->get_device_index() == logits_.get_device_index(), "fastprimer: bias: expected logits' device");
  }
  const std::optional<Tensor> bias = as(wide(logits_), bias_);
  Tensor weights = empty(logits_, {N, K}, wide(logits_)), experts = empty(logits_, {N, K}, ScalarType::Long);
  if (N == 0) return {weights, experts};
  check(route_forward(on.device, {.logits = logits.data(),
                                  .stride_logits_row = logits.stride_row,
                                  .bias = bias ? bias->const_data_ptr() : nullptr,
                                  .weights = weights.mutable_data_ptr(),
                                  .experts = static_cast<int64_t*>(experts.mutable_data_ptr()),
                                  .N = N,
                                  .E = E,
                                  .K = K,
                                  .groups = groups,
                                  .top_groups = top_groups,
                                  .weighting = weighting_of(score, renormalize, scale),
                                  .dtype = dtype_of(logits_)}),
        "route_forward");
  return {weights, experts};
}

template <class Device>
Tensor backward(const Tensor& dweights_, const Tensor& logits_, const Tensor& experts_, int64_t score, bool renormalize, double scale) {
  STD_TORCH_CHECK(experts_.dim() == 2, "fastprimer: experts: expected shape (N, K)");
  check_logits(logits_, experts_.size(1));
  const On<Device> on(logits_);
  const Rows logits(logits_);
  const int64_t N = logits.N, E = logits.C, K = experts_.size(1);
  check_shape("experts", experts_, {N, K});
  check_on("experts", experts_, ScalarType::Long, logits_);
  check_shape("dweights", dweights_, {N, K});
  check_on("dweights", dweights_, wide(logits_), logits_);
  const Tensor dweights = torch::stable::contiguous(dweights_), experts = torch::stable::contiguous(experts_);
  check_numbers<Device>("experts", experts, E);
  Tensor dlogits = empty(logits_, {N, E}, logits_.scalar_type());
  if (N == 0) return dlogits;
  check(route_backward(on.device, {.dweights = dweights.const_data_ptr(),
                                   .logits = logits.data(),
                                   .stride_logits_row = logits.stride_row,
                                   .experts = static_cast<const int64_t*>(experts.const_data_ptr()),
                                   .dlogits = dlogits.mutable_data_ptr(),
                                   .N = N,
                                   .E = E,
                                   .K = K,
                                   .weighting = weighting_of(score, renormalize, scale),
                                   .dtype = dtype_of(logits_)}),
        "route_backward");
  return dlogits;
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_IMPL(Device, m) {
  m.impl("route_forward", TORCH_BOX(&fastprimer::forward<Device>));
  m.impl("route_backward", TORCH_BOX(&fastprimer::backward<Device>));
}
