// The experts' forward pass on the CPU: a block of an expert's tokens passes through its network, some hidden features at a time.
//
// Everything is transposed, features by tokens: then the weights are left factors as they lie, read once for a block of tokens, and only
// the tokens are packed. Compute-bound: 6 C F FLOPs for each pair. Moved: each expert's weights once for a block, x, hidden and y.
#pragma once
#include "moe_plan.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace moe_pass {

constexpr int64_t FEATURES = 64;  // hidden ones that are computed, activated and used up at a time

// Tokens of a block: fewer where there are few, so that every thread has something to do. A matter of the shape alone.
inline int64_t block_rows(const MoeProblem& p) { return p.N * p.K >= 2048 ? 128 : p.N * p.K >= 512 ? 64 : 32; }

template <class Tile>
struct ForwardContext {
  const MoeForward& args;
  const Plan& plan;
  const Products<Tile> multiply;
  const int64_t rows;
  const Width<Tile> width;
  const Pieces blocks;
  const Buffer<float> z;  // (N, K, C): what each pair contributes to y, not yet weighted

  ForwardContext(const MoeForward& a, const Plan& p)
      : args(a),
        plan(p),
        multiply(library_products()),
        rows(block_rows(p.p)),
        width(p.p.C),
        blocks(p.p.E, [&](int64_t e) { return (p.rows(e) + rows - 1) / rows; }),
        z(p.p.N * p.p.K * p.p.C) {}
  bool ready() const { return blocks.ready() && z.data(); }
};

template <class T, class Tile>
class ForwardBlock {
 public:
  explicit ForwardBlock(const ForwardContext<Tile>& context)
      : x_(context),
        p_(context.plan.p),
        tokens_(x_.rows * x_.width.ld),
        x_transposed_(x_.rows * x_.width.ld),
        gate_up_(FEATURES, p_.C),
        down_(p_.C, FEATURES),
        a_(FEATURES * x_.rows),
        b_(FEATURES * x_.rows),
        u_(FEATURES * x_.rows),
        y_(round_up(p_.C, STEP) * x_.rows) {}
  ~ForwardBlock() { x_.multiply.release(); }
  bool ready() const {
    return tokens_.data() && x_transposed_.data() && gate_up_.ready() && down_.ready() && a_.data() && b_.data() && u_.data() && y_.data();
  }

  void operator()(int64_t task) {
    const auto [e, i] = x_.blocks[task];
    const int64_t i0 = i * x_.rows, n = smaller(x_.rows, x_.plan.rows(e) - i0), padded = round_up(n, STEP);
    gather_tokens<T>(p_.x, p_.stride_x_row, x_.plan, e, i0, n, padded, x_.width, tokens_.data());
    transpose_right(tokens_.data(), padded, x_.width, x_transposed_.data(), x_.rows);
    for (int64_t f = 0; f < p_.F; f += FEATURES) {
      const int64_t features = smaller(FEATURES, p_.F - f);
      project(e, f, features, padded, a_.data());
      project(e, p_.F + f, features, padded, b_.data());
      activate(round_up(features, STEP), padded);
      write_hidden(e, i0, n, f, features);
      const auto& down = down_(x_.plan.template down<T>(e, 0) + f, p_.stride_down_row, p_.C, features);
      x_.multiply(down.M, padded, down.K, down.data, down.ld, u_.data(), x_.rows, y_.data(), x_.rows, f > 0);
    }
    write_transposed<float>(y_.data(), x_.rows, n, p_.C, [&](int64_t r) { return x_.z.data() + x_.plan.pair(e, i0 + r) * p_.C; });
  }

 private:
  void project(int64_t e, int64_t row, int64_t features, int64_t padded, float* to) {
    const auto& w = gate_up_(x_.plan.template gate_up<T>(e, row), p_.stride_gate_up_row, features, p_.C);
    x_.multiply(w.M, padded, w.K, w.data, w.ld, x_transposed_.data(), x_.rows, to, x_.rows, false);
  }

  // a and b, rounded as they are saved, and u as the right factor of the product with down.
  void activate(int64_t features, int64_t padded) const {
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
        store_rows_of_right_factor(u_.data() + f * x_.rows, x_.rows, r, u[0], u[1]);
      }
    }
  }

  void write_hidden(int64_t e, int64_t i0, int64_t n, int64_t f, int64_t features) const {
    const auto row = [&](int64_t column) {
      return [=, this](int64_t r) { return static_cast<T*>(x_.args.hidden) + x_.plan.pair(e, i0 + r) * 2 * p_.F + column; };
    };
    write_transposed<T>(a_.data(), x_.rows, n, features, row(f));
    write_transposed<T>(b_.data(), x_.rows, n, features, row(p_.F + f));
  }

  const ForwardContext<Tile>& x_;
  const MoeProblem& p_;
  Buffer<Tile> tokens_, x_transposed_;
  LeftFactor<T, Tile> gate_up_, down_;
  Buffer<float> a_, b_;
  Buffer<Tile> u_;
  Buffer<float> y_;
};

template <class T, class Tile>
Error forward(const MoeForward& args, const Plan& plan) {
  const ForwardContext<Tile> context(args, plan);
  if (!context.ready()) return OUT_OF_MEMORY;
  if (const Error error = run_tasks<ForwardBlock<T, Tile>>(context.blocks.size(), context)) return error;
  combine<T>(args.problem, context.z.data(), args.y);
  return nullptr;
}

}  // namespace moe_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
