// Decoding on the CPU: which keys the queries see, in chunks that are worked on side by side, and where the tokens of a cache lie.
#pragma once
#include "attention_plan.h"
#include "decoding.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace decoding_pass {

constexpr int64_t CHUNK = 256;        // keys whose softmax is computed together; chunks begin at its multiples
constexpr int64_t ROW_BYTES = 4096;   // of a token that a task reads at a time, at most: memory is read best in order
constexpr int64_t ROWS_OF_TASK = 64;  // of queries

// What a task computes: the keys of one chunk that any query of a sequence sees, for some of the key/value heads.
struct Chunk {
  Sequence sequence;
  int64_t index;  // among all chunks
  Range keys;
  int64_t first, heads;
};

// Keys in rows row .. row + n - 1 of a page.
struct Block {
  int64_t n, page, row;
};

class Plan {
 public:
  const Decoding& a;
  const int64_t rows;    // of a key/value head: its queries times the query heads of its group
  const int64_t heads;   // key/value heads that a task takes
  const int64_t groups;  // of so many heads

  explicit Plan(const Decoding& args, int64_t element_bytes)
      : a(args),
        rows(args.S * (args.H / args.Hk)),
        heads(heads_of_task(args, element_bytes)),
        groups((args.Hk + heads - 1) / heads),
        first_(args.B + 1) {
    if (!ready()) return;
    first_[0] = 0;
    for (int64_t b = 0; b < a.B; b++) {
      const Range seen = seen_by(sequence(b));
      first_[b + 1] = first_[b] + (seen.empty() ? 0 : (seen.end - 1) / CHUNK - seen.begin / CHUNK + 1);
    }
  }
  bool ready() const { return first_.data() != nullptr; }

  Sequence sequence(int64_t b) const {
    const int64_t T = a.cache_seqlens[b] + a.appended;
    return {b, a.S, T, 0, 0, smaller(a.left, a.S + T), smaller(a.right, a.S + T)};
  }
  static Range seen_by(const Sequence& s) { return s.keys_of({0, s.S}); }

  int64_t chunks() const { return first_[a.B]; }
  Range chunks_of(int64_t b) const { return {first_[b], first_[b + 1]}; }
  int64_t tasks() const { return first_[a.B] * groups; }
  Chunk chunk(int64_t task) const {
    const int64_t index = task / groups, first = task % groups * heads;
    Range sequences = {0, a.B};
    while (sequences.begin + 1 < sequences.end) {
      const int64_t middle = (sequences.begin + sequences.end) / 2;
      (first_[middle] <= index ? sequences.begin : sequences.end) = middle;
    }
    const Sequence s = sequence(sequences.begin);
    const Range seen = seen_by(s);
    const int64_t begin = (seen.begin / CHUNK + index - first_[s.batch]) * CHUNK;
    return {s, index, {larger(begin, seen.begin), smaller(begin + CHUNK, seen.end)}, first, smaller(heads, a.Hk - first)};
  }

  int64_t position(int64_t row) const { return row / (a.H / a.Hk); }
  int64_t query_head(int64_t kv_head, int64_t row) const { return kv_head * (a.H / a.Hk) + row % (a.H / a.Hk); }

  // At most n keys of sequence b from key j on that lie in consecutive rows of a page.
  Block block(int64_t b, int64_t j, int64_t n) const {
    const int64_t page = j / a.page_size, row = j - page * a.page_size;
    return {smaller(n, a.page_size - row), a.block_table ? a.block_table[b * a.pages_of_sequence + page] : b, row};
  }

 private:
  static int64_t heads_of_task(const Decoding& a, int64_t element_bytes) {
    if (a.k_cache.stride_head >= a.k_cache.stride_token) return 1;  // the next head lies far away
    const int64_t by_bytes = ROW_BYTES / (a.D * element_bytes), by_rows = ROWS_OF_TASK / (a.S * (a.H / a.Hk));
    return larger(smaller(a.Hk, smaller(by_bytes, by_rows)), 1);
  }

  Buffer<int64_t> first_;  // the chunks before those of each sequence
};

template <class T>
T* row_of(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(const_cast<void*>(x.data)) + batch * x.stride_batch + token * x.stride_token + head * x.stride_head;
}

}  // namespace decoding_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
