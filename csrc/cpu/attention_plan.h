// What attention's CPU kernels share: which sequence lies where, and which keys a query sees.
#pragma once
#include "attention.h"
#include "pack.h"
#include "simd_math.h"
#include "tasks.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

constexpr int64_t KEY_BLOCK = 128;  // keys that meet a tile of queries at a time
// Or fewer keys, in steps of these, where a mask or the sequence ends, and fewer queries: short sequences are not padded to long ones.
constexpr int64_t KEY_STEP = 16;
#if defined(__AVX512F__)
constexpr int64_t ROW_STEP = 32;  // the library generates code for each size of a product: few of them
#else
constexpr int64_t ROW_STEP = TRANSPOSED;
#endif

struct Range {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
  int64_t size() const { return end - begin; }
  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
  // Of this range, what lies in `block`, counted from its begin.
  Range within(Range block) const { return {larger(begin, block.begin) - block.begin, smaller(end, block.end) - block.begin}; }
  // Unless it is empty, the same and as much on either side as makes both ends multiples of `step`.
  Range widened(int64_t step) const { return empty() ? Range{0, 0} : Range{begin / step * step, round_up(end, step)}; }
};

// Which of a register's lanes, the first one counted as `first`, are in the range.
inline auto lanes_within(Range range, int64_t first) {
  const Vec<float> number = lane_numbers() + static_cast<float>(first);
  return (number >= static_cast<float>(range.begin)) & (number < static_cast<float>(range.end));
}

// One sequence: S queries, T keys. In packed tensors its tokens begin at q_begin and k_begin.
struct Sequence {
  int64_t batch, S, T, q_begin, k_begin, left, right;

  // The keys that query i sees.
  Range keys_of(int64_t i) const {
    const int64_t diagonal = i + T - S;
    return {left < 0 ? 0 : larger(diagonal - left, 0), right < 0 ? T : smaller(diagonal + right + 1, T)};
  }
  // The queries that see key j.
  Range queries_of(int64_t j) const {
    const int64_t diagonal = j + S - T;
    return {right < 0 ? 0 : larger(diagonal - right, 0), left < 0 ? S : smaller(diagonal + left + 1, S)};
  }
  Range queries_of(Range keys) const { return {queries_of(keys.begin).begin, queries_of(keys.end - 1).end}; }
  Range keys_of(Range queries) const { return {keys_of(queries.begin).begin, keys_of(queries.end - 1).end}; }
};

template <class T>
const T* token(const Heads& x, const Sequence& sequence, int64_t begin, int64_t i, int64_t head) {
  return static_cast<const T*>(x.data) + sequence.batch * x.stride_batch + (begin + i) * x.stride_token + head * x.stride_head;
}

// The sequences of a problem, and where the keys of each lie in packed scratch memory: padded to KEY_STEP, heads first.
class Plan {
 public:
  const AttentionProblem& p;
  const int64_t G;  // query heads of a key/value head

  explicit Plan(const AttentionProblem& problem) : p(problem), G(problem.H / problem.Hk), padded_(problem.B + 1) {
    if (padded_.data() == nullptr) return;
    padded_[0] = 0;
    for (int64_t b = 0; b < p.B; b++) padded_[b + 1] = padded_[b] + round_up(sequence(b).T, KEY_STEP);
  }
  bool ready() const { return padded_.data() != nullptr; }

  Sequence sequence(int64_t b) const {
    const int32_t *q = p.cu_seqlens_q, *k = p.cu_seqlens_k;
    const int64_t S = q ? q[b + 1] - q[b] : p.S, T = k ? k[b + 1] - k[b] : p.T;
    return {b, S, T, q ? q[b] : 0, k ? k[b] : 0, smaller(p.left, S + T), smaller(p.right, S + T)};
  }

  int64_t padded_keys() const { return ready() ? p.Hk * padded_[p.B] : 0; }
  int64_t padded_key(int64_t b, int64_t kv_head, int64_t j) const { return kv_head * padded_[p.B] + padded_[b] + j; }
  // Of the block that begins at key n0 of sequence b.
  int64_t block_width(int64_t b, int64_t n0) const { return smaller(KEY_BLOCK, padded_[b + 1] - padded_[b] - n0); }

