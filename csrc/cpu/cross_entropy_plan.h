// What the passes of the fused cross-entropy share on the CPU: the tokens that count, and tiles of their logits.
#pragma once
#include "cross_entropy_kept.h"
#include "pack.h"
#include "products.h"
#include "tasks.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace surprise {

constexpr int64_t STEP = 16;      // sizes of products are multiples of it
constexpr int64_t COLUMNS = 128;  // of the vocabulary in a tile: kept columns end where a tile does
constexpr int64_t ROWS = 128;     // tokens of a product
static_assert(COLUMNS == KEPT_BLOCK);

inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Of `count` tokens, where `tasks` parts of the vocabulary alone are too few for several threads: each stretch of the tokens is a task of
// its own then. A matter of the problem alone.
class Stretches {
 public:
  Stretches(int64_t tasks, int64_t count)
      : count_(count), blocks_(pieces(count, ROWS)), size_(larger(smaller(FEW / tasks, smaller(blocks_, count / (tasks * COLUMNS))), 1)) {}
  int64_t size() const { return size_; }
  int64_t begin(int64_t stretch) const { return stretch * blocks_ / size_ * ROWS; }
  int64_t end(int64_t stretch) const { return smaller(begin(stretch + 1), count_); }

 private:
  static constexpr int64_t FEW = 8;

  int64_t count_, blocks_, size_;
};

// The tokens that are not ignored, in their order, and their x as the left factor of products: a copy, unless x is one as it lies.
template <class T, class Tile>
class Tokens {
 public:
  const LinearCrossEntropyProblem& p;
  const Width<Tile> width;

  explicit Tokens(const LinearCrossEntropyProblem& problem)
      : p(problem),
        width(p.C),
        count_(counted(p)),
        as_it_lies_(sizeof(T) == sizeof(Tile) && p.stride_x_row == width.ld && p.C == width.ld && count_ == p.N && count_ % STEP == 0),
        numbers_(count_),
        x_(as_it_lies_ ? 0 : padded() * width.ld) {
    if (!ready()) return;
    int64_t n = 0;
    for (int64_t i = 0; i < p.N; i++)
      if (p.target[i] != p.options.ignore_index) numbers_[n++] = i;
    if (as_it_lies_) return;
    parallel_for(count_, GRAIN / p.C + 1, [&](int64_t i) {
      gather_row(static_cast<const T*>(p.x) + numbers_[i] * p.stride_x_row, width, x_.data() + i * width.ld);
    });
    __builtin_memset(x_.data() + count_ * width.ld, 0, (padded() - count_) * width.ld * sizeof(Tile));
  }
  bool ready() const { return numbers_.data() && x_.data(); }

  int64_t count() const { return count_; }
  int64_t padded() const { return round_up(count_, STEP); }
  int64_t operator[](int64_t i) const { return numbers_[i]; }
  const Tile* x(int64_t i) const { return (as_it_lies_ ? static_cast<const Tile*>(p.x) : x_.data()) + i * width.ld; }

 private:
  static int64_t counted(const LinearCrossEntropyProblem& p) {
    int64_t n = 0;
    for (int64_t i = 0; i < p.N; i++) n += p.target[i] != p.options.ignore_index;
    return n;
  }

  int64_t count_;
  bool as_it_lies_;
  Buffer<int64_t> numbers_;
  Buffer<Tile> x_;
};

// Computes z of some tokens and some columns of the vocabulary, at most ROWS and COLUMNS: of one set of columns after the other, whose
// weights are packed once.
template <class T, class Tile>
class Tiles {
 public:
  explicit Tiles(const Tokens<T, Tile>& tokens)
      : tokens_(tokens),
        p_(tokens.p),
        multiply_(library_products()),
        rows_(COLUMNS * tokens.width.ld),
        weight_(COLUMNS * tokens.width.ld),
        z_(ROWS * COLUMNS) {}
  ~Tiles() { multiply_.release(); }
  bool ready() const { return rows_.data() && weight_.data() && z_.data(); }

  const Products<Tile>& multiply() const { return multiply_; }
  // The weights of the columns chosen last, zeros behind them.
  const Tile* rows() const { return rows_.data(); }

  void choose(int64_t first, bool project) {
    first_ = first;
    n_ = smaller(COLUMNS, p_.V - first);
    gather_rows(static_cast<const T*>(p_.weight) + first * p_.stride_weight_row, p_.stride_weight_row, n_, COLUMNS, tokens_.width,
                rows_.data());
    if (project) transpose_right(rows_.data(), COLUMNS, tokens_.width, weight_.data(), COLUMNS);
  }
  int64_t columns() const { return n_; }
  int64_t first() const { return first_; }

  // z of n tokens from token i on: rows COLUMNS numbers apart.
  float* project(int64_t i, int64_t n) const {
    multiply_(round_up(n, STEP), round_up(n_, STEP), tokens_.width.used, tokens_.x(i), tokens_.width.ld, weight_.data(), COLUMNS, z_.data(),
              COLUMNS, false);
    if (p_.bias || p_.options.softcap > 0)
      for (int64_t r = 0; r < n; r++)
        cap(z_.data() + r * COLUMNS, p_.bias ? p_.bias + first_ : nullptr, n_, p_.options.softcap, z_.data() + r * COLUMNS);
    return z_.data();
  }

  // The same from what forward kept.
  float* recalled(int64_t i, int64_t n, const LinearCrossEntropyBackward& args) const {
    for (int64_t r = 0; r < n; r++) recall(args, tokens_[i + r], first_, n_, z_.data() + r * COLUMNS);
    return z_.data();
  }

 private:
  const Tokens<T, Tile>& tokens_;
  const LinearCrossEntropyProblem& p_;
  const Products<Tile> multiply_;
  Buffer<Tile> rows_, weight_;
  Buffer<float> z_;
  int64_t first_ = 0, n_ = 0;
};

}  // namespace surprise
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
