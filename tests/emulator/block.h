// A block of CUDA threads while it runs, and how a thread waits for others.
#pragma once
#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <utility>
#include <vector>

#include "fiber.h"
#include "mbarrier.h"
#include "memory.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr unsigned WARP = 32;

// Where in a kernel a thread waits. A function that waits takes as its last parameter, and never by hand, its caller's place:
//   Where where = {"its name", __builtin_FILE(), __builtin_LINE()}
struct Where {
  const char* what;
  const char* file;
  int line;
  bool operator==(const Where&) const = default;
};

enum class State { ready, at_barrier, at_some, at_warp, polling, returned };

// A cp.async under way.
struct AsyncCopy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes;
  int group;
};

// A product of a warpgroup (wgmma) under way, as a thread sees it: d, a part of its registers, and the operands.
struct Product {
  float* d;
  unsigned columns;
  const uint32_t* a_registers;  // null: a comes from shared memory
  uint64_t a, b;
  bool add;
  float (*wide)(uint16_t);
  int group;
  uint64_t operands;  // what a digest of the operands in shared memory was when it began
};

// The numbers of registers that products are under way to; the registers themselves are poison until those are waited for.
struct Accumulator {
  float* d;
  std::vector<float> numbers;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  unsigned rank = 0;  // in the block
  State state = State::ready;
  unsigned mask = 0;  // of the warp operation it waits at
  Where where{};
  unsigned operations = 0;  // how many warp operations it has begun
  std::vector<AsyncCopy> copies;
  int copy_group = 0;
  const MBarrier* mbarrier = nullptr;  // that it polls, for the end of a phase of this parity
  unsigned parity = 0;
  unsigned barrier = 0, barrier_threads = 0;  // that it waits at, with as many
  std::vector<unsigned> stored;               // the 16 bytes of `unfenced` that are its own
  std::vector<Product> products;
  std::vector<Accumulator> accumulators;
  int product_group = 0;
  std::vector<std::pair<const void*, const void*>> fenced;  // its registers that products may use: first, end
  unsigned registers = 0;                                   // that it asked for
  std::exception_ptr error;
};

// What a thread offers to the others of its warp during a warp operation.
struct alignas(16) Offer {
  std::array<unsigned char, 32> bytes;
};

// A TMA copy under way. `write` lets its bytes arrive.
struct TileCopy {
  MBarrier* barrier;
  int bytes;
  std::function<void()> write;
};

struct Block {
  static constexpr unsigned BARRIERS = 16, CHUNK = 16;

  Block(dim3 index, dim3 dim, dim3 grid, size_t dynamic_bytes)
      : index(index),
        dim(dim),
        grid(grid),
        threads(dim.x * dim.y * dim.z),
        shared(dynamic_bytes),
        unfenced(dynamic_bytes / CHUNK + 1),
        warp_order(warps()) {
    offers[0].resize(threads.size());
    offers[1].resize(threads.size());
    for (unsigned i = 0; i < threads.size(); i++) {
      threads[i].rank = i;
      threads[i].index = dim3(i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y));
    }
  }

  unsigned warps() const { return (static_cast<unsigned>(threads.size()) + WARP - 1) / WARP; }

  dim3 index, dim, grid;
  std::vector<Thread> threads;
  SharedMemory shared;
  std::vector<uint16_t> unfenced;  // by 16 bytes of dynamic shared memory: 1 + the thread whose store no fence_async has followed
  std::vector<TileCopy> tile_copies;
  std::vector<std::pair<MBarrier*, unsigned>> mbarriers;  // and the threads that initialised them
  std::vector<Offer> offers[2];  // two, for a lane may begin its next operation while another still reads this one's
  const std::function<void()>* kernel = nullptr;
  Fiber scheduler;
  Thread* current = nullptr;
  bool abandoned = false;
  char barrier_order[BARRIERS] = {};  // what ThreadSanitizer orders a block's barriers by
  std::vector<char> warp_order;       // and each warp's
  uint64_t bank_conflicts = 0;
};

inline thread_local Block* running = nullptr;

inline Thread& thread() { return *running->current; }
inline unsigned lane() { return thread().rank % WARP; }

// Thrown where the threads of a failed block wait, so that they leave the kernel and clean up after themselves.
struct Abandoned {};

inline void wait(State state, unsigned mask, const Where& where) {
  Thread& self = thread();
  self.state = state;
  self.mask = mask;
  self.where = where;
  suspend(running->scheduler, self.fiber, false);
  if (running->abandoned) throw Abandoned();
}

// __syncthreads and __syncwarp: they order memory.
inline void barrier(const Where& where) {
  const Quiet quiet;
  char* order = &running->barrier_order[0];
  release(order);
  wait(State::at_barrier, 0, where);
  acquire(order);
}

// bar.sync with a number, of some warps of the block.
inline void barrier_of(unsigned id, unsigned threads, const Where& where) {
  const Quiet quiet;
  if (id == 0 || id >= Block::BARRIERS) throw Error("a barrier of some threads must be one of 1 to 15");
  if (threads == 0 || threads % WARP != 0 || threads > running->threads.size())
    throw Error("a barrier must be of whole warps of the block");
  thread().barrier = id;
  thread().barrier_threads = threads;
  char* order = &running->barrier_order[id];
  release(order);
  wait(State::at_some, 0, where);
  acquire(order);
}

inline void warp_barrier(unsigned mask, const Where& where) {
  const Quiet quiet;
  char* order = &running->warp_order[thread().rank / WARP];
  release(order);
  wait(State::at_warp, mask, where);
  acquire(order);
}

}  // namespace emulator