  // Where row 0 of query head h of a sequence lies in lse and in o.
  int64_t lse_offset(const Sequence& s, int64_t h, int64_t stride_batch, int64_t stride_head) const {
    return s.batch * stride_batch + h * stride_head + s.q_begin;
  }
  int64_t query_token(const Sequence& s, int64_t i) const { return (p.cu_seqlens_q ? s.q_begin : s.batch * p.S) + i; }
  // Of the rows of o, and of dq.
  int64_t query_row(const Sequence& s, int64_t i, int64_t h) const { return query_token(s, i) * p.H + h; }
  int64_t key_token(const Sequence& s, int64_t j) const { return (p.cu_seqlens_k ? s.k_begin : s.batch * p.T) + j; }

 private:
  Buffer<int64_t> padded_;
};

// Rows of a tile of queries: the query heads of one key/value head, position by position, so that a block of keys serves them all.
struct QueryTile {
  const Sequence sequence;
  const int64_t kv_head, row0, rows, G;
  const Range positions;

  QueryTile(const Sequence& s, int64_t head, int64_t first, int64_t n, int64_t group)
      : sequence(s), kv_head(head), row0(first), rows(n), G(group), positions{first / group, (first + n - 1) / group + 1} {}

  int64_t padded() const { return round_up(rows, ROW_STEP); }
  // body(r, position, query head) for every row, by counting: a division takes as long as all else about a row of a short sequence.
  template <class Body>
  void for_rows(const Body& body) const {
    for_rows({0, rows}, body);
  }
  template <class Body>
  void for_rows(Range some, const Body& body) const {
    int64_t position = (row0 + some.begin) / G, of_group = row0 + some.begin - position * G;
    for (int64_t r = some.begin; r < smaller(some.end, rows); r++) {
      body(r, position, kv_head * G + of_group);
      if (++of_group < G) continue;
      of_group = 0;
      position++;
    }
  }
  // The rows of these queries, counted from row0.
  Range rows_of(Range queries) const { return Range{queries.begin * G, queries.end * G}.within({row0, row0 + rows}); }
  // The positions of the tile's rows among these; there must be one.
  Range positions_of(Range some) const { return {(row0 + some.begin) / G, (row0 + smaller(some.end, rows) - 1) / G + 1}; }
};

// Some rows of a tile and some keys, which meet: both begin and end at multiples of their steps.
struct Patch {
  Range rows, keys;

  // Whether every row of the tile that is in the patch sees every key of it.
  bool seen_by_all(const QueryTile& tile) const {
    const Range positions = tile.positions_of(rows);
    return tile.sequence.keys_of(positions.end - 1).begin <= keys.begin && tile.sequence.keys_of(positions.begin).end >= keys.end;
  }
};

// body(block, keys) for the keys that a tile's rows see, at most a block of packed keys at a time: `keys` begin and end at multiples of
// KEY_STEP within the block that begins at key `block`.
template <class Body>
void for_key_blocks(const QueryTile& tile, const Body& body) {
  const Range seen = tile.sequence.keys_of(tile.positions);
  if (seen.empty()) return;
  const int64_t end = round_up(seen.end, KEY_STEP);
  for (int64_t begin = seen.begin / KEY_STEP * KEY_STEP; begin < end;) {
    const int64_t block = begin / KEY_BLOCK * KEY_BLOCK, stop = smaller(block + KEY_BLOCK, end);
    body(block, Range{begin, stop});
    begin = stop;
  }
}

// body(patch) for patches that hold all pairs of a tile's rows and of `keys` in which a row sees a key, and few others: rows in strips,
// each with the keys that it needs. Neighbouring strips that need the same keys are one, for products of few rows take longer.
template <class Body>
void for_strips_of_rows(const QueryTile& tile, Range keys, const Body& body) {
  constexpr int64_t STRIP = 32;
  Patch patch{};
  for (int64_t r = 0; r < tile.rows; r += STRIP) {
    const Range rows{r, smaller(r + STRIP, tile.padded())}, seen = tile.sequence.keys_of(tile.positions_of(rows));
    const Range needed = Range{larger(seen.begin, keys.begin), smaller(seen.end, keys.end)}.widened(KEY_STEP);
    if (needed == patch.keys) {
      patch.rows.end = rows.end;
    } else {
      if (!patch.keys.empty()) body(patch);
      patch = {rows, needed};
    }
  }
  if (!patch.keys.empty()) body(patch);
}

