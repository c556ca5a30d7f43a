// Cross-entropy fused with the projection: tensors in, tensors out. Reads strides, checks targets, and calls the kernels of the tensors'
// device, on a GPU piece by piece.
#include <tuple>

#include "cross_entropy_pieces.h"
#include "cross_entropy_tensors.h"

namespace fastprimer {
namespace {

// The inputs of the fused operation as its kernels read them, and the tensors that hold what had to be copied.
struct Linear {
  Rows x, weight;
  Tensor target;
  std::optional<Tensor> bias;
  LinearCrossEntropyProblem problem;

  bool empty() const { return x.N == 0 || x.C == 0; }
};

// keeps_16_bits of the chapter.
bool keeps_16_bits(const Tensor& x, const std::optional<Tensor>& bias, double softcap) {
  const auto small = [](const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half; };
  return small(x) && (!bias || small(*bias)) && softcap == 0;
}

// kept_columns of the chapter.
int64_t kept_columns(const LinearCrossEntropyProblem& p, int64_t N, int64_t memory_budget) {
  const auto bytes = [&p](int64_t columns) { return p.in_16_bits ? 2 * columns + 4 * kept_blocks(columns) : 4 * columns; };
  const int64_t room = memory_budget / (N > 1 ? N : 1);
  return room >= bytes(p.V) ? p.V : room / bytes(256) * 256;
}

ScalarType kept_type(const LinearCrossEntropyProblem& p) { return p.in_16_bits ? ScalarType::Short : ScalarType::Float; }

template <class Device>
Linear linear_of(const Tensor& x, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
                 const LossOptions& options) {
  STD_TORCH_CHECK(x.dim() == 2, "fastprimer: x: expected shape (N, C)");
  check_kind("weight", weight, x);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == x.size(1), "fastprimer: weight: expected shape (V, C)");
  if (bias) {
    check_shape("bias", *bias, {weight.size(0)});
    STD_TORCH_CHECK(bias->get_device_index() == x.get_device_index(), "fastprimer: bias: expected x's device");
  }
  Linear in = {.x = Rows(x),
               .weight = Rows(weight),
               .target = targets<Device>(target, x, x.size(0), weight.size(0), options.ignore_index),
               .bias = as(ScalarType::Float, bias),
               .problem = {}};
  in.problem = {.x = in.x.data(),
                .stride_x_row = in.x.stride_row,
                .weight = in.weight.data(),
                .stride_weight_row = in.weight.stride_row,
                .bias = data_of<float>(in.bias),
                .target = static_cast<const int64_t*>(in.target.const_data_ptr()),
                .N = in.x.N,
                .C = in.x.C,
                .V = in.weight.N,
                .dtype = dtype_of(x),
                .options = options,
                .columns = 0,
                .in_16_bits = keeps_16_bits(x, bias, options.softcap)};
  return in;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                                          std::optional<Tensor> bias, int64_t ignore_index,
                                                                          double label_smoothing, double z_loss,
                                                                          std::optional<double> softcap, int64_t memory_budget) {
  STD_TORCH_CHECK(memory_budget >= 0, "fastprimer: memory_budget: expected a number >= 0");
  const On<Device> on(x);
  Linear in = linear_of<Device>(x, weight, target, bias, options_of(ignore_index, label_smoothing, z_loss, softcap));
  STD_TORCH_CHECK(x.size(1) > 0, "fastprimer: x: expected shape (N, C), C >= 1");
  in.problem.columns = kept_columns(in.problem, x.size(0), memory_budget);
  Outputs outputs(x, in.x.N);
  Tensor kept = empty(x, {in.x.N, in.problem.columns}, kept_type(in.problem));
  Tensor shift = empty(x, {in.x.N, in.problem.in_16_bits ? kept_blocks(in.problem.columns) : 0}, ScalarType::Float);
  if (in.x.N == 0) return {outputs.loss, outputs.lse, outputs.correction, outputs.argmax, kept, shift};
  if constexpr (std::is_same_v<Device, Cuda>) {
    forward_by_pieces(on.device, in.problem, in.x.tensor, in.weight.tensor, outputs.pointers(), kept, shift);
  } else {
    check(linear_cross_entropy_forward(on.device, {.problem = in.problem,
                                                   .outputs = outputs.pointers(),
                                                   .kept = kept.mutable_data_ptr(),
                                                   .shift = static_cast<float*>(shift.mutable_data_ptr())}),
          "linear_cross_entropy_forward");
  }
  return {outputs.loss, outputs.lse, outputs.correction, outputs.argmax, kept, shift};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dloss, std::optional<Tensor> dlse, const Tensor& x, const Tensor& weight,
                                                   const Tensor& target, const Tensor& lse, const Tensor& correction, const Tensor& kept_,
                                                   const Tensor& shift_, std::optional<Tensor> bias, int64_t ignore_index,
                                                   double label_smoothing, double z_loss, std::optional<double> softcap, bool needs_dx,
                                                   bool needs_dweight) {
  const On<Device> on(x);
  Linear in = linear_of<Device>(x, weight, target, bias, options_of(ignore_index, label_smoothing, z_loss, softcap));
  const int64_t V = weight.size(0);
  const Upstream upstream(dloss, dlse, lse, correction, x, in.x.N);
  STD_TORCH_CHECK(kept_.dim() == 2 && kept_.size(0) == in.x.N && (kept_.size(1) == V || (kept_.size(1) < V && kept_.size(1) % 256 == 0)),
                  "fastprimer: kept: expected shape (N, columns)");
  check_on("kept", kept_, kept_type(in.problem), x);
  in.problem.columns = kept_.size(1);
  check_shape("shift", shift_, {in.x.N, in.problem.in_16_bits ? kept_blocks(in.problem.columns) : 0});
  check_on("shift", shift_, ScalarType::Float, x);
  const Tensor kept = torch::stable::contiguous(kept_), shift = torch::stable::contiguous(shift_);
  Tensor dx = empty(x, needs_dx ? x.sizes() : NOTHING, x.scalar_type());
  Tensor dweight = empty(x, needs_dweight ? weight.sizes() : NOTHING, x.scalar_type());
  Tensor dbias = empty(x, bias ? bias->sizes() : NOTHING, ScalarType::Float);
  float* dbias_data = bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
  if (in.empty()) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  } else if constexpr (std::is_same_v<Device, Cuda>) {
    BackwardByPieces(on.device, in.problem, in.weight.tensor, upstream.pointers(), kept, shift, needs_dx ? &dx : nullptr,
                     needs_dweight ? &dweight : nullptr, dbias_data)
        .run();
  } else {
    check(linear_cross_entropy_backward(on.device, {.problem = in.problem,
                                                    .gradients = upstream.pointers(),
                                                    .kept = kept.const_data_ptr(),
                                                    .shift = static_cast<const float*>(shift.const_data_ptr()),
                                                    .dx = needs_dx ? dx.mutable_data_ptr() : nullptr,
                                                    .dweight = needs_dweight ? dweight.mutable_data_ptr() : nullptr,
                                                    .dbias = dbias_data}),
          "linear_cross_entropy_backward");
  }
  return {dx, dweight, as(bias ? bias->scalar_type() : x.scalar_type(), dbias)};
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_IMPL(Device, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&fastprimer::linear_forward<Device>));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&fastprimer::linear_backward<Device>));
}

STABLE_TORCH_LIBRARY_IMPL(FASTPRIMER_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("set_loss_piece_bytes", TORCH_BOX(&fastprimer::set_piece_bytes));
}
