#include "memory.h"

#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#endif

namespace fastprimer {

#if defined(__linux__)
namespace {

constexpr uintptr_t HUGE_PAGE = 2 << 20;
constexpr int64_t LARGE = 4 * HUGE_PAGE;
// A huge page is cleared in 0.1 to 0.2 ms; its 512 small pages take about 0.9 ms; one that the host must back, 3 ms.
constexpr std::chrono::microseconds QUICK{600};

struct Touching {
  char* first;
  std::atomic<bool> slow{false};

  void pages(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && !slow; i++) {
      const auto start = std::chrono::steady_clock::now();
      __atomic_fetch_or(first + i * HUGE_PAGE, 0, __ATOMIC_RELAXED);  // a write that changes nothing
      if (std::chrono::steady_clock::now() - start > QUICK) slow = true;
    }
  }
};

}  // namespace

void expect_writes(void* data, int64_t bytes) {
  if (bytes < LARGE) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(HUGE_PAGE - 1);
  Touching touching{reinterpret_cast<char*>(begin)};
  if (madvise(touching.first, end - begin, MADV_HUGEPAGE) != 0) return;  // refused: small pages do
  parallel_ranges((end - begin) / HUGE_PAGE, 1, [](void* t, int64_t b, int64_t e) { static_cast<Touching*>(t)->pages(b, e); }, &touching);
  if (touching.slow) (void)madvise(touching.first, end - begin, MADV_NOHUGEPAGE);
}
#else
void expect_writes(void*, int64_t) {}
#endif

}  // namespace fastprimer
