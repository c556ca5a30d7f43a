// The experts' forward pass on the CPU, in two sweeps over a group of experts:
//
//   blocks     of an expert's tokens: hidden and u, some hidden features at a time
//   columns    some columns of y for every expert: adds the weighted rows of their part of down u to the tokens' y
//
// Everything is transposed, features by tokens: then the weights are left factors as they lie, whole rows of them, and only tokens are
// packed. Compute-bound: 6 C F FLOPs for each pair. Moved: each expert's weights once for a block, x, hidden, u and y.
#pragma once
#include "moe_plan.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace moe_pass {

// Tokens of a block: fewer where there are few, so that every thread has something to do. A matter of the shape alone.
inline int64_t block_rows(const MoeProblem& p) { return p.N * p.K >= 2048 ? 128 : p.N * p.K >= 512 ? 64 : 32; }

// The experts from e0 on whose u is kept at once: as many as share some scratch memory, so that it stays small beside hidden.
template <class Tile>
int64_t end_of_forward_group(const Plan& plan, int64_t e0) {
  constexpr int64_t LEAST_BYTES = 8 << 20, SHARE = 4;  // of scratch memory at least, or the SHARE-th part of what all would need
  const int64_t room = larger(LEAST_BYTES / (plan.p.F * sizeof(Tile)), plan.all_padded_rows() / SHARE);
  int64_t e1 = e0 + 1;
  while (e1 < plan.p.E && plan.padded_begin(e1 + 1) - plan.padded_begin(e0) <= room) e1++;
  return e1;
}

template <class T, class Tile>
struct ForwardContext {
  const MoeForward& args;
  const Plan& plan;
  const int64_t e0, e1;
  const Products<Tile> multiply;
  const int64_t rows;
  const Width<Tile> width, width_u;
  const Pieces blocks;
  const Buffer<Tile> u;  // for each block of padded tokens: (F, tokens), a right factor
  const SlicedSums<T>& y;

  ForwardContext(const MoeForward& a, const Plan& p, int64_t begin, int64_t end, const SlicedSums<T>& y_)
      : args(a),
        plan(p),
        e0(begin),
        e1(end),
        multiply(library_products()),
        rows(block_rows(p.p)),
        width(p.p.C),
        width_u(p.p.F),
        blocks(
            e1 - e0, [&](int64_t i) { return (p.rows(e0 + i) + rows - 1) / rows; }, true),
        u((p.padded_begin(e1) - p.padded_begin(e0)) * width_u.used),
        y(y_) {}
  bool ready() const { return blocks.ready() && u.data(); }

  // u of the block that begins with row i0 of an expert.
  Tile* u_of(int64_t e, int64_t i0) const { return u.data() + (plan.padded_begin(e) - plan.padded_begin(e0) + i0) * width_u.used; }
};

template <class T, class Tile>
class ForwardBlock {
 public:
  explicit ForwardBlock(const ForwardContext<T, Tile>& context)
      : x_(context),
        p_(context.plan.p),
        tokens_(x_.rows * x_.width.ld),
        x_transposed_(x_.rows * x_.width.ld),
        gate_up_(SLICE, p_.C),
        a_(SLICE * x_.rows),
        b_(SLICE * x_.rows) {}
  ~ForwardBlock() { x_.multiply.release(); }
  bool ready() const { return tokens_.data() && x_transposed_.data() && gate_up_.ready() && a_.data() && b_.data(); }

  void operator()(int64_t task) {
    const auto [place, i] = x_.blocks[task];
    const int64_t e = x_.e0 + place, i0 = i * x_.rows, n = smaller(x_.rows, x_.plan.rows(e) - i0), padded = round_up(n, STEP);
    gather_tokens<T>(p_.x, p_.stride_x_row, x_.plan, e, i0, n, padded, x_.width, tokens_.data());
    transpose_right(tokens_.data(), padded, x_.width, x_transposed_.data(), x_.rows);
    for (int64_t f = 0; f < p_.F; f += SLICE) {
      const int64_t features = smaller(SLICE, p_.F - f);
      for (int64_t r = 0; r < n; r++) ask_for_hidden<T>(x_.args.hidden, x_.plan.pair(e, i0 + r), p_.F, f, features);
      project(e, f, features, padded, a_.data(), p_.F + f);
      project(e, p_.F + f, features, padded, b_.data(), f + features);
      clear_rows_of_no_feature(a_.data(), features);
      clear_rows_of_no_feature(b_.data(), features);
      activate(round_up(features, STEP), padded, x_.u_of(e, i0) + f * padded);
      write_hidden(e, i0, n, f, features);
    }
  }

 private:
  void project(int64_t e, int64_t row, int64_t features, int64_t padded, float* to, int64_t next) {
    const auto& w = gate_up_(x_.plan.template gate_up<T>(e, row), p_.stride_gate_up_row, features, p_.C);
    if (next < 2 * p_.F) ask_for_rows(x_.plan.template gate_up<T>(e, next), p_.stride_gate_up_row, features, p_.C);
    x_.multiply(w.M, padded, w.K, w.data, w.ld, x_transposed_.data(), x_.rows, to, x_.rows, false);
  }

