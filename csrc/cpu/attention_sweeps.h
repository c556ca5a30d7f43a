// What the steps of attention's backward pass share: the packed keys, and which tiles and keys each sweep meets.
#pragma once
#include "attention_plan.h"
#include "products.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace backward_pass {

// Rows of a tile of queries: what the scores, their gradients and dq take stays in the L2 cache.
template <class Tile>
constexpr int64_t ROWS = is_bfloat16<Tile> ? 128 : 64;

// Sweeps that run side by side, where there are as many tiles: MOST_SWEEPS, or, where each would have less than ROWS_OF_SWEEP rows, fewer
// down to FEWEST_SWEEPS, for each writes and reads sums of its own.
constexpr int64_t MOST_SWEEPS = 16, FEWEST_SWEEPS = 8, ROWS_OF_SWEEP = 512;

inline int64_t most_sweeps_of_sequence(const AttentionProblem& p) {
  const int64_t rows = (p.cu_seqlens_q ? p.tokens_q : p.B * p.S) * p.H;
  const int64_t sweeps = larger(FEWEST_SWEEPS, smaller(MOST_SWEEPS, rows / ROWS_OF_SWEEP));
  return larger(sweeps / larger(p.B * p.Hk, 1), 1);
}

template <class Tile>
struct Context {
  const AttentionBackward& args;
  const Plan plan;
  const Products<Tile> multiply;
  const Width<Tile> width, width_v;
  const Scale scale;
  const int64_t most_sweeps;  // over the tiles of a sequence and key/value head
  const Pieces blocks, sweeps;
  const Buffer<Tile> k, v, k_transposed;  // by blocks of keys: as left factors
  const Buffer<bool> finite;              // by KEY_STEP of padded keys: of the block that begins there, whether the keys are finite
  const Buffer<float> dk, dv;             // of each sweep, by padded keys
  const Buffer<int64_t> tiles;            // of each sequence: the first of each sweep, and their number

  explicit Context(const AttentionBackward& a)
      : args(a),
        plan(a.problem),
        multiply(library_products()),
        width(a.problem.D),
        width_v(a.problem.Dv),
        scale(a.problem),
        most_sweeps(most_sweeps_of_sequence(a.problem)),
        blocks(a.problem.B, [&](int64_t b) { return (plan.sequence(b).T + KEY_BLOCK - 1) / KEY_BLOCK; }),
        sweeps(a.problem.B, [&](int64_t b) { return sweeps_of(b); }),
        k(plan.padded_keys() * width.ld),
        v(plan.padded_keys() * width_v.ld),
        k_transposed(plan.padded_keys() * width.ld),
        finite(plan.padded_keys() / KEY_STEP),
        dk(most_sweeps * plan.padded_keys() * width.ld),
        dv(most_sweeps * plan.padded_keys() * width_v.ld),
        tiles(a.problem.B * (most_sweeps + 1)) {
    for (int64_t b = 0; ready() && b < a.problem.B; b++) deal_tiles(b);
  }
  bool ready() const {
    return plan.ready() && blocks.ready() && sweeps.ready() && k.data() && v.data() && k_transposed.data() && finite.data() && dk.data() &&
           dv.data() && tiles.data();
  }

  int64_t tiles_of(int64_t b) const { return (plan.sequence(b).S * plan.G + ROWS<Tile> - 1) / ROWS<Tile>; }
  int64_t sweeps_of(int64_t b) const { return smaller(most_sweeps, tiles_of(b)); }
  Range tiles_of_sweep(int64_t b, int64_t sweep) const {
    const int64_t* first = tiles.data() + b * (most_sweeps + 1) + sweep;
    return {first[0], first[1]};
  }
  // In steps of KEY_STEP. Later sweeps meet later keys, none of them ends or begins before one ahead of it.
  Range keys_of_sweep(const Sequence& s, int64_t b, int64_t sweep) const {
    const Range some = tiles_of_sweep(b, sweep);
    if (some.empty()) return {round_up(s.T, KEY_STEP), round_up(s.T, KEY_STEP)};
    const Range keys = keys_of_tiles(s, some);
    return {keys.begin / KEY_STEP * KEY_STEP, round_up(larger(keys.end, 0), KEY_STEP)};
  }
  // The sweeps that meet key j.
  Range sweeps_with_key(const Sequence& s, int64_t b, int64_t j) const {
    Range found{0, 0};
    while (found.end < sweeps_of(b) && keys_of_sweep(s, b, found.end).begin <= j) found.end++;
    while (found.begin < found.end && keys_of_sweep(s, b, found.begin).end <= j) found.begin++;
    return found;
  }
  int64_t padded_key(int64_t sweep, int64_t b, int64_t kv_head, int64_t j) const {
    return sweep * plan.padded_keys() + plan.padded_key(b, kv_head, j);
  }

 private:
  Range keys_of_tiles(const Sequence& s, Range some) const {
    const int64_t last_row = smaller(some.end * ROWS<Tile>, s.S * plan.G) - 1;
    return s.keys_of(Range{some.begin * ROWS<Tile> / plan.G, last_row / plan.G + 1});
  }
  // A sweep ends where its share of all keys met is full, give or take half a tile; the last ones may be left without any.
  void deal_tiles(int64_t b) const {
    const Sequence s = plan.sequence(b);
    const auto met = [&](int64_t i) { return larger(keys_of_tiles(s, {i, i + 1}).size(), 0); };
    const int64_t n = tiles_of(b), sweeps = sweeps_of(b);
    int64_t *first = tiles.data() + b * (most_sweeps + 1), total = 0, before = 0, sweep = 0;
    for (int64_t i = 0; i < n; i++) total += met(i);
    first[0] = 0;
    for (int64_t i = 0; i < n; i++) {
      if (sweep + 1 < sweeps && (2 * before + met(i)) * sweeps > 2 * total * (sweep + 1)) first[++sweep] = i;
      before += met(i);
    }
    while (sweep < sweeps) first[++sweep] = n;
  }
};

}  // namespace backward_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
