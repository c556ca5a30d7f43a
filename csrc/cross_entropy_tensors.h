// What the bindings of both cross-entropies read and make: options, targets, outputs, upstream gradients.
#pragma once
#include "cross_entropy.h"
#include "tensor.h"

namespace fastprimer {

inline LossOptions options_of(int64_t ignore_index, double label_smoothing, double z_loss, std::optional<double> softcap) {
  return {.ignore_index = ignore_index, .label_smoothing = label_smoothing, .z_loss = z_loss, .softcap = softcap_of(softcap)};
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

// loss, lse and its correction, and argmax, to be written.
struct Outputs {
  Tensor loss, lse, correction, argmax;

  Outputs(const Tensor& like, int64_t N)
      : loss(empty(like, {N}, wide(like))),
        lse(empty(like, {N}, wide(like))),
        correction(empty(like, {N}, wide(like))),
        argmax(empty(like, {N}, ScalarType::Long)) {}

  LossOutputs pointers() {
    return {loss.mutable_data_ptr(), lse.mutable_data_ptr(), correction.mutable_data_ptr(),
            static_cast<int64_t*>(argmax.mutable_data_ptr())};
  }
};

// What arrives from above and from forward, without gaps.
struct Upstream {
  Tensor dloss;
  std::optional<Tensor> dlse;
  Tensor lse, correction;

  Upstream(const Tensor& dloss_, const std::optional<Tensor>& dlse_, const Tensor& lse_, const Tensor& correction_, const Tensor& like,
           int64_t N)
      : dloss(contiguous("dloss", dloss_, like, N)),
        lse(contiguous("lse", lse_, like, N)),
        correction(contiguous("correction", correction_, like, N)) {
    if (dlse_) dlse = contiguous("dlse", *dlse_, like, N);
  }

  LossGradients pointers() const {
    return {dloss.const_data_ptr(), data_of<void>(dlse), lse.const_data_ptr(), correction.const_data_ptr()};
  }

 private:
  static Tensor contiguous(const char* name, const Tensor& t, const Tensor& like, int64_t N) {
    check_shape(name, t, {N});
    check_on(name, t, wide(like), like);
    return torch::stable::contiguous(t);
  }
};

}  // namespace fastprimer
