// Matrix products by the library of the tensors' device, through torch's dispatcher.
#pragma once
#include <array>

#include "tensor.h"

namespace fastprimer {

// What an operator calls is no part of anyone's graph, even where its inputs ask for a gradient.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

template <class... Arguments>
void call_aten(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // `out` once more: owned, so given back
}

// out = a b, summed in float32 as the library sees fit. `out` has the factors' dtype, or float32; any may be transposed.
inline void product(const Tensor& a, const Tensor& b, Tensor out) {
  const NoGrad no_grad;
  if (a.scalar_type() == out.scalar_type() && (!a.is_cpu() || a.scalar_type() == ScalarType::Float)) {
    call_aten("aten::mm", "out", a, b, out);
  } else if (!a.is_cpu()) {
    call_aten("aten::mm", "dtype_out", a, b, out.scalar_type(), out);
  } else {  // in the emulator: on the CPU torch has no product of 16 bits whose result is float32
    Tensor wide = empty(out, out.sizes(), ScalarType::Float);
    call_aten("aten::mm", "out", as(ScalarType::Float, a), as(ScalarType::Float, b), wide);
    torch::stable::copy_(out, wide);
  }
}

}  // namespace fastprimer
