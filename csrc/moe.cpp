// Mixture of experts: tensors in, tensors out. Reads the strides of tokens and weights, and calls the kernels of the tensors' device.
#include "moe.h"

#include <tuple>

#include "tensor.h"

namespace fastprimer {
namespace {

// The inputs as the kernels read them, and the tensors that hold what had to be copied.
struct Inputs {
  Rows x;
  Tensor gate_up, down, weights, experts;
  MoeProblem problem;

  bool empty() const { return problem.N == 0 || problem.C == 0 || problem.F == 0 || problem.K == 0; }
};

void check_shapes(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& weights, const Tensor& experts) {
  STD_TORCH_CHECK(x.dim() == 2, "fastprimer: x: expected shape (N, C)");
  check_kind("gate_up", gate_up, x);
  check_kind("down", down, x);
  STD_TORCH_CHECK(gate_up.dim() == 3 && gate_up.size(0) > 0 && gate_up.size(1) % 2 == 0 && gate_up.size(2) == x.size(1),
                  "fastprimer: gate_up: expected shape (E, 2F, C)");
  check_shape("down", down, {gate_up.size(0), x.size(1), gate_up.size(1) / 2});
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == x.size(0) && weights.get_device_index() == x.get_device_index(),
                  "fastprimer: weights: expected shape (N, K), on x's device");
  check_shape("experts", experts, weights.sizes());
  STD_TORCH_CHECK((experts.scalar_type() == ScalarType::Int || experts.scalar_type() == ScalarType::Long) &&
                      experts.get_device_index() == x.get_device_index(),
                  "fastprimer: experts: expected int32 or int64, on x's device");
}

template <class Device>
Inputs inputs_of(const Tensor& x_, const Tensor& gate_up_, const Tensor& down_, const Tensor& weights_, const Tensor& experts_) {
  check_shapes(x_, gate_up_, down_, weights_, experts_);
  Inputs in = {.x = Rows(x_),
               .gate_up = with_adjacent_features(gate_up_),
               .down = with_adjacent_features(down_),
               .weights = as(ScalarType::Float, weights_),
               .experts = as(ScalarType::Long, experts_),
               .problem = {}};
  check_numbers<Device>("experts", in.experts, in.gate_up.size(0));
  in.problem = {.x = in.x.data(),
                .stride_x_row = in.x.stride_row,
                .gate_up = in.gate_up.const_data_ptr(),
                .stride_gate_up_expert = in.gate_up.stride(0),
                .stride_gate_up_row = in.gate_up.stride(1),
                .down = in.down.const_data_ptr(),
                .stride_down_expert = in.down.stride(0),
                .stride_down_row = in.down.stride(1),
                .weights = static_cast<const float*>(in.weights.const_data_ptr()),
                .experts = static_cast<const int64_t*>(in.experts.const_data_ptr()),
                .N = in.x.N,
                .C = in.x.C,
                .F = in.down.size(2),
                .E = in.down.size(0),
                .K = in.weights.size(1),
                .dtype = dtype_of(x_)};
  return in;
}

Tensor zeros_like(const Tensor& t) {
  Tensor zeros = empty(t, t.sizes(), t.scalar_type());
  return torch::stable::zero_(zeros);
}

template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& weights,
                                   const Tensor& experts) {
  const On<Device> on(x);
  const Inputs in = inputs_of<Device>(x, gate_up, down, weights, experts);
  const MoeProblem& p = in.problem;
  Tensor hidden = empty(x, {p.N, p.K, 2 * p.F}, x.scalar_type());
  if (in.empty()) return {zeros_like(x), hidden};
  Tensor y = empty(x, x.sizes(), x.scalar_type()), scratch = empty(x, {moe_forward_scratch(on.device, p)}, ScalarType::Byte);
  check(moe_forward(on.device,
                    {.problem = p, .hidden = hidden.mutable_data_ptr(), .y = y.mutable_data_ptr(), .scratch = scratch.mutable_data_ptr()}),
        "moe_forward");
  return {y, hidden};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy_, const Tensor& x, const Tensor& gate_up, const Tensor& down,
                                                    const Tensor& weights, const Tensor& experts, const Tensor& hidden_, bool needs_dx,
                                                    bool needs_dexperts) {
  const On<Device> on(x);
  const Inputs in = inputs_of<Device>(x, gate_up, down, weights, experts);
  const MoeProblem& p = in.problem;
  check_like("dy", dy_, x);
  check_shape("hidden", hidden_, {p.N, p.K, 2 * p.F});
  check_kind("hidden", hidden_, x);
  Tensor dx = empty(x, needs_dx ? x.sizes() : NOTHING, x.scalar_type());
  Tensor dgate_up = empty(x, needs_dexperts ? gate_up.sizes() : NOTHING, x.scalar_type());
  Tensor ddown = empty(x, needs_dexperts ? down.sizes() : NOTHING, x.scalar_type());
  if (in.empty()) return {torch::stable::zero_(dx), torch::stable::zero_(dgate_up), torch::stable::zero_(ddown), zeros_like(weights)};
  const Rows dy(dy_);
  const Tensor hidden = torch::stable::contiguous(hidden_);
  Tensor dweights = empty(x, weights.sizes(), ScalarType::Float);
  Tensor scratch = empty(x, {moe_backward_scratch(on.device, p)}, ScalarType::Byte);
  check(moe_backward(on.device, {.problem = p,
                                 .dy = dy.data(),
                                 .stride_dy_row = dy.stride_row,
                                 .hidden = hidden.const_data_ptr(),
                                 .dx = needs_dx ? dx.mutable_data_ptr() : nullptr,
                                 .dgate_up = needs_dexperts ? dgate_up.mutable_data_ptr() : nullptr,
                                 .ddown = needs_dexperts ? ddown.mutable_data_ptr() : nullptr,
                                 .dweights = static_cast<float*>(dweights.mutable_data_ptr()),
                                 .scratch = scratch.mutable_data_ptr()}),
        "moe_backward");
  return {dx, dgate_up, ddown, as(weights.scalar_type(), dweights)};
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_IMPL(Device, m) {
  m.impl("moe_forward", TORCH_BOX(&fastprimer::forward<Device>));
  m.impl("moe_backward", TORCH_BOX(&fastprimer::backward<Device>));
}
