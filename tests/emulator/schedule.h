// The scheduler: runs the threads of a block in one of the many orders that CUDA allows.
//
// A thread runs until it waits: at a barrier or at a warp operation (a shuffle, ldmatrix, mma, __syncwarp). A warp operation goes on
// when all lanes of its mask have come to it; a barrier when all threads of the block have. Seed 0 takes warps and lanes in turn. Any
// other seed gives warps random priorities and lets the first of them run as far as it can before the next one moves at all, so
// a warp can be a whole barrier ahead of others: that is where missing barriers show. Priorities change now and then.
//
// Reported: threads that wait at different barriers, a barrier after some threads returned, lanes of one mask at different operations,
// a lane outside its own mask, a deadlock, cp.async, TMA or wgmma without a wait, writes past the end of shared memory, stack overflow.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>

#include "block.h"

namespace emulator {

inline char launch_begins, launch_ends;  // what ThreadSanitizer orders a kernel against its surroundings by

inline std::string place(const Thread& thread) {
  if (thread.state == State::returned) return "returned";
  if (thread.state == State::ready) return "running";
  return std::string(thread.where.what) + " (" + thread.where.file + ":" + std::to_string(thread.where.line) + ")";
}

[[noreturn]] inline void report(const Block& block, const std::string& what) {
  std::map<std::string, std::pair<int, unsigned>> places;  // -> how many threads, the first of them
  for (const Thread& thread : block.threads) places.try_emplace(place(thread), 0, thread.rank).first->second.first++;
  std::string message = what;
  for (const auto& [where, threads] : places) {
    message += "\n  " + std::to_string(threads.first) + " threads, the first is " + std::to_string(threads.second) + ": " + where;
  }
  throw Error(message);
}

EMULATOR_UNWATCHED inline void thread_main() {
  Block& block = *running;
  Thread& self = *block.current;
  begin(block.scheduler);
  ignore_accesses();
  acquire(&launch_begins);
  try {
    const Loud loud;
    if (!block.abandoned) (*block.kernel)();
  } catch (const Abandoned&) {
  } catch (...) {
    self.error = std::current_exception();
  }
  release(&launch_ends);
  self.state = State::returned;
  watch_accesses();
  suspend(block.scheduler, self.fiber, true);
  std::abort();
}

class Schedule {
 public:
  Schedule(Block& block, uint64_t seed) : block_(block), seeded_(seed != 0), random_(seed), priority_(block.warps()), lanes_(WARP) {
    std::iota(priority_.begin(), priority_.end(), 0u);
    std::iota(lanes_.begin(), lanes_.end(), 0u);
    if (seeded_) std::shuffle(priority_.begin(), priority_.end(), random_);
  }

  void run() {
    try {
      while (run_warps() || release_barrier() || release_some() || land_copy()) {
      }
      for (const Thread& thread : block_.threads) {
        if (thread.state != State::returned) report(block_, "deadlock");
      }
      if (ended_) report(block_, "a block ended while its TMA copies were under way");
    } catch (...) {
      abandon();
      throw;
    }
    block_.shared.check_ends();
  }

 private:
  void abandon() {
    block_.abandoned = true;
    for (Thread& thread : block_.threads) {
      block_.current = &thread;
      while (thread.state != State::returned) resume(block_.scheduler, thread.fiber);
    }
  }

  // Lets warps run, by priority: one of them when seeded, otherwise each. False: none could.
  bool run_warps() {
    if (seeded_ && random_() % 16 == 0) land_copy();
    bool ran = false;
    for (unsigned warp : priority_) {
      while (run_lanes(warp)) {
        ran = true;
        if (seeded_) break;
      }
      if (ran && seeded_) break;
    }
    if (ran && seeded_ && random_() % 16 == 0) std::shuffle(priority_.begin(), priority_.end(), random_);
    return ran;
  }

  // Runs each ready lane of a warp until it waits. False: none was ready.
  bool run_lanes(unsigned warp) {
    release_warp(warp);
    if (seeded_) std::shuffle(lanes_.begin(), lanes_.end(), random_);
    bool ran = false;
    for (unsigned lane : lanes_) {
      const unsigned rank = warp * WARP + lane;
      if (rank >= block_.threads.size() || block_.threads[rank].state != State::ready) continue;
      run_thread(block_.threads[rank]);
      ran = true;
    }
    return ran;
  }

  void run_thread(Thread& thread) {
    block_.current = &thread;
    resume(block_.scheduler, thread.fiber);
    if (thread.error) std::rethrow_exception(thread.error);
    if (overflowed(thread.fiber)) report(block_, "a thread's stack overflowed");
    if (thread.state == State::returned && !thread.copies.empty()) report(block_, "a thread returned with cp.async copies not waited for");
    if (thread.state == State::returned && !thread.products.empty()) report(block_, "a thread returned with wgmma not waited for");
    if (thread.state == State::returned) ended_ = !block_.tile_copies.empty();
  }

