// Threads for the kernels: torch's own pool, reached without a torch header.
#pragma once
#include <cstdint>

namespace fastprimer {

// Splits 0..n into ranges of at least `grain` and runs body(context, begin, end) on them, in torch's threads.
void parallel_ranges(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

#ifdef FASTPRIMER_ISA
inline namespace FASTPRIMER_ISA {

constexpr int64_t GRAIN = 1 << 15;  // numbers that are worth a thread of their own

// Makes this thread's stores past the caches (columns.h) visible to the others.
inline void finish_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// body(i) for i = 0..n-1. What i computes must not depend on which thread runs it, nor on how many threads there are.
template <class Body>
inline void parallel_for(int64_t n, int64_t grain, const Body& body) {
  parallel_ranges(
      n, grain,
      [](void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) (*static_cast<const Body*>(context))(i);
        finish_stores();
      },
      const_cast<Body*>(&body));
}

}  // namespace FASTPRIMER_ISA
#endif
}  // namespace fastprimer
