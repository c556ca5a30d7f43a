// RMSNorm: tensors in, tensors out. Allocates the outputs, folds strides, and calls the kernels of the tensors' device.
#include "rms_norm.h"

#include <tuple>

#include "tensor.h"

namespace fastprimer {
namespace {

template <class Device>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_, std::optional<Tensor> weight_, double eps, std::optional<Tensor> residual_,
                                           double weight_offset) {
  STD_TORCH_CHECK(x_.dim() > 0 && x_.size(x_.dim() - 1) > 0, "fastprimer: x: expected shape (..., C), C >= 1");
  check_weight(weight_, x_);
  check_like("residual", residual_, x_);
  const On<Device> on(x_);
  Rows x(x_);
  const auto residual = rows_or_none(residual_);
  const auto weight = rows_or_none(weight_);
  Tensor y = empty(x_, x_.sizes(), x_.scalar_type());
  Tensor h = empty(x_, residual ? x_.sizes() : NOTHING, x_.scalar_type());
  Tensor rstd = empty(x_, x_.sizes().slice(0, x_.dim() - 1), wide(x_));
  if (x.N > 0) {
    check(rms_norm_forward(on.device, {.x = x.data(),
                                       .stride_x_row = x.stride_row,
                                       .residual = data_or_null(residual),
                                       .stride_residual_row = stride_or_zero(residual),
                                       .weight = data_or_null(weight),
                                       .y = y.mutable_data_ptr(),
                                       .h = h.mutable_data_ptr(),
                                       .rstd = rstd.mutable_data_ptr(),
                                       .N = x.N,
                                       .C = x.C,
                                       .dtype = dtype_of(x_),
                                       .weight_dtype = weight ? dtype_of(*weight_) : dtype_of(x_),
                                       .eps = eps,
                                       .weight_offset = weight_offset}),
          "rms_norm_forward");
  }
  return {y, h, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor> backward(const Tensor& dy_, std::optional<Tensor> dh_, const Tensor& h_, std::optional<Tensor> weight_,
                                    const Tensor& rstd_, double weight_offset, bool needs_dweight) {
  STD_TORCH_CHECK(h_.dim() > 0 && h_.size(h_.dim() - 1) > 0, "fastprimer: h: expected shape (..., C), C >= 1");
  STD_TORCH_CHECK(rstd_.numel() * h_.size(h_.dim() - 1) == h_.numel(), "fastprimer: rstd: expected shape (...) of h (..., C)");
  check_on("rstd", rstd_, wide(h_), h_);
  check_weight(weight_, h_);
  check_like("dy", dy_, h_);
  check_like("dh", dh_, h_);
  const On<Device> on(h_);
  Rows dy(dy_), h(h_);
  const auto dh = rows_or_none(dh_);
  const auto weight = rows_or_none(weight_);
  const Tensor rstd = torch::stable::contiguous(rstd_);
  const bool dweight_wanted = weight && needs_dweight;
  const int64_t partials = dweight_wanted ? rms_norm_partials(on.device, h.N, h.C) : 0;
  Tensor dx = empty(h_, h_.sizes(), h_.scalar_type());
  Tensor partial = empty(h_, {partials, h.C}, wide(h_));
  Tensor dweight = empty(h_, {dweight_wanted ? h.C : 0}, weight ? weight_->scalar_type() : h_.scalar_type());
  if (h.N == 0) {
    torch::stable::zero_(dweight);
  } else {
    check(rms_norm_backward(on.device, {.dy = dy.data(),
                                        .stride_dy_row = dy.stride_row,
                                        .dh = data_or_null(dh),
                                        .stride_dh_row = stride_or_zero(dh),
                                        .h = h.data(),
                                        .stride_h_row = h.stride_row,
                                        .weight = data_or_null(weight),
                                        .rstd = rstd.const_data_ptr(),
                                        .dx = dx.mutable_data_ptr(),
                                        .dweight = dweight_wanted ? dweight.mutable_data_ptr() : nullptr,
                                        .partial = dweight_wanted ? partial.mutable_data_ptr() : nullptr,
                                        .partials = partials,
                                        .N = h.N,
                                        .C = h.C,
                                        .dtype = dtype_of(h_),
                                        .weight_dtype = weight ? dtype_of(*weight_) : dtype_of(h_),
                                        .weight_offset = weight_offset}),
          "rms_norm_backward");
  }
  return {dx, dweight};
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_IMPL(Device, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&fastprimer::forward<Device>));
  m.impl("rms_norm_backward", TORCH_BOX(&fastprimer::backward<Device>));
}
