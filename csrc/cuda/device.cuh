// What CUDA kernels are written in: one set of names for hardware (nvcc) and for the emulator of tests/emulator. PTX and
// launches stand nowhere else but here and, for what only Hopper has, in hopper.cuh. Beyond them kernels use CUDA's own names:
// threadIdx, __syncthreads, __shfl_xor_sync ...
//
//   launch, multiprocessors, compute_capability, aligned, by_dtype  host side
//   FASTPRIMER_SHARED, dynamic_shared           shared memory
//   Vector, load, store, whole, issue_loads     accesses of up to 16 bytes
//   bfloat16, float16, widen, narrow            element types; arithmetic is in float32
//   smaller, larger                             minimum and maximum that pass NaN on
//   narrow_pair                                 two elements of 16 bits in a register
//   fast_exp, fast_exp2, fast_reciprocal        good enough for results of 16 bits
//   warp_sum                                    reductions
//   copy_async, _commit, _wait                  cp.async: global to shared memory, without registers
//   load_matrix, multiply_accumulate            ldmatrix, mma.sync m16n8k16
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../kernel.h"

namespace fastprimer {

// Element types: only the bits; see widen and narrow.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The shared memory, static and dynamic, that a block may have on every GPU since Ampere; sm_80 and Hopper have more.
constexpr size_t SHARED_EVERYWHERE = 99 << 10;

// V adjacent elements that move together, in accesses of 16 bytes where there are as many.
template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Vector {
  T data[V];
};

}  // namespace fastprimer

#ifdef FASTPRIMER_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime.h>

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace fastprimer {

// A shared-memory array of the block: FASTPRIMER_SHARED(partial, float[2][32]);
#define FASTPRIMER_SHARED(name, ...) \
  using name##_type = __VA_ARGS__;   \
  __shared__ alignas(16) name##_type name

// The shared memory whose size the launch gives, aligned to 1024 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Lets launches of a kernel on the current device ask for so much. 48 KiB need no consent, but those the kernel's own arrays share with
// what the launch asks for. What was allowed is never taken back: another thread may be about to launch the kernel with more.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Cuda device, Arguments... arguments) {
  if (shared_bytes > 0) {
    const cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(device.stream);
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// An attribute of the current device, asked once per device; never less than 1.
template <cudaDeviceAttr ATTRIBUTE>
int device_attribute() {
  constexpr int devices = 64;
  static std::atomic<int> known[devices];
  int device = 0, value = 0;
  cudaGetDevice(&device);
  if (device < devices && (value = known[device]) > 0) return value;
  cudaDeviceGetAttribute(&value, ATTRIBUTE, device);
  if (device < devices) known[device] = value;
  return value > 0 ? value : 1;
}

inline int multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// The major one: 8 for sm_80 to sm_89, 9 for Hopper.
inline int compute_capability() { return device_attribute<cudaDevAttrComputeCapabilityMajor>(); }

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load(const T* p) {
  return *reinterpret_cast<const Vector<T, V>*>(p);
}

// An offset that the compiler does not take apart: parts of it moved out of a loop leave a store of 16 bytes in four.
__device__ __forceinline__ int64_t whole(int64_t offset) {
  asm("" : "+l"(offset));
  return offset;
}

// What was loaded above is asked for here, all of it: the compiler does not put a load off until its number is used.
__device__ __forceinline__ void issue_loads() { asm volatile("" ::: "memory"); }

template <class T, int V>
__device__ __forceinline__ void store(T* p, const Vector<T, V>& v) {
  *reinterpret_cast<Vector<T, V>*>(p) = v;
}

__device__ __forceinline__ float widen(float v) { return v; }
// In assembly, so that the compiler does not keep a row's float32 numbers, twice as many registers, in place of its 16 bits.
__device__ __forceinline__ float widen(bfloat16 v) {
  float wide;
  asm("mov.b32 %0, {0, %1};" : "=f"(wide) : "h"(v.bits));
  return wide;
}
__device__ __forceinline__ float widen(float16 v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}

// Rounds to the nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float v) {
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float v) {
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}

// Two elements of 16 bits, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  static_assert(sizeof(T) == 2, "bfloat16 or float16");
  uint32_t pair;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// NaN if one is, unlike fminf and fmaxf.
__device__ __forceinline__ float smaller(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float larger(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// 2^v within some 2e-7 of itself, e^v and 1 / v within some 1e-5 and 1e-7 for |v| < 100; what is below 2^-126 becomes 0.
__device__ __forceinline__ float fast_exp2(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
__device__ __forceinline__ float fast_exp(float v) { return fast_exp2(v * 1.44269504f); }
__device__ __forceinline__ float fast_reciprocal(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// Copies 16 bytes, of which the first `bytes` are read and the rest are zeros. The data is there, for the thread that
// issued the copy, after copy_async_wait; for others after a barrier that follows.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are still under way.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements from shared memory: lane 8 m + r gives the address of row r of matrix m, and
// receives elements (lane / 4, 2 (lane % 4) + {0, 1}) of each, or of its transpose.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrix(uint32_t (&fragment)[4], const void* row) {
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// d += a b for one warp: a is 16 x 16 (rows), b is 16 x 8 (columns), d is 16 x 8 in float32. With i = lane / 4, j = 2 (lane % 4):
//   a: (i, j), (i + 8, j), (i, j + 8), (i + 8, j + 8)     each register holds two neighbours in k
//   b: (j, i), (j + 8, i)                                 each register holds two neighbours in k
//   d: (i, j), (i, j + 1), (i + 8, j), (i + 8, j + 1)
template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2, "bfloat16 or float16");
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace fastprimer
#endif

namespace fastprimer {

constexpr unsigned FULL_WARP = 0xFFFFFFFFu;

// Whether load<V> and store may be used at p, and as many times `stride` elements further as one likes. Null: yes.
template <class T, int V>
bool aligned(const void* p, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(p) | (static_cast<uintptr_t>(stride) * sizeof(T))) % alignof(Vector<T, V>) == 0;
}

// Calls launch(T{}) with the element type T that dtype stands for.
template <class Launch>
Error by_dtype(Dtype dtype, Launch launch) {
  switch (dtype) {
    case Dtype::float32:
      return launch(float{});
    case Dtype::bfloat16:
      return launch(bfloat16{});
    case Dtype::float16:
      return launch(float16{});
    default:
      return "tensors must be float32, bfloat16 or float16";
  }
}

// The sum over each aligned group of `lanes` lanes (a power of two), given to all of them. The whole warp must call it.
__device__ __forceinline__ float warp_sum(float v, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(FULL_WARP, v, distance);
  return v;
}

template <class T, int V>
__device__ __forceinline__ void widen(const Vector<T, V>& v, float (&wide)[V]) {
#pragma unroll
  for (int i = 0; i < V; i++) wide[i] = widen(v.data[i]);
}

template <class T, int V>
__device__ __forceinline__ Vector<T, V> narrow(const float (&wide)[V]) {
  Vector<T, V> v;
#pragma unroll
  for (int i = 0; i < V; i++) v.data[i] = narrow<T>(wide[i]);
  return v;
}

}  // namespace fastprimer