  // Their weights are zero, which times an infinite x is NaN.
  void clear_rows_of_no_feature(float* half, int64_t features) const {
    __builtin_memset(half + features * x_.rows, 0, (round_up(features, STEP) - features) * x_.rows * sizeof(float));
  }

  // a and b, rounded as they are saved, and u as the right factor of the product with down.
  void activate(int64_t features, int64_t padded, Tile* to) const {
    for (int64_t f = 0; f < features; f += 2) {
      for (int64_t r = 0; r < padded; r += LANES) {
        Vec<float> u[2];
        for (int i = 0; i < 2; i++) {
          const int64_t at = (f + i) * x_.rows + r;
          const Vec<float> a = rounded<T>(load(a_.data() + at)), b = rounded<T>(load(b_.data() + at));
          u[i] = Silu<T>(a).value * b;
          store(a_.data() + at, a);
          store(b_.data() + at, b);
        }
        store_rows_of_right_factor(to + f * padded, padded, r, u[0], u[1]);
      }
    }
  }

  void write_hidden(int64_t e, int64_t i0, int64_t n, int64_t f, int64_t features) const {
    for (int64_t half = 0; half < 2; half++) {
      const auto row = [&](int64_t r) { return static_cast<T*>(x_.args.hidden) + (2 * x_.plan.pair(e, i0 + r) + half) * p_.F + f; };
      for_transposed(
          half == 0 ? a_.data() : b_.data(), x_.rows, n, features, row, [](T* hidden, int64_t c, const float* numbers, int64_t count) {
            for_columns<float>(0, count, [&](int64_t i, auto part, int) { store(hidden + c + i, load(numbers + i, part), part); });
          });
    }
  }

  const ForwardContext<T, Tile>& x_;
  const MoeProblem& p_;
  Buffer<Tile> tokens_, x_transposed_;
  LeftFactor<T, Tile> gate_up_;
  Buffer<float> a_, b_;
};

template <class T, class Tile>
class ForwardColumns {
 public:
  explicit ForwardColumns(const ForwardContext<T, Tile>& context)
      : x_(context), p_(context.plan.p), down_(SLICE, p_.F), z_(SLICE * x_.rows) {}
  ~ForwardColumns() { x_.multiply.release(); }
  bool ready() const { return down_.ready() && z_.data(); }

  void operator()(int64_t task) {
    const int64_t c = task * SLICE, columns = smaller(SLICE, p_.C - c);
    if (x_.e0 == 0) x_.y.clear(c);
    for (int64_t e = x_.e0; e < x_.e1; e++) {
      if (x_.plan.rows(e) == 0) continue;
      const auto& down = down_(x_.plan.template down<T>(e, c), p_.stride_down_row, columns, p_.F);
      for (int64_t i0 = 0; i0 < x_.plan.rows(e); i0 += x_.rows) {
        const int64_t n = smaller(x_.rows, x_.plan.rows(e) - i0), padded = round_up(n, STEP);
        for (int64_t r = 0; r < n; r++) ask_for_row(x_.y.row(x_.plan.token(e, i0 + r), c), columns);
        x_.multiply(down.M, padded, down.K, down.data, down.ld, x_.u_of(e, i0), padded, z_.data(), x_.rows, false);
        add_weighted(e, i0, n, c, columns);
      }
    }
  }

 private:
  struct Sum {
    float* row;
    float weight;
  };

  void add_weighted(int64_t e, int64_t i0, int64_t n, int64_t c, int64_t columns) const {
    const auto sum = [&](int64_t r) { return Sum{x_.y.row(x_.plan.token(e, i0 + r), c), p_.weights[x_.plan.pair(e, i0 + r)]}; };
    for_transposed(z_.data(), x_.rows, n, columns, sum, [](const Sum& y, int64_t from, const float* z, int64_t count) {
      for_columns<float>(0, count, [&](int64_t i, auto part, int) {
        float* to = y.row + from + i;
        store(to, load(to, part) + y.weight * load(z + i, part), part);
      });
    });
  }

  const ForwardContext<T, Tile>& x_;
  const MoeProblem& p_;
  LeftFactor<T, Tile> down_;
  Buffer<float> z_;
};

template <class T, class Tile>
Error forward(const MoeForward& args, const Plan& plan) {
  const MoeProblem& p = args.problem;
  const SlicedSums<T> y(args.y, p.N, p.C);
  if (!y.ready()) return OUT_OF_MEMORY;
  for (int64_t e = 0; e < p.E;) {
    const int64_t end = end_of_forward_group<Tile>(plan, e);
    const ForwardContext<T, Tile> context(args, plan, e, end, y);
    if (!context.ready()) return OUT_OF_MEMORY;
    if (const Error error = run_tasks<ForwardBlock<T, Tile>>(context.blocks.size(), context)) return error;
    if (const Error error = run_tasks<ForwardColumns<T, Tile>>((p.C + SLICE - 1) / SLICE, context)) return error;
    e = end;
  }
  y.write();
  return nullptr;
}

}  // namespace moe_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
