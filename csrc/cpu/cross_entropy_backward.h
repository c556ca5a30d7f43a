// The fused cross-entropy's backward pass on the CPU. The vocabulary is cut into ranges, and for each of them there are two sweeps:
//
//   slices   for 128 columns of the range and all tokens: z, computed again or as it was kept, from it dlogits, and with them these
//            columns' rows of dweight = dlogits^T x; where a range has few columns, for a stretch of the tokens, and their sums are added
//   blocks   for some tokens and columns of x: their part of dx = dlogits weight, added up over the ranges
//
// So every weight is packed once, every row of dweight written once and by one thread, and no more than a range of dlogits is held.
// dweight, or dx and with it the second sweep, is left out where nobody needs it.
// Compute-bound: 8 N C V FLOPs, 6 where all was kept. Moved: the weights and dweight once, x once a slice, kept once.
#pragma once
#include "cross_entropy_plan.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace surprise {

constexpr int64_t WIDTH = 256;  // columns of x in a block of the second sweep

// Tiles in a range: dlogits of one are about as many numbers as x, at least four, so that there is work for several threads, and at most
// as many as make 4096 columns. A matter of the shape alone.
inline int64_t tiles_in_range(const LinearCrossEntropyProblem& p) {
  const int64_t columns = smaller(larger(p.C, (1 << 20) / p.N), 4096);
  return smaller(larger(columns / COLUMNS, 4), pieces(p.V, COLUMNS));
}

template <class T, class Tile>
struct BackwardContext {
  const LinearCrossEntropyBackward& args;
  const Tokens<T, Tile> tokens;
  const Products<Tile> multiply;
  const int64_t tiles, ld;  // of a range; its columns are ld numbers
  const Stretches stretches;
  const int64_t blocks;        // of columns of x
  const Buffer<Tile> x;        // for dweight: the tokens as right factor; of float32, tokens.x is one
  const Buffer<Tile> dlogits;  // for dx: (tokens, ld): the range's, as left factor
  const Buffer<Tile> weight;   // the same: (ld, C): the range's, as right factor
  const Buffer<float> dx;      // (tokens, C)
  const Buffer<float> sums;    // of stretches that are tasks apart, for dweight: (tiles, stretches, COLUMNS, C)
  const Buffer<float> dbias;   // the same: (tiles, stretches, COLUMNS)
  int64_t range = 0;           // its first tile

  explicit BackwardContext(const LinearCrossEntropyBackward& a)
      : args(a),
        tokens(a.problem),
        multiply(library_products()),
        tiles(tiles_in_range(a.problem)),
        ld(tiles * COLUMNS),
        stretches(tiles, tokens.count()),
        blocks(pieces(tokens.width.used, WIDTH)),
        x(is_bfloat16<Tile> && a.dweight ? tokens.padded() * tokens.width.ld : 0),
        dlogits(a.dx ? tokens.padded() * ld : 0),
        weight(a.dx ? ld * tokens.width.ld : 0),
        dx(a.dx ? tokens.padded() * tokens.width.ld : 0),
        sums(apart() && a.dweight ? tiles * stretches.size() * COLUMNS * tokens.width.ld : 0),
        dbias(apart() ? tiles * stretches.size() * COLUMNS : 0) {}
  bool ready() const { return tokens.ready() && x.data() && dlogits.data() && weight.data() && dx.data() && sums.data() && dbias.data(); }

  bool apart() const { return stretches.size() > 1; }

  int64_t all_tiles() const { return pieces(args.problem.V, COLUMNS); }
  int64_t tiles_here() const { return smaller(tiles, all_tiles() - range); }
  int64_t columns_here() const { return smaller(tiles * COLUMNS, round_up(args.problem.V - range * COLUMNS, STEP)); }
};

// dweight of word v, the sum of `stretches` rows, each of them `apart` numbers after the one before.
template <class T, class Tile>
void write_dweight(const BackwardContext<T, Tile>& x, int64_t v, const float* sums, int64_t stretches = 1, int64_t apart = 0) {
  const int64_t C = x.args.problem.C;
  T* row = static_cast<T*>(x.args.dweight) + v * C;
  for_columns<float>(0, C, [&](int64_t c, auto size, int) {
    Vec<float> sum = load(sums + c, size);
    for (int64_t i = 1; i < stretches; i++) sum += load(sums + i * apart + c, size);
    store(row + c, sum, size);
  });
}

