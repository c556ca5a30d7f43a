// Attention forward on the CPU: a tile of queries meets the keys that it sees block by block, and keeps a running softmax.
//
// Compute-bound: 2 (D + Dv) FLOPs for each visible pair, against an exponential. Moved: q and o once; k and v once when they are packed
// and, from the caches, once for each tile of queries.
#pragma once
#include "attention_plan.h"
#include "products.h"
#include "simd_math.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace forward_pass {

constexpr int64_t ROWS = 128;  // of a tile of queries

// The exponential's polynomial. p is rounded to a tile's type, but lse is the sum of all p in float32.
template <class Tile>
constexpr int DEGREE = is_bfloat16<Tile> ? 5 : 6;

template <class Tile>
struct Context {
  const AttentionForward& args;
  const Plan plan;
  const Products<Tile> multiply;
  const Width<Tile> width, width_v;
  const Scale scale;
  const Pieces blocks, tiles;
  const Buffer<Tile> k, v;    // by blocks of keys: the transpose of the keys, and the values, as right factors
  const Buffer<bool> finite;  // by KEY_STEP of padded keys: of the block that begins there, whether the values are finite

  explicit Context(const AttentionForward& a)
      : args(a),
        plan(a.problem),
        multiply(library_products()),
        width(a.problem.D),
        width_v(a.problem.Dv),
        scale(a.problem),
        blocks(a.problem.B, [&](int64_t b) { return (plan.sequence(b).T + KEY_BLOCK - 1) / KEY_BLOCK; }),
        tiles(a.problem.B, [&](int64_t b) { return (plan.sequence(b).S * plan.G + ROWS - 1) / ROWS; }),
        k(plan.padded_keys() * width.ld),
        v(plan.padded_keys() * width_v.ld),
        finite(plan.padded_keys() / KEY_STEP) {}
  bool ready() const { return plan.ready() && blocks.ready() && tiles.ready() && k.data() && v.data() && finite.data(); }
};

template <class T, class Tile>
class PackKeys {
 public:
  explicit PackKeys(const Context<Tile>& context) : x_(context), rows_(KEY_BLOCK * larger(x_.width.ld, x_.width_v.ld)) {}
  bool ready() const { return rows_.data() != nullptr; }

  void operator()(int64_t task) const {
    const Plan& plan = x_.plan;
    const auto [b, i] = x_.blocks[task / plan.p.Hk];
    const int64_t kv_head = task % plan.p.Hk, n0 = i * KEY_BLOCK, padded = plan.block_width(b, n0), at = plan.padded_key(b, kv_head, n0);
    const Sequence s = plan.sequence(b);
    const int64_t n = smaller(KEY_BLOCK, s.T - n0);
    const Heads &k = plan.p.k, &v = plan.p.v;
    gather_rows(token<T>(k, s, s.k_begin, n0, kv_head), k.stride_token, n, padded, x_.width, rows_.data());
    transpose_right(rows_.data(), padded, x_.width, x_.k.data() + at * x_.width.ld, padded);
    Tile* values = x_.v.data() + at * x_.width_v.ld;
    Tile* rows = is_bfloat16<Tile> ? rows_.data() : values;
    gather_rows(token<T>(v, s, s.k_begin, n0, kv_head), v.stride_token, n, padded, x_.width_v, rows);
    right_factor(rows, padded, x_.width_v, values);
    x_.finite[at / KEY_STEP] = all_finite(rows, padded * x_.width_v.ld);
  }

 private:
  const Context<Tile>& x_;
  Buffer<Tile> rows_;
};

// The running softmax of a row: p = exp2(score - top). top follows the largest score so far, but only when that is GROWTH larger: a p up
// to 2^GROWTH is as exact as one up to 1, and o is scaled down less often.
constexpr float GROWTH = 6;

template <class T, class Tile>
class Attend {
 public:
  explicit Attend(const Context<Tile>& context)
      : x_(context),
        q_(ROWS * x_.width.ld),
        scores_(ROWS * KEY_BLOCK),
        p_(is_bfloat16<Tile> ? ROWS * KEY_BLOCK : 0),
        o_(ROWS * x_.width_v.ld),
        sums_(ROWS * LANES),
        softmax_(ROWS) {}
  ~Attend() { x_.multiply.release(); }
  bool ready() const { return q_.data() && scores_.data() && p_.data() && o_.data() && sums_.data() && softmax_.ready(); }

