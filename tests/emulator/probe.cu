// What each primitive of device.cuh does, number by number. The emulated build and the hardware's build of this one file print the
// same text if the emulator's layouts are the hardware's: python -m tests.emulator.probe compares the two.
#include <cstring>

#include "gemm.cuh"
#include "probe.cuh"

namespace fastprimer {

constexpr int GEMM_M = 70, GEMM_N = 72, GEMM_K = 104;

// Inputs name their place: a holds 0 .. 255, b a single one, in each of its 128 places in turn. So d shows which place of a met which of
// b, and where the product went.
template <class T>
__global__ void probe_mma(uint32_t* out) {
  const int lane = threadIdx.x;
  uint32_t a[4];
  for (int r = 0; r < 4; r++) {
    const int place = lane * 8 + 2 * r;
    a[r] = narrow<T>(static_cast<float>(place)).bits | static_cast<uint32_t>(narrow<T>(static_cast<float>(place + 1)).bits) << 16;
  }
  for (int place = 0; place < 128; place++) {
    uint32_t b[2] = {};
    if (lane == place / 4) b[place / 2 % 2] = static_cast<uint32_t>(narrow<T>(1.0f).bits) << place % 2 * 16;
    float d[4] = {};
    multiply_accumulate<T>(d, a, b);
    for (int e = 0; e < 4; e++) out[(place * 32 + lane) * 4 + e] = static_cast<uint32_t>(d[e]);
  }
}

template <bool TRANSPOSED>
__global__ void probe_ldmatrix(uint32_t* out) {
  FASTPRIMER_SHARED(elements, uint16_t[32 * 8]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 32 * 8; i += 32) elements[i] = static_cast<uint16_t>(i);
  __syncthreads();
  uint32_t fragment[4];
  load_matrix<TRANSPOSED>(fragment, &elements[lane * 5 % 32 * 8]);
  for (int m = 0; m < 4; m++) out[lane * 4 + m] = fragment[m];
}

__global__ void probe_cp_async(const uint32_t* in, uint32_t* out) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int lane = threadIdx.x;
  copy_async(shared + lane * 4, in + lane * 4, lane % 17);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; i++) out[lane * 4 + i] = shared[(31 - lane) * 4 + i];
}

__global__ void probe_shuffles(uint32_t* out) {
  const unsigned lane = threadIdx.x;
  int i = 0;
  const auto record = [&](uint32_t v) { out[i++ * 32 + lane] = v; };
  for (int width = 8; width <= 32; width *= 2) {
    record(__shfl_sync(FULL_WARP, lane, 13, width));
    record(__shfl_xor_sync(FULL_WARP, lane, 11, width));
    record(__shfl_up_sync(FULL_WARP, lane, 3, width));
    record(__shfl_down_sync(FULL_WARP, lane, 5, width));
  }
  record(__ballot_sync(FULL_WARP, lane % 3 == 0));
  record(__match_any_sync(FULL_WARP, lane % 5));
}

// float32 numbers from all over the range: halfway cases, subnormals, infinities, NaN.
__global__ void probe_conversions(uint32_t* out) {
  const uint32_t i = threadIdx.x + blockIdx.x * blockDim.x;
  float v;
  const uint32_t bits = i << 21 | (i * 2654435761u >> 31) << 12 | (i * 40503u >> 7 & 1) << 15 | (i & 1);
  memcpy(&v, &bits, sizeof v);
  const bfloat16 b = narrow<bfloat16>(v);
  const float16 h = narrow<float16>(v);
  out[i] = b.bits | static_cast<uint32_t>(h.bits) << 16;
}

// Small whole numbers: every sum of their products is exact, in whatever order it is taken.
template <class T>
__global__ void fill(T* p, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) p[i] = narrow<T>(static_cast<float>(i * 2654435761u >> 28) - 7);
}

template <class T>
Error run_gemm(uint32_t* out) {
  T* a = static_cast<T*>(allocate(GEMM_M * GEMM_K * sizeof(T)));
  T* b = static_cast<T*>(allocate(GEMM_K * GEMM_N * sizeof(T)));
  Error error = launch(fill<T>, dim3(1), dim3(256), 0, Cuda{}, a, GEMM_M * GEMM_K);
  if (error == nullptr) error = launch(fill<T>, dim3(1), dim3(256), 0, Cuda{}, b, GEMM_K * GEMM_N);
  if (error == nullptr) error = gemm(Cuda{}, a, b, reinterpret_cast<float*>(out), GEMM_M, GEMM_N, GEMM_K);
  return error;
}

Error run_cp_async(uint32_t* out) {
  uint32_t* in = static_cast<uint32_t*>(allocate(32 * 4 * sizeof(uint32_t)));
  for (uint32_t i = 0; i < 32 * 4; i++) in[i] = 0x01010101u * (i + 1);
  return launch(probe_cp_async, dim3(1), dim3(32), 32 * 16, Cuda{}, in, out);
}

}  // namespace fastprimer

int main() {
  using namespace fastprimer;
  probe("mma_bfloat16", 128 * 32 * 4, block(probe_mma<bfloat16>));
  probe("mma_float16", 128 * 32 * 4, block(probe_mma<float16>));
  probe("ldmatrix", 32 * 4, block(probe_ldmatrix<false>));
  probe("ldmatrix_trans", 32 * 4, block(probe_ldmatrix<true>));
  probe("cp_async", 32 * 4, run_cp_async);
  probe("shuffles", 14 * 32, block(probe_shuffles));
  probe("conversions", 2048, [](uint32_t* out) { return launch(probe_conversions, dim3(8), dim3(256), 0, Cuda{}, out); });
  probe("gemm_bfloat16", GEMM_M * GEMM_N, run_gemm<bfloat16>);
  probe("gemm_float16", GEMM_M * GEMM_N, run_gemm<float16>);
  return failed;
}
