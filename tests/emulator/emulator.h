// Runs CUDA C++ kernels on a CPU, without a GPU and without nvcc: g++ or clang++ -x c++ -std=c++20 -DFASTPRIMER_EMULATED kernel.cu
//
// csrc/cuda/device.cuh includes this file in place of CUDA's headers, and a kernel's text is the same for both. Read in this order:
//
//   fiber.h       a CUDA thread: a stack of its own
//   memory.h      shared memory, poisoned; alignment; limits
//   block.h       a block's threads, and how they wait
//   schedule.h    in which order threads run; what is reported
//   launch.h      a grid
//   collective.h  shuffles, ballots, barriers
//   copy.h        cp.async
//   matrix.h      ldmatrix, mma
//   hopper.h      what sm_90a has beyond: mbarrier.h, tma.h, wgmma.h
//   sanitizer.h   AddressSanitizer and ThreadSanitizer
//
// It cannot show: speed, weak memory ordering between threads, or a layout that the author of a kernel and of this emulator both
// misread (tests/emulator/probe.cu compares the layouts with hardware).
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "collective.h"
#include "copy.h"
#include "launch.h"
#include "matrix.h"
#include "tma.h"
#include "traffic.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (emulator::thread().index)
#define blockIdx (emulator::running->index)
#define blockDim (emulator::running->dim)
#define gridDim (emulator::running->grid)

namespace emulator {

template <class T>
T& shared_array(const void* key) {
  const Quiet quiet;
  return *reinterpret_cast<T*>(running->shared.declared(key, sizeof(T)));
}

}  // namespace emulator

// The names of device.cuh; what they mean stands there.
namespace fastprimer {

using std::max, std::min;  // CUDA's, of integers

#define FASTPRIMER_SHARED(name, ...) \
  using name##_type = __VA_ARGS__;   \
  static char name##_key;            \
  name##_type& name = ::emulator::shared_array<name##_type>(&name##_key)

inline unsigned char* dynamic_shared() { return emulator::running->shared.dynamic(); }

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Cuda, Arguments... arguments) {
  return emulator::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
}

inline int multiprocessors() { return emulator::MULTIPROCESSORS; }
inline int compute_capability() { return emulator::compute_capability(); }

template <int V, class T>
Vector<T, V> load(const T* p) {
  emulator::check_aligned(p, alignof(Vector<T, V>));
  emulator::count_traffic(sizeof(Vector<T, V>));
  Vector<T, V> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline int64_t whole(int64_t offset) { return offset; }
inline void issue_loads() {}

template <class T, int V>
void store(T* p, const Vector<T, V>& v) {
  emulator::check_aligned(p, alignof(Vector<T, V>));
  emulator::count_traffic(sizeof v);
  emulator::note_store(p, sizeof v);
  std::memcpy(p, &v, sizeof v);
}

inline float widen(float v) { return v; }
inline float widen(bfloat16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float widen(float16 v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }

template <class T>
T narrow(float v);
template <>
inline float narrow<float>(float v) {
  return v;
}
template <>
inline bfloat16 narrow<bfloat16>(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if (v != v) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 narrow<float16>(float v) {
  if (v != v) return {0x7FFF};
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(v))};
}

template <class T>
uint32_t narrow_pair(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}

inline float smaller(float a, float b) { return a != a || a < b ? a : b; }
inline float larger(float a, float b) { return a != a || a > b ? a : b; }
inline float fast_exp2(float v) { return std::exp2(v); }
inline float fast_exp(float v) { return std::exp(v); }
inline float fast_reciprocal(float v) { return 1 / v; }

inline void copy_async(void* shared, const void* global, int bytes) { emulator::copy_async(shared, global, bytes); }
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int PENDING>
void copy_async_wait() {
  emulator::copy_async_wait(PENDING);
}

template <bool TRANSPOSED>
void load_matrix(uint32_t (&fragment)[4], const void* row, emulator::Where where = {"load_matrix", __builtin_FILE(), __builtin_LINE()}) {
  emulator::load_matrix<TRANSPOSED>(fragment, row, where);
}

template <class T>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         emulator::Where where = {"multiply_accumulate", __builtin_FILE(), __builtin_LINE()}) {
  emulator::multiply_accumulate(d, a, b, where, [](uint16_t bits) { return widen(T{bits}); });
}

}  // namespace fastprimer
