#include "memory.h"

#include <cstdlib>
#include <vector>

#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#endif

namespace fastprimer {
namespace {

// Sizes of blocks: four between a power of two and the next one.
int64_t size_of_block(int64_t bytes) {
  int64_t step = 64;
  while (step <= bytes / 8) step *= 2;
  return (bytes / step + (bytes % step != 0 || bytes == 0)) * step;
}

// What a thread has given back, the oldest first.
class Kept {
 public:
  ~Kept() { keep_at_most(0); }

  void* take(int64_t size) {
    for (auto block = blocks_.end(); block != blocks_.begin();)
      if ((--block)->size == size) {
        void* const data = block->data;
        blocks_.erase(block);
        total_ -= size;
        return data;
      }
    return nullptr;
  }

  void add(void* data, int64_t size) {
    if (size > MOST / 2) return std::free(data);  // and not all others for it
    blocks_.push_back({data, size});
    total_ += size;
    keep_at_most(MOST);
  }

 private:
  static constexpr int64_t MOST = 4 << 20;
  struct Block {
    void* data;
    int64_t size;
  };

  void keep_at_most(int64_t bytes) {
    auto block = blocks_.begin();
    for (; total_ > bytes; ++block) {
      total_ -= block->size;
      std::free(block->data);
    }
    blocks_.erase(blocks_.begin(), block);
  }

  std::vector<Block> blocks_;
  int64_t total_ = 0;
};

thread_local Kept kept;
bool poisoned = false;

}  // namespace

void* borrow(int64_t bytes) {
  const int64_t size = size_of_block(bytes);
  void* data = kept.take(size);
  if (data == nullptr) data = std::aligned_alloc(64, size);
  if (poisoned && data) __builtin_memset(data, 0xFF, size);
  return data;
}

void give_back(void* data, int64_t bytes) {
  if (data) kept.add(data, size_of_block(bytes));
}

bool poison_scratch(bool poison) {
  const bool before = poisoned;
  poisoned = poison;
  return before;
}

bool memory_is_poisoned() { return poisoned; }

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