// The same with keys in strips, each with the rows that it needs.
template <class Body>
void for_strips_of_keys(const QueryTile& tile, Range keys, const Body& body) {
  Patch patch{};
  for (int64_t j = keys.begin; j < smaller(keys.end, tile.sequence.T); j += KEY_STEP) {
    const Range strip{j, j + KEY_STEP};
    const Range needed = tile.rows_of(tile.sequence.queries_of({j, smaller(j + KEY_STEP, tile.sequence.T)})).widened(ROW_STEP);
    if (needed == patch.rows) {
      patch.keys.end = strip.end;
    } else {
      if (!patch.rows.empty()) body(patch);
      patch = {needed, strip};
    }
  }
  if (!patch.rows.empty()) body(patch);
}

// The rows of a tile from a tensor like q.
template <class T, class Tile>
void gather_queries(const Heads& x, const QueryTile& tile, const Width<Tile>& width, Tile* to) {
  tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
    gather_row(token<T>(x, tile.sequence, tile.sequence.q_begin, position, head), width, to + r * width.ld);
  });
  __builtin_memset(to + tile.rows * width.ld, 0, (tile.padded() - tile.rows) * width.ld * sizeof(Tile));
}

// Scores in units of log 2, factor (sign q) k: of scale, the sign goes to the queries. (With a scale of 0, or one that is 0 in float32, the
// queries are 0, and the factor is not: it would make NaN of -infinity.)
struct Scale {
  float factor, sign, cap;  // cap: 0, or scores become cap tanh(scores / cap)

  explicit Scale(const AttentionProblem& p) : Scale(static_cast<float>(p.scale) * LOG2_E, p.softcap) {}
  Scale(float scale, double softcap)
      : factor(scale == 0 ? 1 : __builtin_fabsf(scale)),
        sign(static_cast<float>((scale > 0) - (scale < 0))),
        cap(static_cast<float>(softcap) * LOG2_E) {}

  template <class Tile>
  void apply_sign(Tile* queries, int64_t n) const {
    if (sign == 1) return;
    for_columns<float>(0, n, [&](int64_t c, auto count, int) { store(queries + c, load(queries + c, count) * sign, count); });
  }

  // The scores of some products of queries, with their sign, and keys; tanh: of the softcap.
  struct Capped {
    Vec<float> z, tanh;
  };
  ALWAYS_INLINE Capped operator()(Vec<float> products) const {
    if (cap == 0) return {products * factor, Vec<float>{}};
    const Vec<float> t = tanh_of(products * (factor / cap));
    return {t * cap, t};
  }
};

// n sums times a factor, in T.
template <class T>
inline void write_row(const float* sums, int64_t n, float factor, T* to) {
  for_columns<float>(0, n, [&](int64_t c, auto count, int) { store(to + c, load(sums + c, count) * factor, count); });
}

// Of some rows, the running softmax in units of log 2: the top that scores are taken from, the total of p = exp2(score - top), and where
// there are sinks, the row's. A row that sees nothing has the total 0.
struct Softmax {
  const Buffer<float> top, total, sink;

  explicit Softmax(int64_t rows) : top(rows), total(rows), sink(rows) {}
  bool ready() const { return top.data() && total.data() && sink.data(); }

  // In place of the tops of n rows lse, and of their totals what o is to be multiplied by. The buffers hold a multiple of LANES.
  void finish(int64_t n, bool sinks) const {
    for (int64_t r = 0; r < n; r += LANES) {
      Vec<float> highest = load(top.data() + r), sum = load(total.data() + r), scale = Vec<float>{} + 1.0f;
      if (sinks) {
        const Vec<float> own = load(sink.data() + r), before = highest;
        highest = at_least(before, own);
        scale = exp2_of<6>(before - highest);
        sum = sum * scale + exp2_of<6>(own - highest);
      }
      const auto sees_nothing = sum == 0.0f;
      store(top.data() + r, sees_nothing ? Vec<float>{} - __builtin_inff() : highest * LN_2 + log_of(sum));
      store(total.data() + r, sees_nothing ? Vec<float>{} : scale / sum);
    }
  }
};

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
