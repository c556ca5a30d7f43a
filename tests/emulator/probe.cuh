// What the probes share: memory that both sides see, a launch, and its output as text.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "device.cuh"

namespace fastprimer {

#ifdef FASTPRIMER_EMULATED
inline void* allocate(size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }
inline Error finish() { return nullptr; }
#else
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  return cudaMallocManaged(&p, bytes) == cudaSuccess ? p : nullptr;
}
inline Error finish() {
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

inline bool failed = false;

// Prints what a launch of `kernel` leaves in `count` words.
template <class Launch>
void probe(const char* name, size_t count, Launch launch_kernel) {
  uint32_t* out = static_cast<uint32_t*>(allocate(count * sizeof(uint32_t)));
  Error error = out == nullptr ? "no memory on the device" : launch_kernel(out);
  if (error == nullptr) error = finish();
  if (error != nullptr) {
    std::fprintf(stderr, "%s: %s\n", name, error);
    failed = true;
    return;
  }
  for (size_t i = 0; i < count; i++) std::printf("%s %zu %08x\n", name, i, out[i]);
}

// Launches one block of a kernel that takes nothing but its output.
inline auto block(void (*kernel)(uint32_t*), unsigned threads = 32, size_t shared_bytes = 0) {
  return [=](uint32_t* out) { return launch(kernel, dim3(1), dim3(threads), shared_bytes, Cuda{}, out); };
}

}  // namespace fastprimer
