// What every kernel interface is written in: element types and devices. No torch header: CPU, CUDA and emulated kernels
// all read this.
#pragma once
#include <cstdint>

namespace fastprimer {

enum class Dtype { float32, bfloat16, float16, float64 };

// Kernels of one operation are overloads on where they run.
struct Cpu {};
struct Cuda {
  void* stream;
};

// A launch returns null, or why it failed.
using Error = const char*;

}  // namespace fastprimer
