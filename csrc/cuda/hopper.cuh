// device.cuh for what only Hopper (sm_90a) has: one set of names for hardware and for the emulator.
//
//   TensorMap, encode_tiles                  host side: a tensor in global memory, and the boxes of it that TMA copies
//   Barrier, barrier_*                       mbarrier: threads and copies arrive, threads wait for a phase of it
//   copy_tile                                TMA: a box from global to shared memory, swizzled, without registers
//   sync_threads                             a barrier of some of the block's threads
//   fence_async                              what was stored in shared memory becomes visible to TMA and to products
//   give_registers, take_registers           registers move from some warps to others
//   matrix_descriptor, warpgroup_*           wgmma: products of 64 rows by 128 threads, made while they go on
//
// Tiles that TMA writes and wgmma reads lie in panels of 64 features (128 bytes a row) that begin at multiples of 1024 bytes: there
// the 16-byte chunk c of row r is at place c ^ (r % 8) of its row, which is the hardware's 128-byte swizzle.
#pragma once
#include "device.cuh"

namespace fastprimer {

constexpr int PANEL = 64;                                              // features of 16 bits in a panel
constexpr int PANEL_ROW = 2 * PANEL;                                   // bytes
constexpr int WARPGROUP = 128, PRODUCT_ROWS = 64, PRODUCT_DEPTH = 16;  // threads; rows and depth of one product

}  // namespace fastprimer

#ifdef FASTPRIMER_EMULATED
#include "hopper.h"
#else
#include <cuda.h>

namespace fastprimer {

using TensorMap = CUtensorMap;

// The driver's function, or null. It is asked for, as a link to libcuda would keep the library from loading where there is none.
inline decltype(&cuTensorMapEncodeTiled) tile_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry) : nullptr;
  }();
  return encoder;
}

// Describes a tensor of 4 dimensions with elements of 16 bits, the innermost ones adjacent, the others `strides` elements apart, and
// the box that a copy takes of it, 64 elements wide; what lies outside the tensor reads as 0.
template <class T>
Error encode_tiles(TensorMap& map, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3], const int (&box)[4]) {
  static_assert(sizeof(T) == 2, "bfloat16 or float16");
  const auto encoder = tile_encoder();
  if (encoder == nullptr) return "the driver has no cuTensorMapEncodeTiled: one for CUDA 12 or later is needed";
  cuuint64_t global[4], bytes[3];
  cuuint32_t boxes[4], steps[4];
  for (int d = 0; d < 4; d++) {
    global[d] = static_cast<cuuint64_t>(sizes[d]);
    boxes[d] = static_cast<cuuint32_t>(box[d]);
    steps[d] = 1;
    if (d < 3) bytes[d] = static_cast<cuuint64_t>(strides[d]) * sizeof(T);
  }
  constexpr auto TYPE = std::is_same_v<T, bfloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto encode = [&] {
    return encoder(&map, TYPE, 4, const_cast<void*>(data), global, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread that has not used the GPU before, and this is no call of the runtime
    int device;
    if (cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess) result = encode();
  }
  if (result == CUDA_SUCCESS) return nullptr;
  if (result == CUDA_ERROR_INVALID_VALUE) return "cuTensorMapEncodeTiled refused a tensor: its address, strides or sizes do not fit TMA";
  return "cuTensorMapEncodeTiled failed, with no word about the tensor: an earlier error of this process, or no usable GPU";
}

// Counts arrivals, and bytes still to come. When none is missing, a phase is complete and the next begins; phases have parity 0, 1, 0 ...
struct alignas(8) Barrier {
  uint64_t state;
};

__device__ __forceinline__ void barrier_init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// By the thread that initialised barriers, after the last of them and before the block's barrier.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and says how many bytes of copies the phase shall wait for.
__device__ __forceinline__ void barrier_expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is complete. The phase before the first counts as complete: its parity is 1.
__device__ __forceinline__ void barrier_wait(Barrier& barrier, unsigned parity) {
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(shared_address(&barrier)), "r"(parity)
                 : "memory");
  } while (done == 0);
}

// Starts to copy the map's box at coordinates c0 (innermost) .. c3; the barrier learns of its bytes when they have arrived.
__device__ __forceinline__ void copy_tile(void* shared, const TensorMap& map, Barrier& barrier, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
                   shared_address(shared)),
               "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// Whole warps, `threads` of them in all, wait for each other at barrier `id`, 1 to 15.
