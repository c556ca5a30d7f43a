// A fibre: a stack and a set of registers that run until they hand over, by hand, to another. Each CUDA thread is a fibre, and all
// fibres of a block share one thread of the operating system, so a block of 1024 threads costs no more than its stacks.
//
// `resume` runs a fibre from the scheduler until it calls `suspend`, which comes back to the scheduler.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "sanitizer.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t STACK_BYTES = 128 << 10;  // only the pages that are touched exist
constexpr uint64_t STACK_END = 0x5AFE57AC5AFE57ACull;

struct Fiber {
  char* stack = nullptr;  // null for the scheduler, which has the operating system's
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* watched = nullptr;
#endif
};

#if defined(__x86_64__)
// Saves the registers that a function must keep on the old stack, and takes those of the new one.
extern "C" void emulator_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(.text
.weak emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

EMULATOR_UNWATCHED inline void switch_registers(Fiber& from, Fiber& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }

inline void enter_at(Fiber& fiber, void (*entry)()) {
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES);
  top[-1] = nullptr;  // where entry would return to; it never does, and unwinding stops here
  top[-2] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 8;  // six registers below it
}
#else
EMULATOR_UNWATCHED inline void switch_registers(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void enter_at(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}
#endif

// Makes a fibre on a stack of its own that will run `entry`, a function that never returns.
inline void create(Fiber& fiber, char* stack, [[maybe_unused]] void* watched, void (*entry)()) {
  fiber.stack = stack;
  std::memcpy(stack, &STACK_END, sizeof STACK_END);
  enter_at(fiber, entry);
#if defined(__SANITIZE_THREAD__)
  fiber.watched = watched;
#endif
}

inline bool overflowed(const Fiber& fiber) { return std::memcmp(fiber.stack, &STACK_END, sizeof STACK_END) != 0; }

EMULATOR_UNWATCHED inline void resume(Fiber& scheduler, Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, fiber.stack, STACK_BYTES);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.watched, __tsan_switch_to_fiber_no_sync);
#endif
  switch_registers(scheduler, fiber);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

EMULATOR_UNWATCHED inline void suspend(Fiber& scheduler, Fiber& fiber, [[maybe_unused]] bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber.fake_stack, scheduler.stack_bottom, scheduler.stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler.watched, __tsan_switch_to_fiber_no_sync);
#endif
  switch_registers(fiber, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

// A fibre's first act.
EMULATOR_UNWATCHED inline void begin([[maybe_unused]] Fiber& scheduler) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
}

// Stacks for the fibres of one block, used again by later ones. ThreadSanitizer knows each stack as one thread for good.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks() { discard(); }

  void reserve(size_t count) {
    if (count > count_) {
      discard();
      allocate(count);
    }
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(memory_, count_ * STACK_BYTES);
#endif
  }

  char* stack(size_t i) { return memory_ + i * STACK_BYTES; }
  void* watched(size_t i) { return watched_[i]; }

 private:
  void allocate(size_t count) {
    void* memory = mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block");
    memory_ = static_cast<char*>(memory);
    count_ = count;
    watched_.resize(count);
#if defined(__SANITIZE_THREAD__)
    for (void*& fiber : watched_) fiber = __tsan_create_fiber(0);
#endif
  }

  void discard() {
#if defined(__SANITIZE_THREAD__)
    for (void* fiber : watched_) __tsan_destroy_fiber(fiber);
#endif
    if (memory_ != nullptr) munmap(memory_, count_ * STACK_BYTES);
    watched_.clear();
    memory_ = nullptr;
    count_ = 0;
  }

  char* memory_ = nullptr;
  size_t count_ = 0;
  std::vector<void*> watched_;
};

}  // namespace emulator
