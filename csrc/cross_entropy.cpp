// Cross-entropy: tensors in, tensors out. Reads strides, checks targets, and calls the kernels of the tensors' device.
#include "cross_entropy.h"

#include <tuple>

#include "cross_entropy_tensors.h"

namespace fastprimer {
namespace {

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
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target_, int64_t ignore_index,
                                                   double label_smoothing, double z_loss, std::optional<double> softcap) {
  check_logits(logits);
  const On<Device> on(logits);
  const Rows rows(logits);
  const Tensor target = targets<Device>(target_, logits, rows.N, rows.C, ignore_index);
  Outputs outputs(logits, rows.N);
  if (rows.N > 0) {
    const CrossEntropyProblem problem = problem_of(logits, rows, target, options_of(ignore_index, label_smoothing, z_loss, softcap));
    check(cross_entropy_forward(on.device, {.problem = problem, .outputs = outputs.pointers()}), "cross_entropy_forward");
  }
  return {outputs.loss, outputs.lse, outputs.correction, outputs.argmax};
}

template <class Device>
Tensor backward(const Tensor& dloss, std::optional<Tensor> dlse, const Tensor& logits, const Tensor& target_, const Tensor& lse,
                const Tensor& correction, int64_t ignore_index, double label_smoothing, double z_loss, std::optional<double> softcap) {
  check_logits(logits);
  const On<Device> on(logits);
  const Rows rows(logits);
  const Tensor target = targets<Device>(target_, logits, rows.N, rows.C, ignore_index);
  const Upstream upstream(dloss, dlse, lse, correction, logits, rows.N);
  Tensor dlogits = empty(logits, logits.sizes(), logits.scalar_type());
  if (rows.N > 0) {
    const CrossEntropyProblem problem = problem_of(logits, rows, target, options_of(ignore_index, label_smoothing, z_loss, softcap));
    check(cross_entropy_backward(on.device, {.problem = problem, .gradients = upstream.pointers(), .dlogits = dlogits.mutable_data_ptr()}),
          "cross_entropy_backward");
  }
  return dlogits;
}

}  // namespace
}  // namespace fastprimer

FASTPRIMER_IMPL(Device, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&fastprimer::forward<Device>));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastprimer::backward<Device>));
}
