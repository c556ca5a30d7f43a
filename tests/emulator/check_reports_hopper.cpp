// The emulator's part for Hopper: what mbarriers, TMA and wgmma do, and that each mistake it promises to report is reported.
#include "check.h"
#include "hopper.cuh"

namespace {

using namespace check;
using namespace fastprimer;

constexpr int TOKENS = 5, HEADS = 3, FEATURES = 72;

uint16_t numbers[TOKENS][HEADS][FEATURES];

// Boxes of a panel's features, two heads and four tokens of `numbers`.
TensorMap map_of_numbers() {
  uint16_t next = 0;
  for (auto& token : numbers) {
    for (auto& head : token) {
      for (uint16_t& number : head) number = ++next;
    }
  }
  TensorMap map;
  expect("a tensor map", encode_tiles<bfloat16>(map, numbers, {FEATURES, HEADS, TOKENS, 1}, {FEATURES, HEADS * FEATURES, FEATURES},
                                                {PANEL, 2, 4, 1}) == nullptr);
  return map;
}

Barrier& barrier_at(size_t offset) { return *reinterpret_cast<Barrier*>(dynamic_shared() + offset); }

void start_barrier(size_t offset, int arrivals) {
  barrier_init(barrier_at(offset), arrivals);
  barrier_init_done();
}

void check_mbarriers() {
  expect_report("used before it was initialised", 1, 64, [] { barrier_arrive(barrier_at(0)); });
  expect_report("more arrivals in a phase", 2, 64, [] {
    if (threadIdx.x == 0) start_barrier(0, 1);
    __syncthreads();
    barrier_expect(barrier_at(0), 16);
  });
  expect_report("deadlock", 1, 64, [] {
    start_barrier(0, 1);
    barrier_wait(barrier_at(0), 1);  // the phase before the first is complete
    barrier_arrive(barrier_at(0));
    barrier_wait(barrier_at(0), 0);
    barrier_wait(barrier_at(0), 1);
  });
  run_kernel(1, 64, 64, [] {
    float* value = reinterpret_cast<float*>(dynamic_shared());
    if (threadIdx.x == 0) start_barrier(16, 1);
    __syncthreads();
    if (threadIdx.x == 0) *value = 3;
    if (threadIdx.x == 0) barrier_arrive(barrier_at(16));
    barrier_wait(barrier_at(16), 0);
    expect("a phase shows what was written before it ended", *value == 3);
  });
}

void check_tiles() {
  static TensorMap map;
  map = map_of_numbers();
  constexpr int BYTES = 2 * 4 * PANEL_ROW;
  run_kernel(1, 1, 2048, [] {
    start_barrier(1024, 1);
    barrier_expect(barrier_at(1024), BYTES);
    copy_tile(dynamic_shared(), map, barrier_at(1024), 16, -1, 2, 0);
    const uint16_t* tile = reinterpret_cast<uint16_t*>(dynamic_shared());
    expect("a tile has not arrived before its barrier's phase is complete", tile[0] == 0xFFFF);
    barrier_wait(barrier_at(1024), 0);
    for (int row = 0; row < 8; row++) {
      for (int f = 0; f < PANEL; f++) {
        const int token = 2 + row / 2, head = row % 2 - 1, feature = 16 + f;
        const bool inside = token < TOKENS && head >= 0 && feature < FEATURES;
        expect("a swizzled tile", tile[row * PANEL + ((f / 8) ^ row) * 8 + f % 8] == (inside ? numbers[token][head][feature] : 0));
      }
    }
  });
  expect_report("this phase does not expect", 1, 2048, [] {
    start_barrier(1024, 1);
    barrier_expect(barrier_at(1024), BYTES / 2);
    copy_tile(dynamic_shared(), map, barrier_at(1024), 0, 0, 0, 0);
    barrier_wait(barrier_at(1024), 0);
  });
  expect_report("not followed by barrier_init_done", 1, 2048, [] {
    barrier_init(barrier_at(1024), 1);
    copy_tile(dynamic_shared(), map, barrier_at(1024), 0, 0, 0, 0);
  });
  expect_report("ended while its TMA copies", 1, 2048, [] {
    start_barrier(1024, 1);
    barrier_expect(barrier_at(1024), BYTES);
    copy_tile(dynamic_shared(), map, barrier_at(1024), 0, 0, 0, 0);
  });
  expect_report("no multiple of 128", 1, 2048, [] {
    start_barrier(1024, 1);
    copy_tile(dynamic_shared() + 64, map, barrier_at(1024), 0, 0, 0, 0);
  });
  expect_report("not in dynamic shared memory", 1, 1032, [] {
    start_barrier(1024, 1);
    copy_tile(dynamic_shared() + 128, map, barrier_at(1024), 0, 0, 0, 0);
  });
  TensorMap other;
  const auto refused = [&](const void* data, int64_t size, int64_t stride, int width) {
    return encode_tiles<bfloat16>(other, data, {size, 1, 1, 1}, {stride, stride, stride}, {width, 1, 1, 1}) != nullptr;
  };
  expect("tensor maps are checked", refused(&numbers[0][0][1], 8, 8, PANEL) && refused(numbers, 0, 8, PANEL) &&
                                        refused(numbers, 8, 12, PANEL) && refused(numbers, 8, 0, PANEL) &&
                                        refused(numbers, 8, 8, 2 * PANEL));
}

// Element (row, k) of a matrix: small whole numbers.
float element(int row, int k) { return static_cast<float>((row * 37 + k * 11 + row * k) % 13 - 6); }

bfloat16* place(int panel, int rows, int row, int k) {
  return reinterpret_cast<bfloat16*>(dynamic_shared()) + (panel * rows + row) * PANEL + ((k / 8) ^ (row % 8)) * 8 + k % 8;
}

// Two panels of 64 rows, by all threads of a warpgroup.
void fill_tile() {
  for (int chunk = threadIdx.x; chunk < 2 * 64 * 8; chunk += WARPGROUP) {
    const int panel = chunk / 512, row = chunk / 8 % 64, k = chunk % 8 * 8;
    Vector<bfloat16, 8> v;
    for (int e = 0; e < 8; e++) v.data[e] = narrow<bfloat16>(element(row + 64 * panel, k + e));
    store(place(panel, 64, row, k), v);
  }
}

constexpr size_t TILE_BYTES = 2 * 64 * PANEL_ROW;

void check_products() {
  run_kernel(1, WARPGROUP, TILE_BYTES, [] {
    fill_tile();
    fence_async();
    __syncthreads();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    float d[8][4], sum[16][4] = {};
    // d = a b^T at k = 16: a is the first panel, b the second.
    warpgroup_fence(d);
    warpgroup_multiply<bfloat16>(d, matrix_descriptor(dynamic_shared() + 32, 0), matrix_descriptor(place(1, 64, 0, 0) + 16, 0), false);
    warpgroup_commit();
    expect("registers of a product under way are NaN", std::isnan(d[0][0]));
    warpgroup_wait<0>(d);
    // sum += a b: a is in registers, b has 16 rows, from the 16th on, of both panels.
    uint32_t a[1][4];
    for (int e = 0; e < 4; e++) {
      const int k = lane % 4 * 2 + e / 2 * 8, r = row + e % 2 * 8;
      a[0][e] = narrow_pair<bfloat16>(element(r, k), element(r, k + 1));
    }
    warpgroup_fence(sum, a);
    warpgroup_multiply<bfloat16>(sum, a[0], matrix_descriptor(place(0, 64, 16, 0), 64 * PANEL_ROW), true);
    warpgroup_commit();
    warpgroup_wait<0>(sum);
    for (int i = 0; i < 64; i++) {
      const int r = row + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float transposed = 0, straight = 0;
      for (int k = 0; k < 16; k++) {
        transposed += element(r, 16 + k) * element(64 + column % 64, 16 + k);
        straight += element(r, k) * element(16 + k + column / 64 * 64, column % 64);
      }
      if (i < 32) expect("a product of two tiles", d[i / 4][i % 4] == transposed);
      expect("a product of registers and a tile", sum[i / 4][i % 4] == straight);
    }
  });
}

// Reports of a warpgroup that multiplies the tile with itself after `before`, and then goes on with `after`.
void expect_product_report(const std::string& report, const std::function<void(float (&)[8][4])>& before,
                           const std::function<void(float (&)[8][4])>& after) {
  expect_report(report, WARPGROUP, TILE_BYTES, [&] {
    float d[8][4] = {};
    before(d);
    const uint64_t tile = matrix_descriptor(dynamic_shared(), 0);
    warpgroup_multiply<bfloat16>(d, tile, tile, false);
    warpgroup_commit();
    after(d);
  });
}

void check_product_reports() {
  const auto ready = [](float (&d)[8][4]) {
    fill_tile();
    fence_async();
    __syncthreads();
    warpgroup_fence(d);
  };
  expect_product_report("not waited for", ready, [](float (&)[8][4]) {});
  expect_product_report("under way", ready, [](float (&d)[8][4]) { warpgroup_wait<1>(d); });
  expect_product_report("no warpgroup_fence", [](float (&)[8][4]) {}, [](float (&)[8][4]) {});
  expect_product_report(
      "without fence_async",
      [](float (&d)[8][4]) {
        fill_tile();
        __syncthreads();
        warpgroup_fence(d);
      },
      [](float (&d)[8][4]) { warpgroup_wait<0>(d); });
  expect_product_report("changed between its issue and its wait", ready, [](float (&d)[8][4]) {
    __syncthreads();
    if (threadIdx.x == 0) place(0, 64, 63, 9)->bits ^= 1;
    __syncthreads();
    warpgroup_wait<0>(d);
  });
  expect_report("operands differ between the lanes", WARPGROUP, TILE_BYTES, [] {
    float d[8][4] = {};
    warpgroup_fence(d);
    const uint64_t tile = matrix_descriptor(dynamic_shared() + threadIdx.x % 32 * 1024 % TILE_BYTES, 0);
    warpgroup_multiply<bfloat16>(d, tile, tile, false);
  });
  expect_report("not in a group of four", 64, TILE_BYTES, [] {
    float d[8][4] = {};
    warpgroup_multiply<bfloat16>(d, 0, 0, false);
  });
}

void check_registers_and_barriers() {
  expect_report("a multiple of 8", WARPGROUP, 0, [] { take_registers<23>(); });
  expect_report("more registers than", 3 * WARPGROUP, 0, [] {
    if (threadIdx.x < WARPGROUP) {
      give_registers<32>();
    } else {
      take_registers<240>();
    }
  });
  expect_report("whole warps", 64, 0, [] { sync_threads(1, 40); });
  expect_report("one of 1 to 15", 64, 0, [] { sync_threads(0, 64); });
  expect_report("deadlock", 64, 0, [] {
    if (threadIdx.x < 32) sync_threads(1, 64);
  });
  run_kernel(1, 96, 4, [] {
    float* value = reinterpret_cast<float*>(dynamic_shared());
    if (threadIdx.x >= 64) return;
    if (threadIdx.x == 0) *value = 5;
    sync_threads(3, 64);
    expect("a barrier of some threads", *value == 5);
  });
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool) {
    check_mbarriers();
    check_tiles();
    check_products();
    check_product_reports();
    check_registers_and_barriers();
  });
}