template <class T, class Tile>
class Slice {
 public:
  explicit Slice(const BackwardContext<T, Tile>& context)
      : x_(context),
        p_(context.args.problem),
        tiles_(context.tokens),
        dlogits_(ROWS * COLUMNS),
        transposed_(ROWS * COLUMNS),
        dweight_(context.args.dweight && !context.apart() ? COLUMNS * context.tokens.width.ld : 0) {}
  bool ready() const { return tiles_.ready() && dlogits_.data() && transposed_.data() && dweight_.data(); }

  void operator()(int64_t task) {
    const int64_t tile = task / x_.stretches.size(), stretch = task % x_.stretches.size();
    const int64_t begin = x_.stretches.begin(stretch), end = x_.stretches.end(stretch);
    const int64_t first = (x_.range + tile) * COLUMNS, of_a_task = COLUMNS * x_.tokens.width.ld;
    const bool kept = smaller(first + COLUMNS, p_.V) <= p_.columns;
    tiles_.choose(first, !kept);
    if (x_.args.dx && stretch == 0) pack_weight(x_.weight.data() + tile * of_a_task);
    float* const dweight = x_.apart() ? x_.sums.data() + task * of_a_task : dweight_.data();
    float dbias[COLUMNS] = {};
    for (int64_t i = begin; i < end; i += ROWS) {
      const int64_t n = smaller(ROWS, end - i), padded = round_up(n, STEP);
      differentiate(i, n, kept ? tiles_.recalled(i, n, x_.args) : tiles_.project(i, n), dbias);
      if (x_.args.dx)
        for (int64_t r = 0; r < padded; r++)
          __builtin_memcpy(x_.dlogits.data() + (i + r) * x_.ld + tile * COLUMNS, dlogits_.data() + r * COLUMNS, COLUMNS * sizeof(Tile));
      if (x_.args.dweight) add_dweight(i, padded, dweight, i > begin);
    }
    if (x_.apart()) {
      __builtin_memcpy(x_.dbias.data() + task * COLUMNS, dbias, sizeof(dbias));
      return;
    }
    if (x_.args.dweight)
      for (int64_t c = 0; c < tiles_.columns(); c++) write_dweight(x_, first + c, dweight + c * x_.tokens.width.ld);
    if (x_.args.dbias) __builtin_memcpy(x_.args.dbias + first, dbias, tiles_.columns() * sizeof(float));
  }

 private:
  // From token i on, as right factor.
  const Tile* tokens(int64_t i) const { return is_bfloat16<Tile> ? x_.x.data() + i * x_.tokens.width.ld : x_.tokens.x(i); }

  void pack_weight(Tile* to) const {
    const Tile* packed = right_factor(tiles_.rows(), COLUMNS, x_.tokens.width, to);
    if (packed != to) __builtin_memcpy(to, packed, COLUMNS * x_.tokens.width.ld * sizeof(Tile));
  }

  // The share of the tokens from i on, whose dlogits are in the tile: added to `dweight`, or the first one there.
  void add_dweight(int64_t i, int64_t padded, float* dweight, bool more) const {
    const int64_t ld = x_.tokens.width.ld;
    transpose_left(dlogits_.data(), padded, Width<Tile>(COLUMNS), transposed_.data(), ROWS);
    tiles_.multiply()(round_up(tiles_.columns(), STEP), x_.tokens.width.used, padded, transposed_.data(), ROWS, tokens(i), ld, dweight, ld,
                      more);
  }

  // From z of one token, in place; the target is the one at `target`, if that is among them.
  template <bool CAPPED>
  static void differentiate_row(float* z, int64_t n, int64_t target, Gradient<float, CAPPED> gradient) {
    const bool here = 0 <= target && target < n;
    const float share = here ? gradient.share(z[target]) : 0;
    for_columns<float>(0, n, [=](int64_t v, auto count, int) { store(z + v, gradient.template of<float>(load(z + v, count)), count); });
    if (here) z[target] -= share;
  }

  // dlogits of n tokens from their z, as a tile with zeros around them, and their share of dbias.
  void differentiate(int64_t i, int64_t n, float* z, float* dbias) const {
    const int64_t columns = tiles_.columns();
    for (int64_t r = 0; r < n; r++, z += COLUMNS) {
      const int64_t token = x_.tokens[i + r];
      by_cap(p_.options.softcap, [&](auto capped) {
        const Gradient<float, decltype(capped)::value> gradient(x_.args.gradients, token, p_.V, p_.options);
        differentiate_row(z, columns, p_.target[token] - tiles_.first(), gradient);
      });
      Tile* row = dlogits_.data() + r * COLUMNS;
      for_columns<float>(0, columns, [&](int64_t v, auto count, int) {
        const Vec<float> d = load(z + v, count);
        store(row + v, d, count);
        store(dbias + v, load(dbias + v, count) + d, count);
      });
      __builtin_memset(row + columns, 0, (COLUMNS - columns) * sizeof(Tile));
    }
    __builtin_memset(dlogits_.data() + n * COLUMNS, 0, (round_up(n, STEP) - n) * COLUMNS * sizeof(Tile));
  }

