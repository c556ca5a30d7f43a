// From torch tensors (libtorch's stable ABI) to what a kernel takes: element types, rows, devices and streams.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>

#include "cpu/memory.h"
#include "kernel.h"

#ifndef FASTPRIMER_NAMESPACE
#define FASTPRIMER_NAMESPACE fastprimer
#endif

namespace fastprimer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      STD_TORCH_CHECK(false, "fastprimer: no kernel for dtype ", torch::headeronly::toString(t.scalar_type()));
  }
  return Dtype::float32;
}

// The type of statistics and accumulators.
inline ScalarType wide(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// A new contiguous tensor on the device of `like`, by C functions: torch::stable::new_empty goes through the dispatcher's boxed call,
// which takes longer than a small kernel. The first function allocates by itself on a CPU; the second one calls torch's operator, which
// fills the memory with NaN where tests want that, as they do of the emulated kernels.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int32_t dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const auto dim = static_cast<int64_t>(sizes.size());
  AtenTensorHandle handle = nullptr;
#ifndef FASTPRIMER_EMULATED
  constexpr int64_t USUAL = 5;
  if (dim <= USUAL && !memory_is_poisoned()) {
    int32_t device_type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    int64_t strides[USUAL], stride = 1;
    for (int64_t d = dim - 1; d >= 0; d--) {
      strides[d] = stride;
      stride *= sizes[d] > 1 ? sizes[d] : 1;
    }
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dim, sizes.data(), strides, dtype_code, device_type, like.get_device_index(), &handle));
    return Tensor(handle);
  }
#endif
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), sizes.data(), dim, &dtype_code, nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

// The shape of an output that is absent.
constexpr int64_t ZERO[] = {0};
inline const torch::headeronly::IntHeaderOnlyArrayRef NOTHING(ZERO, 1);

// The operators check what the public functions promise, for they can be called without them: never a read out of bounds.
inline void check_shape(const char* name, const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; fits && d < t.dim(); d++) fits = t.size(d) == shape[d];
  STD_TORCH_CHECK(fits, "fastprimer: ", name, ": expected another shape");
}

inline void check_kind(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.get_device_index() == like.get_device_index(), "fastprimer: ", name,
                  ": expected dtype and device of its partner");
}

inline void check_like(const char* name, const std::optional<Tensor>& t, const Tensor& like) {
  if (!t) return;
  check_kind(name, *t, like);
  check_shape(name, *t, like.sizes());
}

inline void check_weight(const std::optional<Tensor>& weight, const Tensor& x) {
  if (!weight) return;
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == x.size(x.dim() - 1) && weight->get_device_index() == x.get_device_index() &&
                      (weight->scalar_type() == x.scalar_type() || weight->scalar_type() == ScalarType::Float),
                  "fastprimer: weight: expected shape (C,), x's dtype or float32, and x's device");
}

inline void check_on(const char* name, const Tensor& t, ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.get_device_index() == like.get_device_index(), "fastprimer: ", name,
                  ": expected another dtype or device");
}

// Integers that must be in 0..n-1; on a GPU nobody can tell without waiting for it, so kernels look themselves.
template <class Device>
inline void check_numbers(const char* name, const Tensor& numbers, int64_t n) {
  if constexpr (std::is_same_v<Device, Cpu>) {
    const auto* values = static_cast<const int64_t*>(numbers.const_data_ptr());
    bool fits = true;
    for (int64_t i = 0; i < numbers.numel(); i++) fits = fits && 0 <= values[i] && values[i] < n;
    STD_TORCH_CHECK(fits, "fastprimer: ", name, ": expected numbers in 0..", n - 1);
  }
}

using Integer = std::optional<int64_t>;

// t itself, if it is contiguous and of that dtype; otherwise its copy.
inline Tensor as(ScalarType dtype, const Tensor& t) {
  if (t.scalar_type() == dtype) return torch::stable::contiguous(t);
  Tensor converted = empty(t, t.sizes(), dtype);
  return torch::stable::copy_(converted, t);
}

inline std::optional<Tensor> as(ScalarType dtype, const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return as(dtype, *t);
}

template <class T>
const T* data_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// A tensor (..., C) seen as N rows of C adjacent numbers; a scalar is one row of one. Views whose leading dimensions fold into one stride
// are read in place; any other is copied once.
struct Rows {
  Tensor tensor;
  int64_t N, C, stride_row;

