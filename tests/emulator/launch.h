// A kernel launch: all blocks of a grid, in an order and on schedules that one seed decides, on a few threads of the operating system.
//
// FASTPRIMER_EMULATOR_SEED (an environment variable, read at every launch) is the seed; 0 or none is the plain order.
// FASTPRIMER_EMULATOR_CAPABILITY is the major compute capability that kernels are chosen for; 8 if there is none.
#pragma once
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "schedule.h"

namespace emulator {

constexpr int MULTIPROCESSORS = 4;
constexpr unsigned OS_THREADS = THREAD_SANITIZER ? 1 : 2;
constexpr unsigned MOST_THREADS = 1024;

inline std::atomic<uint64_t> bank_conflicts{0};  // of ldmatrix, since it was last set to 0

inline uint64_t seed() { return number("FASTPRIMER_EMULATOR_SEED", 0); }

inline void check_limits(dim3 grid, dim3 block) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > MOST_THREADS || block.z > 64) throw Error("a block must have 1 to 1024 threads");
  if (grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    throw Error("a grid must have 1 to 2^31 - 1 blocks in x, 1 to 65535 in y and z");
  }
}

class Grid {
 public:
  Grid(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& kernel)
      : grid_(grid), dim_(block), dynamic_bytes_(dynamic_bytes), kernel_(kernel), seed_(seed()) {
    blocks_ = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    // Seeded: a walk through the blocks in steps that have no common divisor with their number.
    std::mt19937_64 random(seed_);
    first_ = seed_ == 0 ? 0 : random() % blocks_;
    while (seed_ != 0 && std::gcd(step_ = random() % blocks_ + 1, blocks_) != 1) {
    }
  }

  void run() {
    std::vector<std::thread> helpers;
    for (uint64_t i = 1; i < OS_THREADS && i < blocks_; i++) helpers.emplace_back([this] { work(); });
    work();
    for (std::thread& helper : helpers) helper.join();
    if (failed_) throw Error(failure_);
  }

 private:
  void work() {
    for (uint64_t turn; !failed_ && (turn = next_++) < blocks_;) {
      const uint64_t i = static_cast<uint64_t>((first_ + static_cast<unsigned __int128>(turn) * step_) % blocks_);
      const dim3 index(i % grid_.x, i / grid_.x % grid_.y, i / grid_.x / grid_.y);
      try {
        Block block(index, dim_, grid_, dynamic_bytes_);
        block.kernel = &kernel_;
        run_block(block, seed_ == 0 ? 0 : seed_ * 0x9E3779B97F4A7C15ull + i + 1);
        bank_conflicts += block.bank_conflicts;
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex_);
        failure_ =
            "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + "): " + error.what();
        failed_ = true;
      }
    }
  }

  dim3 grid_, dim_;
  size_t dynamic_bytes_;
  const std::function<void()>& kernel_;
  uint64_t seed_, blocks_, first_ = 0, step_ = 1;
  std::atomic<uint64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::string failure_;
};

// Null, or what went wrong; the text lives until the calling thread's next launch.
inline const char* launch(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& kernel) {
  static thread_local std::string failure;
  const Quiet quiet;
  failure.clear();
  release(&launch_begins);
  try {
    check_limits(grid, block);
    Grid(grid, block, dynamic_bytes, kernel).run();
  } catch (const std::exception& error) {
    failure = std::string("emulator: ") + error.what();
  }
  acquire(&launch_ends);
  return failure.empty() ? nullptr : failure.c_str();
}

}  // namespace emulator