  const BackwardContext<T, Tile>& x_;
  const LinearCrossEntropyProblem& p_;
  Tiles<T, Tile> tiles_;
  Buffer<Tile> dlogits_, transposed_;
  Buffer<float> dweight_;
};

// Of the stretches of each of the range's tiles, in their order.
template <class T, class Tile>
void add_stretches(const BackwardContext<T, Tile>& x) {
  const LinearCrossEntropyProblem& p = x.args.problem;
  const int64_t first = x.range * COLUMNS, columns = smaller(x.tiles * COLUMNS, p.V - first), stretches = x.stretches.size();
  const int64_t ld = x.tokens.width.ld;
  const auto row = [&](int64_t v) { return v / COLUMNS * stretches * COLUMNS + v % COLUMNS; };
  if (x.args.dweight)
    parallel_for(columns, GRAIN / (p.C * stretches) + 1,
                 [&](int64_t v) { write_dweight(x, first + v, x.sums.data() + row(v) * ld, stretches, COLUMNS * ld); });
  if (x.args.dbias == nullptr) return;
  for (int64_t v = 0; v < columns; v++) {
    float sum = 0;
    for (int64_t i = 0; i < stretches; i++) sum += x.dbias[row(v) + i * COLUMNS];
    x.args.dbias[first + v] = sum;
  }
}

template <class T, class Tile>
class Block {
 public:
  explicit Block(const BackwardContext<T, Tile>& context) : x_(context) {}
  ~Block() { x_.multiply.release(); }
  bool ready() const { return true; }

  void operator()(int64_t task) const {
    const Tokens<T, Tile>& tokens = x_.tokens;
    const int64_t i = task / x_.blocks * ROWS, c = task % x_.blocks * WIDTH, ld = tokens.width.ld;
    const int64_t pairs = is_bfloat16<Tile> ? 2 : 1;  // of rows lie together in a right factor
    x_.multiply(round_up(smaller(ROWS, tokens.count() - i), STEP), smaller(WIDTH, tokens.width.used - c), x_.columns_here(),
                x_.dlogits.data() + i * x_.ld, x_.ld, x_.weight.data() + c * pairs, ld, x_.dx.data() + i * ld + c, ld, x_.range > 0);
  }

 private:
  const BackwardContext<T, Tile>& x_;
};

template <class T, class Tile>
void write_dx(const BackwardContext<T, Tile>& context) {
  const LinearCrossEntropyProblem& p = context.args.problem;
  T* dx = static_cast<T*>(context.args.dx);
  for (int64_t n = 0; n < p.N; n++)
    if (p.target[n] == p.options.ignore_index) __builtin_memset(dx + n * p.C, 0, p.C * sizeof(T));
  parallel_for(context.tokens.count(), GRAIN / p.C + 1, [&](int64_t i) {
    const float* sums = context.dx.data() + i * context.tokens.width.ld;
    T* row = dx + context.tokens[i] * p.C;
    for_columns<float>(0, p.C, [&](int64_t c, auto count, int) { store(row + c, load(sums + c, count), count); });
  });
}

template <class T, class Tile>
Error backward(const LinearCrossEntropyBackward& args) {
  const LinearCrossEntropyProblem& p = args.problem;
  BackwardContext<T, Tile> context(args);
  if (!context.ready()) return OUT_OF_MEMORY;
  const Tokens<T, Tile>& tokens = context.tokens;
  if (tokens.count() == 0) {
    if (args.dweight) __builtin_memset(args.dweight, 0, p.V * p.C * sizeof(T));
    if (args.dbias) __builtin_memset(args.dbias, 0, p.V * sizeof(float));
  } else {
    if (args.dweight) right_factor(tokens.x(0), tokens.padded(), tokens.width, context.x.data());
    for (; context.range < context.all_tiles(); context.range += context.tiles) {
      if (const Error error = run_tasks<Slice<T, Tile>>(context.tiles_here() * context.stretches.size(), context)) return error;
      if (context.apart()) add_stretches(context);
      if (args.dx == nullptr) continue;
      if (const Error error = run_tasks<Block<T, Tile>>(pieces(tokens.count(), ROWS) * context.blocks, context)) return error;
    }
  }
  if (args.dx) write_dx(context);
  return nullptr;
}

}  // namespace surprise
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
