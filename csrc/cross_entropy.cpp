// Cross-entropy: tensors in, tensors out. Reads strides, checks targets, and calls the kernels of the tensors' device.
#include "cross_entropy.h"

#include <tuple>

#include "tensor.h"

namespace fastprimer {
namespace {

LossOptions options_of(int64_t ignore_index, double label_smoothing, double z_loss, std::optional<double> softcap) {
  return {.ignore_index = ignore_index, .label_smoothing = label_smoothing, .z_loss = z_loss, .softcap = softcap.value_or(0)};
}

// The targets of N tokens as int64.
template <class Device>
Tensor targets(const Tensor& target, const Tensor& like, int64_t N, int64_t V, int64_t ignore_index) {
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == N &&
                      (target.scalar_type() == ScalarType::Int || target.scalar_type() == ScalarType::Long) &&
                      target.get_device_index() == like.get_device_index(),
                  "fastprimer: target: expected shape (N,), int32 or int64, on the device of the tokens");
  Tensor numbers = as(ScalarType::Long, target);
  if constexpr (std::is_same_v<Device, Cpu>) {
    const auto* t = static_cast<const int64_t*>(numbers.const_data_ptr());
    bool fits = true;
    for (int64_t i = 0; i < N; i++) fits = fits && (t[i] == ignore_index || (0 <= t[i] && t[i] < V));
    STD_TORCH_CHECK(fits, "fastprimer: target: expected numbers in 0..", V - 1, " or ignore_index");
  }
  return numbers;
}

// loss, lse and argmax, to be written.
struct Outputs {
  Tensor loss, lse, argmax;

  Outputs(const Tensor& like, int64_t N)
      : loss(empty(like, {N}, wide(like))), lse(empty(like, {N}, wide(like))), argmax(empty(like, {N}, ScalarType::Long)) {}

  LossOutputs pointers() { return {loss.mutable_data_ptr(), lse.mutable_data_ptr(), static_cast<int64_t*>(argmax.mutable_data_ptr())}; }
};

// What arrives from above, without gaps.
struct Upstream {
  Tensor dloss;
  std::optional<Tensor> dlse;
  Tensor lse;

  Upstream(const Tensor& dloss_, const std::optional<Tensor>& dlse_, const Tensor& lse_, const Tensor& like, int64_t N)
      : dloss(contiguous("dloss", dloss_, like, N)), lse(contiguous("lse", lse_, like, N)) {
    if (dlse_) dlse = contiguous("dlse", *dlse_, like, N);
  }

  LossGradients pointers() const { return {dloss.const_data_ptr(), data_of<void>(dlse), lse.const_data_ptr()}; }

 private:
  static Tensor contiguous(const char* name, const Tensor& t, const Tensor& like, int64_t N) {
    check_shape(name, t, {N});
    check_on(name, t, wide(like), like);
    return torch::stable::contiguous(t);
  }
};

CrossEntropyProblem problem_of(const Tensor& like, const Rows& logits, const Tensor& target, const LossOptions& options) {
  return {.logits = logits.data(),
          .stride_logits_row = logits.stride_row,
          .target = static_cast<const int64_t*>(target.const_data_ptr()),
          .N = logits.N,
          .V = logits.C,
          .dtype = dtype_of(like),
          .options = options};
}

void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "fastprimer: logits: expected shape (N, V)");
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target_, int64_t ignore_index, double label_smoothing,
                                           double z_loss, std::optional<double> softcap) {
  check_logits(logits);
  const On<Device> on(logits);
  const Rows rows(logits);
  const Tensor target = targets<Device>(target_, logits, rows.N, rows.C, ignore_index);
  Outputs outputs(logits, rows.N);
  if (rows.N > 0) {
    const CrossEntropyProblem problem = problem_of(logits, rows, target, options_of(ignore_index, label_smoothing, z_loss, softcap));
    check(cross_entropy_forward(on.device, {.problem = problem, .outputs = outputs.pointers()}), "cross_entropy_forward");
  }
  return {outputs.loss, outputs.lse, outputs.argmax};
}