__device__ __forceinline__ void sync_threads(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The calling warpgroup goes on with COUNT registers a thread: fewer, or more, which others have to give first.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, int panel_stride) {
  constexpr uint64_t SWIZZLE_128 = 1, EIGHT_ROWS = 8 * PANEL_ROW;
  const auto sixteens = [](uint64_t bytes) { return (bytes & 0x3FFFF) >> 4; };
  return sixteens(shared_address(start)) | sixteens(panel_stride) << 16 | sixteens(EIGHT_ROWS) << 32 | SWIZZLE_128 << 62;
}

// Keeps the compiler from moving what it does with these registers across this place.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

template <class... Registers>
__device__ __forceinline__ void warpgroup_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING, class... Registers>
__device__ __forceinline__ void warpgroup_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  (pin(registers), ...);
}

// One wgmma: its shape, element type, the operands that d's registers are, and, by the numbers that follow those, `add` and the rest.
#define FASTPRIMER_PLACES_32                                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
  "%27, %28, %29, %30, %31"
#define FASTPRIMER_PLACES_64                                                                                                   \
  FASTPRIMER_PLACES_32                                                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define FASTPRIMER_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FASTPRIMER_D16(i) FASTPRIMER_D4(i), FASTPRIMER_D4(i + 1), FASTPRIMER_D4(i + 2), FASTPRIMER_D4(i + 3)
#define FASTPRIMER_D_32 FASTPRIMER_D16(0), FASTPRIMER_D16(4)
#define FASTPRIMER_D_64 FASTPRIMER_D_32, FASTPRIMER_D16(8), FASTPRIMER_D16(12)
#define FASTPRIMER_WGMMA(SHAPE, TYPE, REGISTERS, ADD, REST, ...)                                                         \
  asm volatile("{.reg .pred add; setp.ne.b32 add, " ADD ", 0; wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE \
               " {" FASTPRIMER_PLACES_##REGISTERS "}, " REST ";}"                                                        \
               : FASTPRIMER_D_##REGISTERS                                                                                \
               : "r"(static_cast<int>(add)), __VA_ARGS__                                                                 \
               : "memory")

// d = a b^T, or d += a b^T if `add`: a has 64 rows and b 8 N rows of 16 elements, both in shared memory.
template <class T, int N>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[N][4], uint64_t a, uint64_t b, bool add) {
  static_assert(N == 8 || N == 16, "a product is 64 or 128 columns wide");
#define FASTPRIMER_TYPED(TYPE)                                                                    \
  if constexpr (N == 8) {                                                                         \
    FASTPRIMER_WGMMA("m64n64k16", TYPE, 32, "%32", "%33, %34, add, 1, 1, 0, 0", "l"(a), "l"(b));  \
  } else {                                                                                        \
    FASTPRIMER_WGMMA("m64n128k16", TYPE, 64, "%64", "%65, %66, add, 1, 1, 0, 0", "l"(a), "l"(b)); \
  }
  if constexpr (std::is_same_v<T, bfloat16>) {
    FASTPRIMER_TYPED("bf16")
  } else {
    FASTPRIMER_TYPED("f16")
  }
#undef FASTPRIMER_TYPED
}

// d = a b, or d += a b if `add`: a has 64 rows of 16 elements, in registers that hold them as those of mma.sync do, 16 rows a warp; b,
// in shared memory, has 16 rows of 8 N elements.
template <class T, int N>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(N == 8 || N == 16, "a product is 64 or 128 columns wide");
#define FASTPRIMER_TYPED(TYPE)                                                                                                             \
  if constexpr (N == 8) {                                                                                                                  \
    FASTPRIMER_WGMMA("m64n64k16", TYPE, 32, "%32", "{%33, %34, %35, %36}, %37, add, 1, 1, 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),  \
                     "l"(b));                                                                                                              \
  } else {                                                                                                                                 \
    FASTPRIMER_WGMMA("m64n128k16", TYPE, 64, "%64", "{%65, %66, %67, %68}, %69, add, 1, 1, 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), \
                     "l"(b));                                                                                                              \
  }
  if constexpr (std::is_same_v<T, bfloat16>) {
    FASTPRIMER_TYPED("bf16")
  } else {
    FASTPRIMER_TYPED("f16")
  }
#undef FASTPRIMER_TYPED
}

#undef FASTPRIMER_PLACES_32
#undef FASTPRIMER_PLACES_64
#undef FASTPRIMER_D4
#undef FASTPRIMER_D16
#undef FASTPRIMER_D_32
#undef FASTPRIMER_D_64
#undef FASTPRIMER_WGMMA

}  // namespace fastprimer
#endif