  // Lets go on all lanes whose warp operation is complete.
  void release_warp(unsigned warp) {
    const unsigned first = warp * WARP;
    const unsigned size = std::min<unsigned>(WARP, static_cast<unsigned>(block_.threads.size()) - first);
    const unsigned existing = size == WARP ? ~0u : (1u << size) - 1;
    for (unsigned lane = 0; lane < size; lane++) {
      Thread& thread = block_.threads[first + lane];
      if (thread.state == State::polling && thread.mbarrier->complete(thread.parity)) thread.state = State::ready;
      if (thread.state == State::at_warp && complete(first, lane, thread.mask & existing)) {
        const unsigned mask = thread.mask & existing;
        for (unsigned other = 0; other < size; other++) {
          if (mask >> other & 1) block_.threads[first + other].state = State::ready;
        }
      }
    }
  }

  bool complete(unsigned first, unsigned lane, unsigned mask) {
    const Thread& thread = block_.threads[first + lane];
    if (!(mask >> lane & 1)) report(block_, "a lane is not in the mask of its own warp operation");
    for (unsigned other = 0; other < WARP; other++) {
      if (!(mask >> other & 1)) continue;
      const Thread& partner = block_.threads[first + other];
      if (partner.state != State::at_warp) return false;
      if (partner.mask != thread.mask || !(partner.where == thread.where))
        report(block_, "lanes of one mask are at different warp operations");
    }
    return true;
  }

  // Lets all threads go on if each waits at the same barrier. False: they do not wait at a barrier.
  bool release_barrier() {
    const auto waiting = [](const Thread& thread) { return thread.state == State::at_barrier; };
    const auto first = std::find_if(block_.threads.begin(), block_.threads.end(), waiting);
    if (first == block_.threads.end()) return false;
    for (const Thread& thread : block_.threads) {
      if (thread.state == State::returned) report(block_, "some threads returned, and others wait at a barrier for them");
      if (thread.state != State::at_barrier) return false;
      if (!(thread.where == first->where)) report(block_, "threads of one block wait at different barriers");
    }
    for (Thread& thread : block_.threads) thread.state = State::ready;
    return true;
  }

  // Lets the threads at a barrier of some threads go on when all of these have come. False: none is complete.
  bool release_some() {
    std::vector<Thread*> waiting[Block::BARRIERS];
    for (Thread& thread : block_.threads) {
      if (thread.state == State::at_some) waiting[thread.barrier].push_back(&thread);
    }
    for (const std::vector<Thread*>& threads : waiting) {
      if (threads.empty()) continue;
      for (const Thread* thread : threads) {
        if (thread->barrier_threads != threads[0]->barrier_threads) report(block_, "threads wait at one barrier with different numbers");
      }
      if (threads.size() > threads[0]->barrier_threads) report(block_, "more threads wait at a barrier than it is for");
      if (threads.size() < threads[0]->barrier_threads) continue;
      for (Thread* thread : threads) thread->state = State::ready;
      return true;
    }
    return false;
  }

  // Lets a TMA copy arrive. False: none is under way.
  bool land_copy() {
    std::vector<TileCopy>& copies = block_.tile_copies;
    if (copies.empty()) return false;
    const size_t which = seeded_ ? random_() % copies.size() : 0;
    const TileCopy copy = std::move(copies[which]);
    copies.erase(copies.begin() + which);
    copy.write();
    copy.barrier->receive(copy.bytes);
    return true;
  }

  Block& block_;
  bool seeded_;
  bool ended_ = false;  // with copies under way
  std::mt19937_64 random_;
  std::vector<unsigned> priority_, lanes_;
};

// Runs one block to its end on the calling thread of the operating system. Neighbouring blocks have different stacks, so that to
// ThreadSanitizer their threads are different ones, and a race between blocks is one.
inline void run_block(Block& block, uint64_t seed) {
  constexpr unsigned SETS = THREAD_SANITIZER ? 4 : 1;
  static thread_local Stacks sets[SETS];
  static thread_local unsigned turn = 0;
  Stacks& stacks = sets[turn++ % SETS];
  running = &block;
#if defined(__SANITIZE_THREAD__)
  block.scheduler.watched = __tsan_get_current_fiber();
#endif
  stacks.reserve(block.threads.size());
  for (Thread& thread : block.threads) create(thread.fiber, stacks.stack(thread.rank), stacks.watched(thread.rank), &thread_main);
  Schedule(block, seed).run();
  running = nullptr;
}

}  // namespace emulator
