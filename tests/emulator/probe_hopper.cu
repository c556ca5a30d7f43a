// probe.cu's part for Hopper: where TMA lays down a box, and what wgmma makes of operands in all the layouts that kernels use.
#include "hopper.cuh"
#include "probe.cuh"

namespace fastprimer {

constexpr int TOKENS = 5, HEADS = 3, FEATURES = 72, BOX_HEADS = 2, BOX_TOKENS = 4;
constexpr int BOX_BYTES = BOX_HEADS * BOX_TOKENS * PANEL_ROW;

// A box that begins in the midst of the features, before the first head, and ends after the last token.
__global__ void probe_tma(uint32_t* out, const __grid_constant__ TensorMap map) {
  uint32_t* tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  Barrier& barrier = *reinterpret_cast<Barrier*>(dynamic_shared() + 1024);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
    barrier_expect(barrier, BOX_BYTES);
    copy_tile(tile, map, barrier, 16, -1, 2, 0);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < BOX_BYTES / 4; i += 32) out[i] = tile[i];
}

Error run_tma(uint32_t* out) {
  bfloat16* data = static_cast<bfloat16*>(allocate(TOKENS * HEADS * FEATURES * sizeof(bfloat16)));
  for (int i = 0; i < TOKENS * HEADS * FEATURES; i++) data[i].bits = static_cast<uint16_t>(i + 1);
  TensorMap map;
  if (Error error = encode_tiles<bfloat16>(map, data, {FEATURES, HEADS, TOKENS, 1}, {FEATURES, HEADS * FEATURES, FEATURES},
                                           {PANEL, BOX_HEADS, BOX_TOKENS, 1})) {
    return error;
  }
  return launch(probe_tma, dim3(1), dim3(32), 2048, Cuda{}, out, map);
}

// Two panels of 128 rows of small whole numbers, of which every sum of products is exact.
constexpr int ROWS = 128;
constexpr size_t TILE_BYTES = 2 * ROWS * PANEL_ROW;

template <class T>
__device__ T* fill_tile() {
  T* tile = reinterpret_cast<T*>(dynamic_shared());
  for (uint32_t i = threadIdx.x; i < 2 * ROWS * PANEL / 8; i += WARPGROUP) {
    Vector<T, 8> v;
    for (uint32_t e = 0; e < 8; e++) v.data[e] = narrow<T>(static_cast<float>((8 * i + e) * 2654435761u >> 28) - 7);
    store(tile + 8 * i, v);
  }
  fence_async();
  __syncthreads();
  return tile;
}

template <int N>
__device__ void write_product(uint32_t* out, const float (&d)[N][4]) {
  for (int i = 0; i < 4 * N; i++) out[i * WARPGROUP + threadIdx.x] = static_cast<uint32_t>(static_cast<int>(d[i / 4][i % 4]));
}

// d = a b^T: rows 64 .. 127 of the first panel with rows of the second, 16 features from each of four places.
template <class T, int N>
__global__ void probe_wgmma_tiles(uint32_t* out) {
  const T* tile = fill_tile<T>();
  float d[N][4];
  for (int k = 0; k < PANEL; k += PRODUCT_DEPTH) {
    warpgroup_fence(d);
    warpgroup_multiply<T>(d, matrix_descriptor(tile + 64 * PANEL + k, 0), matrix_descriptor(tile + ROWS * PANEL + k, 0), false);
    warpgroup_commit();
    warpgroup_wait<0>(d);
    write_product(out + k / PRODUCT_DEPTH * 4 * N * WARPGROUP, d);
  }
}

// d += a b: a in registers, b 16 rows of one panel or of both, from eight places.
template <class T, int N>
__global__ void probe_wgmma_registers(uint32_t* out) {
  const T* tile = fill_tile<T>();
  float d[N][4] = {};
  uint32_t a[1][4];
  for (uint32_t e = 0; e < 4; e++) {
    const uint32_t place = (threadIdx.x * 4 + e) * 2;
    a[0][e] = narrow_pair<T>(static_cast<float>(place * 40503u >> 5 & 15) - 7, static_cast<float>((place + 1) * 40503u >> 5 & 15) - 7);
  }
  for (int k = 0; k < ROWS; k += PRODUCT_DEPTH) {
    warpgroup_fence(d, a);
    warpgroup_multiply<T>(d, a[0], matrix_descriptor(tile + k * PANEL, ROWS * PANEL_ROW), true);
    warpgroup_commit();
    warpgroup_wait<0>(d);
    write_product(out + k / PRODUCT_DEPTH * 4 * N * WARPGROUP, d);
  }
}

template <class T, int N>
void probe_wgmma(const char* tiles, const char* registers) {
  probe(tiles, 4 * 4 * N * WARPGROUP, block(probe_wgmma_tiles<T, N>, WARPGROUP, TILE_BYTES));
  probe(registers, 8 * 4 * N * WARPGROUP, block(probe_wgmma_registers<T, N>, WARPGROUP, TILE_BYTES));
}

}  // namespace fastprimer

int main() {
  using namespace fastprimer;
  probe("tma", BOX_BYTES / 4, run_tma);
  probe_wgmma<bfloat16, 8>("wgmma_64_bfloat16", "wgmma_64_registers_bfloat16");
  probe_wgmma<bfloat16, 16>("wgmma_128_bfloat16", "wgmma_128_registers_bfloat16");
  probe_wgmma<float16, 8>("wgmma_64_float16", "wgmma_64_registers_float16");
  probe_wgmma<float16, 16>("wgmma_128_float16", "wgmma_128_registers_float16");
  return failed;
}