  void operator()(int64_t task) const {
    const Plan& plan = x_.plan;
    const auto [b, i] = x_.tiles[task / plan.p.Hk];
    const Sequence s = plan.sequence(b);
    const QueryTile tile(s, task % plan.p.Hk, i * ROWS, smaller(ROWS, s.S * plan.G - i * ROWS), plan.G);
    gather_queries<T>(plan.p.q, tile, x_.width, q_.data());
    x_.scale.apply_sign(q_.data(), tile.rows * x_.width.ld);
    __builtin_memset(o_.data(), 0, tile.padded() * x_.width_v.ld * sizeof(float));
    __builtin_memset(sums_.data(), 0, tile.rows * LANES * sizeof(float));
    for (int64_t r = 0; r < tile.rows; r++) softmax_.top[r] = -__FLT_MAX__;
    for_key_blocks(
        tile, [&](int64_t block, Range keys) { for_strips_of_rows(tile, keys, [&](const Patch& patch) { meet(tile, block, patch); }); });
    tile.for_rows([&](int64_t r, int64_t, int64_t head) {
      softmax_.total[r] = sum<float>(load(sums_.data() + r * LANES));
      if (plan.p.sinks) softmax_.sink[r] = plan.p.sinks[head] * LOG2_E;
    });
    softmax_.finish(tile.rows, plan.p.sinks);
    tile.for_rows([&](int64_t r, int64_t position, int64_t head) { write(s, r, position, head); });
  }

 private:
  void meet(const QueryTile& tile, int64_t block, const Patch& patch) const {
    const Range rows = patch.rows, keys = patch.keys;
    const int64_t b = tile.sequence.batch, n = keys.size();
    const int64_t ld = x_.plan.block_width(b, block), at = x_.plan.padded_key(b, tile.kv_head, block);
    const Tile* k = x_.k.data() + at * x_.width.ld + column_of_right_factor<Tile>(keys.begin - block);
    const Tile* v = x_.v.data() + (at + keys.begin - block) * x_.width_v.ld;
    const Tile* q = q_.data() + rows.begin * x_.width.ld;
    x_.multiply(rows.size(), n, x_.width.used, q, x_.width.ld, k, ld, scores_.data() + rows.begin * KEY_BLOCK, KEY_BLOCK, false);
    const bool all = patch.seen_by_all(tile);
    x_.scale.cap > 0 ? exponentiate_patch<true>(tile, patch, all) : exponentiate_patch<false>(tile, patch, all);
    if (all || x_.finite[at / KEY_STEP]) {
      float* o = o_.data() + rows.begin * x_.width_v.ld;
      x_.multiply(rows.size(), x_.width_v.used, n, p() + rows.begin * KEY_BLOCK, KEY_BLOCK, v, x_.width_v.ld, o, x_.width_v.ld, true);
    } else {
      add_seen_values(tile, patch);
    }
  }

  Tile* p() const {
    if constexpr (is_bfloat16<Tile>)
      return p_.data();
    else
      return scores_.data();  // in place
  }

  // From the scores of a patch to p. First the tops of a few rows, which do not wait for each other, then their exponentials, which need
  // not wait for the tops. Scores are read two registers at a time: what the second may hold behind the patch's keys is not seen.
  template <bool CAPPED>
  void exponentiate_patch(const QueryTile& tile, const Patch& patch, bool all) const {
    constexpr int64_t FEW = 16;
    const int64_t keys = patch.keys.size(), n = round_up(keys, 2 * LANES);
    for (int64_t first = patch.rows.begin; first < smaller(patch.rows.end, tile.rows); first += FEW) {
      const Range few{first, smaller(first + FEW, patch.rows.end)};
      tile.for_rows(few, [&](int64_t r, int64_t position, int64_t) {
        find_top<CAPPED>(r, n, all ? Range{0, keys} : tile.sequence.keys_of(position).within(patch.keys));
      });
      for (int64_t r = few.begin; r < smaller(few.end, tile.rows); r++) exponentiate<CAPPED>(r, n);
    }
  }