  explicit Rows(const Tensor& t) : tensor(t), N(1), C(t.dim() > 0 ? t.size(t.dim() - 1) : 1), stride_row(C) {
    for (int64_t d = 0; d + 1 < t.dim(); d++) N *= t.size(d);
    if (!fold()) {
      tensor = torch::stable::contiguous(t);
      stride_row = C;
    }
  }

  const void* data() const { return tensor.const_data_ptr(); }

 private:
  bool fold() {
    if (N == 0 || C == 0) return true;
    if (C > 1 && tensor.stride(tensor.dim() - 1) != 1) return false;
    int64_t inner = 0, count = 1;  // of the dimensions folded so far: how far apart their rows are, and how many rows
    for (int64_t d = tensor.dim() - 2; d >= 0; d--) {
      if (tensor.size(d) == 1) continue;
      if (count == 1) {
        inner = tensor.stride(d);
      } else if (tensor.stride(d) != inner * count) {
        return false;
      }
      count *= tensor.size(d);
    }
    if (count > 1) stride_row = inner;
    return true;
  }
};

// A tensor (..., heads, D) with its features next to each other; otherwise copied once.
inline Tensor with_adjacent_features(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) == 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

inline const void* data_or_null(const std::optional<Rows>& rows) { return rows ? rows->data() : nullptr; }
inline int64_t stride_or_zero(const std::optional<Rows>& rows) { return rows ? rows->stride_row : 0; }

inline std::optional<Rows> rows_or_none(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return Rows(*t);
}

inline void check(Error error, const char* op) { STD_TORCH_CHECK(error == nullptr, "fastprimer: ", op, ": ", error); }

// Where a binding runs its kernels: makes the tensor's device current and finds its stream.
template <class Device>
struct On;

template <>
struct On<Cpu> {
  Cpu device;
  explicit On(const Tensor&) {}
};

#ifdef FASTPRIMER_EMULATED
template <>
struct On<Cuda> {
  Cuda device{nullptr};
  explicit On(const Tensor&) {}
};
#else
template <>
struct On<Cuda> {
  torch::stable::accelerator::DeviceGuard guard;
  Cuda device;
  explicit On(const Tensor& t) : guard(t.get_device_index()), device{current_stream(t.get_device_index())} {}

 private:
  // libtorch_cuda.so alone exports this. It is looked up at run time so that one library loads beside a CPU-only torch too.
  static void* current_stream(int32_t device_index) {
    using Function = int32_t (*)(int32_t, void**);
    static const Function function = [] {
      void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return torch_cuda ? reinterpret_cast<Function>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(function != nullptr, "fastprimer: this torch has no CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(function(device_index, &stream) == 0, "fastprimer: no current CUDA stream on device ", device_index);
    return stream;
  }
};
#endif

// 0: none.
inline double softcap_of(std::optional<double> softcap) {
  STD_TORCH_CHECK(!softcap || *softcap > 0, "fastprimer: softcap: expected a number > 0 or None");
  return softcap.value_or(0.0);
}

}  // namespace fastprimer

// Registers a binding, written once as a template on its device, for every dispatch key that this library serves:
//
//   the native library           CPU tensors -> Cpu, CUDA tensors -> Cuda (where it was built with CUDA)
//   the library of the emulator  CPU tensors -> Cuda: the CUDA kernels, compiled for and run on the CPU
#define FASTPRIMER_IMPL_KEY(key, type) \
  STABLE_TORCH_LIBRARY_IMPL(FASTPRIMER_NAMESPACE, key, m) { register_kernels<type>(m); }

#if defined(FASTPRIMER_EMULATED)
#define FASTPRIMER_IMPL_KEYS FASTPRIMER_IMPL_KEY(CPU, fastprimer::Cuda)
#elif defined(FASTPRIMER_CUDA)
#define FASTPRIMER_IMPL_KEYS FASTPRIMER_IMPL_KEY(CPU, fastprimer::Cpu) FASTPRIMER_IMPL_KEY(CUDA, fastprimer::Cuda)
#else
#define FASTPRIMER_IMPL_KEYS FASTPRIMER_IMPL_KEY(CPU, fastprimer::Cpu)
#endif

#define FASTPRIMER_IMPL(Device, m)                                       \
  template <class Device>                                                \
  static void register_kernels(torch::stable::detail::StableLibrary& m); \
  FASTPRIMER_IMPL_KEYS template <class Device>                           \
  static void register_kernels(torch::stable::detail::StableLibrary& m)
