// What AddressSanitizer and ThreadSanitizer must be told about the emulator. Without a sanitizer all of this is empty.
//
// ThreadSanitizer sees every CUDA thread as a thread of its own. It must watch the kernel's accesses and nothing of the emulator's:
// a Quiet scope stands around all emulator code, and a Loud scope, inside it, around accesses made on the kernel's behalf. Order
// between CUDA threads exists only where CUDA promises it: `release` before and `acquire` after a barrier. What a kernel forgot to
// order is then reported as a race, even though here only one thread runs at a time.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define EMULATOR_UNWATCHED __attribute__((no_sanitize_thread))
#else
#define EMULATOR_UNWATCHED
#endif

namespace emulator {

#if defined(__SANITIZE_THREAD__)
constexpr bool THREAD_SANITIZER = true;

inline void ignore_accesses() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void watch_accesses() {
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}
inline void release(void* order) { __tsan_release(order); }
inline void acquire(void* order) { __tsan_acquire(order); }
#else
constexpr bool THREAD_SANITIZER = false;

inline void ignore_accesses() {}
inline void watch_accesses() {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

struct Quiet {
  Quiet() { ignore_accesses(); }
  ~Quiet() { watch_accesses(); }
  Quiet(const Quiet&) = delete;
};

struct Loud {
  Loud() { watch_accesses(); }
  ~Loud() { ignore_accesses(); }
  Loud(const Loud&) = delete;
};

}  // namespace emulator
