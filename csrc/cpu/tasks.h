// Scratch memory, and tasks for threads that have some.
#pragma once
#include "kernel.h"
#include "memory.h"
#include "parallel.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

constexpr Error OUT_OF_MEMORY = "out of memory";

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Scratch memory of n numbers; data() is null when there was none.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : bytes_(n * sizeof(T)), data_(static_cast<T*>(borrow(bytes_))) {}
  ~Buffer() { give_back(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t bytes_;
  T* data_;
};

// Every one of B sequences (or experts) in pieces, the last piece of each first: under a causal mask that is the longest work first. Or
// `in_order`, one sequence after another, so that what an expert's pieces read is still in a cache.
class Pieces {
 public:
  struct Piece {
    int32_t b, i;
  };

  // count(b): the pieces of b.
  template <class Count>
  Pieces(int64_t B, const Count& count, bool in_order = false) : size_(total(B, count)), pieces_(size_) {
    if (pieces_.data() == nullptr) return;
    if (in_order) {
      for (int64_t b = 0, n = 0; b < B; b++)
        for (int64_t i = 0; i < count(b); i++) pieces_[n++] = {static_cast<int32_t>(b), static_cast<int32_t>(i)};
      return;
    }
    int64_t most = 0, n = 0;
    for (int64_t b = 0; b < B; b++) most = larger(most, count(b));
    for (int64_t i = most - 1; i >= 0; i--)
      for (int64_t b = 0; b < B; b++)
        if (i < count(b)) pieces_[n++] = {static_cast<int32_t>(b), static_cast<int32_t>(i)};
  }
  bool ready() const { return pieces_.data() != nullptr; }
  int64_t size() const { return size_; }
  Piece operator[](int64_t i) const { return pieces_[i]; }

 private:
  template <class Count>
  static int64_t total(int64_t B, const Count& count) {
    int64_t n = 0;
    for (int64_t b = 0; b < B; b++) n += count(b);
    return n;
  }

  int64_t size_;
  Buffer<Piece> pieces_;
};

// Runs tasks 0..n-1 in their order; each thread takes the next one with a Worker of its own, Worker(context)(task).
template <class Worker, class Context>
Error run_tasks(int64_t n, const Context& context) {
  struct Queue {
    const Context& context;
    int64_t n, next;
  } queue{context, n, 0};
  parallel_ranges(
      n, 1,
      [](void* shared, int64_t, int64_t) {
        Queue& queue = *static_cast<Queue*>(shared);
        Worker worker(queue.context);
        if (!worker.ready()) return;  // the other threads' workers take its part
        for (int64_t i; (i = __atomic_fetch_add(&queue.next, 1, __ATOMIC_RELAXED)) < queue.n;) worker(i);
        finish_stores();
      },
      &queue);
  return queue.next < n ? OUT_OF_MEMORY : nullptr;
}

// The same for many short tasks that take about as long: each thread begins with a stretch of its own, the one whose numbers the operations
// before and after give to it as well, and goes on with what is left of the others'. They are taken by lots: to ask another core for the
// number of each task takes as long as some of them.
template <class Worker, class Context>
Error run_short_tasks(int64_t n, const Context& context) {
  struct Lots {
    const Context& context;
    const int64_t n, count;
    uint64_t taken;  // a bit for each

    bool take(int64_t lot) {
      const uint64_t bit = uint64_t(1) << lot;
      return !(__atomic_load_n(&taken, __ATOMIC_RELAXED) & bit) && !(__atomic_fetch_or(&taken, bit, __ATOMIC_RELAXED) & bit);
    }
  } lots{context, n, smaller(n, 64), 0};
  parallel_ranges(
      lots.count, 1,
      [](void* shared, int64_t begin, int64_t) {
        Lots& lots = *static_cast<Lots*>(shared);
        Worker worker(lots.context);
        if (!worker.ready()) return;
        for (int64_t turn = 0; turn < lots.count; turn++) {
          const int64_t lot = (begin + turn) % lots.count;
          if (!lots.take(lot)) continue;
          for (int64_t i = lot * lots.n / lots.count; i < (lot + 1) * lots.n / lots.count; i++) worker(i);
        }
        finish_stores();
      },
      &lots);
  for (int64_t lot = 0; lot < lots.count; lot++)
    if (lots.take(lot)) return OUT_OF_MEMORY;
  return nullptr;
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