  template <bool CAPPED>
  void find_top(int64_t r, int64_t n, Range seen) const {
    float* score = scores_.data() + r * KEY_BLOCK;
    const float factor = CAPPED ? 1.0f : x_.scale.factor;
    if (CAPPED) {
      const float inner = x_.scale.factor / x_.scale.cap;
      for (int64_t c = 0; c < n; c += LANES) store(score + c, tanh_of(load(score + c) * inner) * x_.scale.cap);
    }
    const auto hide_rest = [&](int64_t c) { store(score + c, lanes_within(seen, c) ? load(score + c) : Vec<float>{} - __builtin_inff()); };
    int64_t hidden = 0;
    for (; hidden < smaller(seen.begin, n); hidden += LANES) hide_rest(hidden);
    for (int64_t c = larger(hidden, seen.end / LANES * LANES); c < n; c += LANES) hide_rest(c);
    Vec<float> most[2] = {load(score), load(score + LANES)};
    for (int64_t c = 2 * LANES; c < n; c += 2 * LANES) {
      most[0] = at_least(most[0], load(score + c));
      most[1] = at_least(most[1], load(score + c + LANES));
    }
    most[0] = at_least(most[0], most[1]);
    if (__builtin_expect(any(most[0] * factor > softmax_.top[r] + GROWTH), 0)) rescale(r, largest(most[0]) * factor);
  }

  template <bool CAPPED>
  void exponentiate(int64_t r, int64_t n) const {
    const float *score = scores_.data() + r * KEY_BLOCK, factor = CAPPED ? 1.0f : x_.scale.factor, shift = softmax_.top[r];
    Tile* p_row = p() + r * KEY_BLOCK;
    Vec<float> sums[2] = {load(sums_.data() + r * LANES), Vec<float>{}};
    for (int64_t c = 0; c < n; c += 2 * LANES) {
      const Vec<float> a = exp2_of<DEGREE<Tile>>(load(score + c) * factor - shift);
      const Vec<float> b = exp2_of<DEGREE<Tile>>(load(score + c + LANES) * factor - shift);
      store_both(p_row + c, a, b);
      sums[0] += a;
      sums[1] += b;
    }
    store(sums_.data() + r * LANES, sums[0] + sums[1]);
  }

  void rescale(int64_t r, float top) const {
    const float before = softmax_.top[r];
    softmax_.top[r] = top;
    if (before == -__FLT_MAX__) return;  // the first keys that the row sees
    const float shrink = exp2_of<6>(Vec<float>{} + (before - top))[0];
    float *sums = sums_.data() + r * LANES, *o = o_.data() + r * x_.width_v.ld;
    store(sums, load(sums) * shrink);
    for (int64_t c = 0; c < x_.width_v.used; c += LANES) store(o + c, load(o + c) * shrink);
  }

  // o += p v row by row, of the keys that a row sees: 0 times what it does not see could be NaN.
  void add_seen_values(const QueryTile& tile, const Patch& patch) const {
    const AttentionProblem& problem = x_.plan.p;
    const Sequence& s = tile.sequence;
    tile.for_rows(patch.rows, [&](int64_t r, int64_t position, int64_t) {
      const Range seen = s.keys_of(position).within(patch.keys);
      float* o = o_.data() + r * x_.width_v.ld;
      for (int64_t j = seen.begin; j < seen.end; j++) {
        const T* v = token<T>(problem.v, s, s.k_begin, patch.keys.begin + j, tile.kv_head);
        const float weight = to_wide(p()[r * KEY_BLOCK + j]);
        for_columns<float>(0, problem.Dv, [&](int64_t c, auto n, int) { store(o + c, load(o + c, n) + weight * load(v + c, n), n); });
      }
    });
  }

  void write(const Sequence& s, int64_t r, int64_t position, int64_t head) const {
    const AttentionForward& a = x_.args;
    a.lse[x_.plan.lse_offset(s, head, a.stride_lse_batch, a.stride_lse_head) + position] = softmax_.top[r];
    T* o = static_cast<T*>(a.o) + x_.plan.query_row(s, position, head) * a.problem.Dv;
    write_row(o_.data() + r * x_.width_v.ld, a.problem.Dv, softmax_.total[r], o);
  }

  const Context<Tile>& x_;
  Buffer<Tile> q_;
  Buffer<float> scores_;
  Buffer<Tile> p_;
  Buffer<float> o_, sums_;
  const Softmax softmax_;
};

template <class T, class Tile>
Error run(const AttentionForward& args) {
  const Context<Tile> context(args);
  if (!context.ready()) return OUT_OF_MEMORY;
  const Error error = run_tasks<PackKeys<T, Tile>>(context.blocks.size() * args.problem.Hk, context);
  return error ? error : run_tasks<Attend<T, Tile>>(context.tiles.size() * args.problem.Hk, context);
}

}  // namespace forward_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
