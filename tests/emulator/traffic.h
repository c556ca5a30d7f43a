// Bytes that kernels load and store in global memory, through load() and store().
#pragma once
#include <atomic>
#include <cstdint>

namespace emulator {

inline std::atomic<int64_t> traffic{0};

inline void count_traffic(int64_t bytes) { traffic.fetch_add(bytes, std::memory_order_relaxed); }

}  // namespace emulator