template <class Device>
Tensor backward(const Tensor& dloss, std::optional<Tensor> dlse, const Tensor& logits, const Tensor& target_, const Tensor& lse,
                int64_t ignore_index, double label_smoothing, double z_loss, std::optional<double> softcap) {
  check_logits(logits);
  const On<Device> on(logits);
  const Rows rows(logits);
  const Tensor target = targets<Device>(target_, logits, rows.N, rows.C, ignore_index);
  const Upstream upstream(dloss, dlse, lse, logits, rows.N);
  Tensor dlogits = empty(logits, logits.sizes(), logits.scalar_type());
  if (rows.N > 0) {
    const CrossEntropyProblem problem = problem_of(logits, rows, target, options_of(ignore_index, label_smoothing, z_loss, softcap));
    check(cross_entropy_backward(on.device, {.problem = problem, .gradients = upstream.pointers(), .dlogits = dlogits.mutable_data_ptr()}),
          "cross_entropy_backward");
  }
  return dlogits;
}

// The inputs of the fused operation as its kernels read them, and the tensors that hold what had to be copied.
struct Linear {
  Rows x, weight;
  Tensor target;
  std::optional<Tensor> bias;
  LinearCrossEntropyProblem problem;

  bool empty() const { return x.N == 0 || x.C == 0; }
};

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
                .columns = 0};
  return in;
}

// kept_columns of the chapter.
int64_t kept_columns(int64_t N, int64_t V, int64_t memory_budget) {
  const int64_t room = memory_budget / (4 * (N > 1 ? N : 1));
  return room >= V ? V : room / 256 * 256;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                          std::optional<Tensor> bias, int64_t ignore_index, double label_smoothing,
                                                          double z_loss, std::optional<double> softcap, int64_t memory_budget) {
  STD_TORCH_CHECK(memory_budget >= 0, "fastprimer: memory_budget: expected a number >= 0");
  const On<Device> on(x);
  Linear in = linear_of<Device>(x, weight, target, bias, options_of(ignore_index, label_smoothing, z_loss, softcap));
  STD_TORCH_CHECK(x.size(1) > 0, "fastprimer: x: expected shape (N, C), C >= 1");
  in.problem.columns = kept_columns(x.size(0), weight.size(0), memory_budget);
  Outputs outputs(x, in.x.N);
  Tensor kept = empty(x, {in.x.N, in.problem.columns}, ScalarType::Float);
  if (in.x.N > 0)
    check(linear_cross_entropy_forward(
              on.device, {.problem = in.problem, .outputs = outputs.pointers(), .kept = static_cast<float*>(kept.mutable_data_ptr())}),
          "linear_cross_entropy_forward");
  return {outputs.loss, outputs.lse, outputs.argmax, kept};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dloss, std::optional<Tensor> dlse, const Tensor& x, const Tensor& weight,
                                                   const Tensor& target, const Tensor& lse, const Tensor& kept_, std::optional<Tensor> bias,
                                                   int64_t ignore_index, double label_smoothing, double z_loss,
                                                   std::optional<double> softcap) {
  const On<Device> on(x);
  Linear in = linear_of<Device>(x, weight, target, bias, options_of(ignore_index, label_smoothing, z_loss, softcap));
  const int64_t V = weight.size(0);
  const Upstream upstream(dloss, dlse, lse, x, in.x.N);
  STD_TORCH_CHECK(kept_.dim() == 2 && kept_.size(0) == in.x.N && (kept_.size(1) == V || (kept_.size(1) < V && kept_.size(1) % 256 == 0)),
                  "fastprimer: kept: expected shape (N, columns)");
  check_on("kept", kept_, ScalarType::Float, x);
  const Tensor kept = torch::stable::contiguous(kept_);
  in.problem.columns = kept.size(1);
  Tensor dx = empty(x, x.sizes(), x.scalar_type()), dweight = empty(x, weight.sizes(), x.scalar_type());
  Tensor dbias = empty(x, bias ? bias->sizes() : NOTHING, ScalarType::Float);
  if (in.empty()) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  } else {
    check(linear_cross_entropy_backward(on.device, {.problem = in.problem,
                                                    .gradients = upstream.pointers(),
                                                    .kept = static_cast<const float*>(kept.const_data_ptr()),
                                                    .dx = dx.mutable_data_ptr(),
                                                    .dweight = dweight.mutable_data_ptr(),
                                                    .dbias = bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr}),
          "linear_cross_entropy_backward");
  }
  return {dx, dweight, as(bias ? bias->scalar_type() : x.scalar_type(), dbias)};
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_CPU_IMPL(Device, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fastprimer::forward<Device>));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastprimer::backward<Device>));
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&fastprimer::linear_forward<Device>));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&fastprimer::linear_backward<Device>));
}
