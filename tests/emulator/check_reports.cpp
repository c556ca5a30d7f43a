// The emulator itself: what its operations give, and that each mistake it promises to report is reported.
#include "check.h"

namespace {

using namespace check;
using fastprimer::copy_async;
using fastprimer::copy_async_commit;
using fastprimer::copy_async_wait;
using fastprimer::dynamic_shared;
using fastprimer::FULL_WARP;

void check_barriers() {
  expect_report("wait at different barriers", 64, 0, [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
  expect_report("some threads returned", 64, 0, [] {
    if (threadIdx.x < 40) __syncthreads();
  });
  expect_report("deadlock", 32, 0, [] {
    if (threadIdx.x < 16) {
      __syncthreads();
    } else {
      __shfl_sync(FULL_WARP, 0, 0);
    }
  });
}

void check_masks() {
  expect_report("not in the mask", 32, 0, [] { __shfl_sync(0xFFFFu, 0, 0); });
  expect_report("different warp operations", 32, 0, [] {
    if (threadIdx.x < 16) {
      __shfl_sync(FULL_WARP, 0, 0);
    } else {
      __shfl_xor_sync(FULL_WARP, 0, 1);
    }
  });
  run_kernel(1, 32, 0, [] {
    if (threadIdx.x < 16) expect("half a warp shuffles", __shfl_sync(0x0000FFFFu, threadIdx.x, 3) == 3);
  });
}

void check_alignment() {
  alignas(16) static float numbers[8] = {};
  expect_report("16 bytes is not aligned", 1, 0, [] { fastprimer::load<4>(numbers + 1); });
  expect_report("16 bytes is not aligned", 1, 0, [] { fastprimer::store(numbers + 2, fastprimer::Vector<float, 4>{}); });
  expect_report("16 bytes is not aligned", 1, 64, [] { copy_async(dynamic_shared() + 8, numbers, 16); });
  expect_report("16 bytes is not aligned", 32, 1024, [] {
    uint32_t fragment[4];
    fastprimer::load_matrix<false>(fragment, dynamic_shared() + threadIdx.x * 18);
  });
}

void check_limits() {
  expect_report("1 to 1024 threads", 1025, 0, [] {});
  expect_report("99 KiB", 1, (99 << 10) + 1, [] {});
  expect_report("48 KiB of static", 1, 0, [] {
    FASTPRIMER_SHARED(large, float[13000]);
    large[0] = 0;
  });
}

void check_shared_memory() {
  run_kernel(2, 64, 256, [] {
    FASTPRIMER_SHARED(values, float[64]);
    const float* dynamic = reinterpret_cast<float*>(dynamic_shared());
    expect("static shared memory begins as NaN", std::isnan(values[threadIdx.x]));
    expect("dynamic shared memory begins as NaN", std::isnan(dynamic[threadIdx.x]));
    __syncthreads();
    values[threadIdx.x] = static_cast<float>(threadIdx.x + blockIdx.x);
    __syncthreads();
    expect("a barrier shows what others wrote", values[63 - threadIdx.x] == static_cast<float>(63 - threadIdx.x + blockIdx.x));
  });
#if !defined(__SANITIZE_ADDRESS__)
  expect_report("past the end of a shared-memory array", 1, 64, [] { dynamic_shared()[64] = 0; });
#endif
}

void check_copies() {
  alignas(16) static float numbers[4] = {1, 2, 3, 4};
  expect_report("not waited for", 1, 16, [] { copy_async(dynamic_shared(), numbers, 16); });
  run_kernel(1, 1, 48, [] {
    const float* values = reinterpret_cast<float*>(dynamic_shared());
    copy_async(dynamic_shared(), numbers, 16);
    copy_async_commit();
    copy_async(dynamic_shared() + 16, numbers, 8);
    copy_async_commit();
    expect("a copy has not arrived before its wait", std::isnan(values[0]) && std::isnan(values[4]));
    copy_async_wait<1>();
    expect("a wait brings the older group only", values[3] == 4 && std::isnan(values[4]));
    copy_async_wait<0>();
    expect("bytes beyond those read are zero", values[5] == 2 && values[6] == 0 && values[7] == 0);
  });
}

void check_collectives() {
  run_kernel(1, 64, 0, [] {
    const int lane = threadIdx.x % 32;
    expect("__shfl_sync", __shfl_sync(FULL_WARP, lane, 5) == 5 && __shfl_sync(FULL_WARP, lane, 11, 8) == lane / 8 * 8 + 3);
    expect("__shfl_xor_sync", __shfl_xor_sync(FULL_WARP, lane, 9) == (lane ^ 9));
    expect("__shfl_up_sync", __shfl_up_sync(FULL_WARP, lane, 3) == (lane < 3 ? lane : lane - 3));
    expect("__shfl_down_sync", __shfl_down_sync(FULL_WARP, lane, 2, 4) == (lane % 4 < 2 ? lane + 2 : lane));
    expect("__ballot_sync", __ballot_sync(FULL_WARP, lane % 2) == 0xAAAAAAAAu);
    expect("__any_sync", __any_sync(FULL_WARP, lane == 31) && !__any_sync(FULL_WARP, 0));
    expect("__all_sync", __all_sync(FULL_WARP, 1) && !__all_sync(FULL_WARP, lane));
    expect("__match_any_sync", __match_any_sync(FULL_WARP, lane / 16) == (lane < 16 ? 0x0000FFFFu : 0xFFFF0000u));
    expect("warp_sum", fastprimer::warp_sum(1.0f) == 32 && fastprimer::warp_sum(1.0f, 8) == 8);
  });
}

void check_bank_conflicts() {
  for (const int stride : {16, 128}) {
    emulator::bank_conflicts = 0;
    run_kernel(1, 32, 8 * 128, [=] {
      uint32_t fragment[4];
      fastprimer::load_matrix<false>(fragment, dynamic_shared() + threadIdx.x % 8 * stride);
    });
    expect("bank conflicts of ldmatrix", emulator::bank_conflicts == (stride == 16 ? 0u : 28u));
  }
}

// Warp 1 reads what warp 0 wrote, and nothing orders the two: some seeds must show NaN and some must not.
void check_schedules() {
  int stale = 0, seeds = 20;
  for (int seed = 0; seed < seeds; seed++) {
    setenv("FASTPRIMER_EMULATOR_SEED", std::to_string(seed).c_str(), 1);
    float result = 0;
    run_kernel(1, 64, 4, [&result] {
      float* shared = reinterpret_cast<float*>(dynamic_shared());
      if (threadIdx.x == 0) *shared = 1;
      if (threadIdx.x == 32) result = *shared;
    });
    stale += std::isnan(result);
  }
  expect("seeds lead to different schedules", stale > 0 && stale < seeds);
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool) {
    check_barriers();
    check_masks();
    check_alignment();
    check_limits();
    check_shared_memory();
    check_copies();
    check_collectives();
    check_bank_conflicts();
    if constexpr (!emulator::THREAD_SANITIZER) check_schedules();  // a race on purpose
  });
}
