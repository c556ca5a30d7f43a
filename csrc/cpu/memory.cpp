#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastprimer {

void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t page = 4096, large = 8 << 20;
  if (bytes < large) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~uintptr_t(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(page - 1);
  // A hint: where it is refused, small pages do.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace fastprimer
