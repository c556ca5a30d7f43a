// SwiGLU: tensors in, tensors out. Finds the two halves, folds strides, and calls the kernels of the tensors' device.
#include "swiglu.h"

#include <limits>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace fastprimer {
namespace {

// gate and up as rows, be they two tensors or the halves of one.
struct Halves {
  Rows gate;
  std::optional<Rows> separate_up;
  int64_t F;

  Halves(const Tensor& gate_, const std::optional<Tensor>& up_)
      : gate(gate_), separate_up(rows_or_none(up_)), F(up_ ? gate.C : gate.C / 2) {}

  const void* up() const {
    return separate_up ? separate_up->data() : static_cast<const char*>(gate.data()) + F * gate.tensor.element_size();
  }
  int64_t stride_up_row() const { return separate_up ? separate_up->stride_row : gate.stride_row; }

  // Of y and dy: gate's with F in the end.
  std::vector<int64_t> shape() const {
    std::vector<int64_t> sizes(gate.tensor.sizes().begin(), gate.tensor.sizes().end());
    if (!separate_up) sizes.back() = F;
    return sizes;
  }
};

void check_halves(const Tensor& gate, const std::optional<Tensor>& up) {
  check_like("up", up, gate);
  STD_TORCH_CHECK(up || (gate.dim() > 0 && gate.size(gate.dim() - 1) % 2 == 0), "fastprimer: gate: expected shape (..., 2F) without up");
}

Activation activation_of(double alpha, double beta, std::optional<double> limit, double offset) {
  return {alpha, beta, limit.value_or(std::numeric_limits<double>::infinity()), offset};
}

// Rows without gaps between them, in any tensor, are one long row.
template <class Arguments>
void join_rows(Arguments& args, std::initializer_list<int64_t*> strides) {
  for (const int64_t* stride : strides)
    if (*stride != args.F) return;
  args.F *= args.N;
  args.N = 1;
  for (int64_t* stride : strides) *stride = args.F;
}

template <class Device>
Tensor forward(const Tensor& gate_, std::optional<Tensor> up_, double alpha, double beta, std::optional<double> limit, double offset) {
  check_halves(gate_, up_);
  const On<Device> on(gate_);
  const Halves halves(gate_, up_);
  Tensor y = empty(gate_, halves.shape(), gate_.scalar_type());
  if (y.numel() == 0) return y;
  SwiGluForward args = {.gate = halves.gate.data(),
                        .stride_gate_row = halves.gate.stride_row,
                        .up = halves.up(),
                        .stride_up_row = halves.stride_up_row(),
                        .y = y.mutable_data_ptr(),
                        .N = halves.gate.N,
                        .F = halves.F,
                        .dtype = dtype_of(gate_),
                        .activation = activation_of(alpha, beta, limit, offset)};
  join_rows(args, {&args.stride_gate_row, &args.stride_up_row});
  check(swiglu_forward(on.device, args), "swiglu_forward");
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor> backward(const Tensor& dy_, const Tensor& gate_, std::optional<Tensor> up_, double alpha, double beta,
                                    std::optional<double> limit, double offset) {
  check_halves(gate_, up_);
  const On<Device> on(gate_);
  const Halves halves(gate_, up_);
  check_shape("dy", dy_, halves.shape());
  check_kind("dy", dy_, gate_);
  const Rows dy(dy_);
  Tensor dgate = empty(gate_, gate_.sizes(), gate_.scalar_type());
  Tensor dup = empty(gate_, up_ ? gate_.sizes() : NOTHING, gate_.scalar_type());
  if (dgate.numel() == 0) return {dgate, dup};
  char* dgate_data = static_cast<char*>(dgate.mutable_data_ptr());
  SwiGluBackward args = {.dy = dy.data(),
                         .stride_dy_row = dy.stride_row,
                         .gate = halves.gate.data(),
                         .stride_gate_row = halves.gate.stride_row,
                         .up = halves.up(),
                         .stride_up_row = halves.stride_up_row(),
                         .dgate = dgate_data,
                         .stride_dgate_row = halves.gate.C,
                         .dup = up_ ? dup.mutable_data_ptr() : dgate_data + halves.F * gate_.element_size(),
                         .stride_dup_row = halves.gate.C,
                         .N = halves.gate.N,
                         .F = halves.F,
                         .dtype = dtype_of(gate_),
                         .activation = activation_of(alpha, beta, limit, offset)};
  join_rows(args, {&args.stride_dy_row, &args.stride_gate_row, &args.stride_up_row, &args.stride_dgate_row, &args.stride_dup_row});
  check(swiglu_backward(on.device, args), "swiglu_backward");
  return {dgate, dup};
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_IMPL(Device, m) {
  m.impl("swiglu_forward", TORCH_BOX(&fastprimer::forward<Device>));
  m.impl("swiglu_backward", TORCH_BOX(&fastprimer::backward<Device>));
}
