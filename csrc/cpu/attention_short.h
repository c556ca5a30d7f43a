// Attention over at most KEYS keys on the CPU, both passes: a query's scores are a register or a few, and there is no running softmax, no
// block of keys and no product of a library, whose call takes longer than what it multiplies. A task is a key/value head of a sequence.
//
// Compute-bound: 2 (D + Dv) FLOPs forward, 2 (3 D + 2 Dv) backward for each pair, seen or not, of KEYS keys; moved: everything once.
#pragma once
#include "attention_backward.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace short_pass {

constexpr int64_t KEYS = 16, ROWS = 128;  // of a task, at most
constexpr int REGISTERS = KEYS / LANES;   // with a number for each key

// Whether a call is one for these passes, where otherwise tiles of this type would be multiplied: products of bfloat16 are twice as fast.
template <class Tile>
bool fits(const AttentionProblem& p) {
  const int64_t features = is_bfloat16<Tile> ? 32 : TERMS;
  return p.T <= KEYS && p.S * (p.H / p.Hk) <= ROWS && p.D <= features && p.Dv <= features;
}

// The keys or the values of a head, and their transpose, (features, KEYS).
struct KeyRows {
  const Width<float> width;
  const Buffer<float> rows, transposed;

  explicit KeyRows(int64_t features) : width(features), rows(KEYS * width.ld), transposed(KEYS * width.ld) {}
  bool ready() const { return rows.data() && transposed.data(); }

  template <class T>
  void gather(const Heads& x, const Sequence& s, int64_t head) const {
    gather_rows(token<T>(x, s, s.k_begin, 0, head), x.stride_token, s.T, KEYS, width, rows.data());
  }
  void transpose() const { transpose_right(rows.data(), KEYS, width, transposed.data(), KEYS); }
  bool finite() const { return all_finite(rows.data(), KEYS * width.ld); }
};

// products (n, KEYS) of n rows of x with all keys.
inline void multiply(const float* x, int64_t n, const KeyRows& keys, float* products) {
  product(round_up(n, PRODUCT_ROWS), KEYS, keys.width.C, x, keys.width.ld, keys.transposed.data(), KEYS, products, KEYS, false);
}

// sums (n, features) of so many rows by weights (n, ld), which are 0 where a pair does not see each other. Of rows that are not all finite,
// each sum is of seen(i) alone: 0 times the others could be NaN.
template <class Seen>
inline void add_up(int64_t n, int64_t terms, const float* weights, int64_t ld, const float* rows, const Width<float>& width, bool finite,
                   const Seen& seen, float* sums) {
  if (finite) return product(round_up(n, PRODUCT_ROWS), width.used, terms, weights, ld, rows, width.ld, sums, width.ld, false);
  for (int64_t i = 0; i < n; i++) {
    const Range some = seen(i);
    for (int64_t c = 0; c < width.used; c += LANES) {
      Vec<float> sum{};
      for (int64_t j = some.begin; j < some.end; j++) sum += weights[i * ld + j] * load(rows + j * width.ld + c);
      store(sums + i * width.ld + c, sum);
    }
  }
}

template <class Args>
struct Context {
  const Args& args;
  const Plan plan;

  explicit Context(const Args& a) : args(a), plan(a.problem) {}
  bool ready() const { return plan.ready(); }
};

struct Task {
  const Sequence s;
  const int64_t kv_head;
  const QueryTile tile;  // all of the sequence's rows

  Task(const Plan& plan, int64_t task)
      : s(plan.sequence(task / plan.p.Hk)), kv_head(task % plan.p.Hk), tile(s, kv_head, 0, s.S * plan.G, plan.G) {}

  Range keys_of_row(int64_t r) const { return s.keys_of(r / tile.G); }
  Range rows_of_key(int64_t j) const { return tile.rows_of(s.queries_of(j)); }
};

// What both passes have at hand: a task's keys and values, and its queries, with the sign of the scale, and what becomes of their products.
template <class T, class Args>
struct Pass {
  const Args& a;
  const Plan& plan;
  const Scale scale;
  const KeyRows k, v;
  const Buffer<float> q, p;

  explicit Pass(const Context<Args>& context)
      : a(context.args), plan(context.plan), scale(plan.p), k(plan.p.D), v(plan.p.Dv), q(ROWS * k.width.ld), p(ROWS * KEYS) {}
  bool ready() const { return k.ready() && v.ready() && q.data() && p.data(); }

  void gather(const Task& task) const {
    k.template gather<T>(plan.p.k, task.s, task.kv_head);
    v.template gather<T>(plan.p.v, task.s, task.kv_head);
    gather_queries<T>(plan.p.q, task.tile, k.width, q.data());
    scale.apply_sign(q.data(), task.tile.rows * k.width.ld);
    k.transpose();
    multiply(q.data(), task.tile.rows, k, p.data());
  }
  int64_t lse_at(const Task& task, int64_t position, int64_t head) const {
    return plan.lse_offset(task.s, head, a.stride_lse_batch, a.stride_lse_head) + position;
  }
};

template <class T>
class Forward {
 public:
  explicit Forward(const Context<AttentionForward>& context) : x_(context), o_(ROWS * x_.v.width.ld), softmax_(ROWS) {}
  bool ready() const { return x_.ready() && o_.data() && softmax_.ready(); }

  void operator()(int64_t i) const {
    const AttentionProblem& problem = x_.plan.p;
    const Task task(x_.plan, i);
    const QueryTile& tile = task.tile;
    x_.gather(task);
    tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      exponentiate(r, task.s.keys_of(position));
      if (problem.sinks) softmax_.sink[r] = problem.sinks[head] * LOG2_E;
    });
    softmax_.finish(tile.rows, problem.sinks);
    const auto seen = [&](int64_t r) { return task.keys_of_row(r); };
    add_up(tile.rows, task.s.T, x_.p.data(), KEYS, x_.v.rows.data(), x_.v.width, x_.v.finite(), seen, o_.data());
    tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      x_.a.lse[x_.lse_at(task, position, head)] = softmax_.top[r];
      T* o = static_cast<T*>(x_.a.o) + x_.plan.query_row(task.s, position, head) * problem.Dv;
      write_row(o_.data() + r * x_.v.width.ld, problem.Dv, softmax_.total[r], o);
    });
  }

 private:
  // From a row's products to p = exp2(score - top), their sum, and top.
  void exponentiate(int64_t r, Range seen) const {
    float* row = x_.p.data() + r * KEYS;
    Vec<float> z[REGISTERS], most = Vec<float>{} - __FLT_MAX__, sums{};
    for (int i = 0; i < REGISTERS; i++) {
      z[i] = lanes_within(seen, i * LANES) ? x_.scale(load(row + i * LANES)).z : Vec<float>{} - __builtin_inff();
      most = at_least(z[i], most);
    }
    const float top = largest(most);
    for (int i = 0; i < REGISTERS; i++) {
      const Vec<float> p = exp2_of<6>(z[i] - top);
      store(row + i * LANES, p);
      sums += p;
    }
    softmax_.top[r] = top;
    softmax_.total[r] = sum<float>(sums);
  }

  const Pass<T, AttentionForward> x_;
  const Buffer<float> o_;
  const Softmax softmax_;
};

template <class T>
class Backward {
 public:
  explicit Backward(const Context<AttentionBackward>& context)
      : x_(context),
        dout_(ROWS * x_.v.width.ld),
        ds_(ROWS * KEYS),
        weights_(KEYS * ROWS),
        sums_(ROWS * larger(x_.k.width.ld, x_.v.width.ld)) {}
  bool ready() const { return x_.ready() && dout_.data() && ds_.data() && weights_.data() && sums_.data(); }

  void operator()(int64_t i) const {
    const Task task(x_.plan, i);
    const QueryTile& tile = task.tile;
    x_.gather(task);
    x_.v.transpose();
    gather_queries<T>(x_.a.dout, tile, x_.v.width, dout_.data());
    multiply(dout_.data(), tile.rows, x_.v, ds_.data());
    tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      const T* o = static_cast<const T*>(x_.a.o) + x_.plan.query_row(task.s, position, head) * x_.plan.p.Dv;
      differentiate(r, task.s.keys_of(position), x_.lse_at(task, position, head), o);
    });
    write_dq(task);
    write_dk_dv(task);
  }

 private:
  // From a row's products with the keys, and those of its gradient with the values, to p and ds; `at`: where its lse lies.
  void differentiate(int64_t r, Range seen, int64_t at, const T* o) const {
    const AttentionBackward& a = x_.a;
    const bool sees = a.lse[at] != -__builtin_inff();
    const float* dout = dout_.data() + r * x_.v.width.ld;
    const float product = sum_columns<float>(x_.v.width.C, [&](int64_t c, auto n) { return load(o + c, n) * load(dout + c, n); });
    const float lse = sees ? a.lse[at] * LOG2_E : __builtin_inff(), delta = sees ? product - (a.dlse ? a.dlse[at] : 0.0f) : 0.0f;
    a.delta[at] = delta;
    for (int i = 0; i < REGISTERS; i++) {
      float *p_row = x_.p.data() + r * KEYS + i * LANES, *ds_row = ds_.data() + r * KEYS + i * LANES;
      const Scale::Capped score = x_.scale(load(p_row));
      const Vec<float> p = exp2_of<6>(score.z - lse), ds = p * (load(ds_row) - delta) * (1 - score.tanh * score.tanh);
      const auto is_seen = lanes_within(seen, i * LANES);
      store(p_row, is_seen ? p : Vec<float>{});
      store(ds_row, is_seen ? ds : Vec<float>{});
    }
  }

  void write_dq(const Task& task) const {
    const int64_t D = x_.plan.p.D;
    const float scale = static_cast<float>(x_.plan.p.scale);
    const auto seen = [&](int64_t r) { return task.keys_of_row(r); };
    add_up(task.tile.rows, task.s.T, ds_.data(), KEYS, x_.k.rows.data(), x_.k.width, x_.k.finite(), seen, sums_.data());
    task.tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      write_row(sums_.data() + r * x_.k.width.ld, D, scale, static_cast<T*>(x_.a.dq) + x_.plan.query_row(task.s, position, head) * D);
    });
  }

  void write_dk_dv(const Task& task) const {
    const float magnitude = static_cast<float>(x_.plan.p.scale < 0 ? -x_.plan.p.scale : x_.plan.p.scale);  // the sign is in the queries
    write_key_rows(task, ds_.data(), x_.q.data(), x_.k.width, magnitude, static_cast<T*>(x_.a.dk));
    write_key_rows(task, x_.p.data(), dout_.data(), x_.v.width, 1, static_cast<T*>(x_.a.dv));
  }

  // The keys' gradients from weights (rows, KEYS) of rows of q or do.
  void write_key_rows(const Task& task, const float* weights, const float* rows, const Width<float>& width, float factor, T* to) const {
    const int64_t n = task.tile.rows;
    for (int64_t r = 0; r < n; r += KEYS) transpose_block(words(weights + r * KEYS), KEYS, words(weights_.data() + r), ROWS);
    const auto seen = [&](int64_t j) { return task.rows_of_key(j); };
    add_up(task.s.T, n, weights_.data(), ROWS, rows, width, all_finite(rows, n * width.ld), seen, sums_.data());
    for (int64_t j = 0; j < task.s.T; j++)
      write_row(sums_.data() + j * width.ld, width.C, factor, to + (x_.plan.key_token(task.s, j) * x_.plan.p.Hk + task.kv_head) * width.C);
  }

  const Pass<T, AttentionBackward> x_;
  const Buffer<float> dout_, ds_, weights_, sums_;
};

template <class Worker, class Args>
Error run(const Context<Args>& context) {
  return context.ready() ? run_short_tasks<Worker>(context.plan.p.B * context.plan.p.Hk, context) : OUT_OF_MEMORY;
}

template <class T>
Error forward(const AttentionForward& args) {
  return run<Forward<T>>(Context<AttentionForward>(args));
}

template <class T>
Error backward(const AttentionBackward& args) {
  const Context<AttentionBackward> context(args);
  const Error error = run<Backward<T>>(context);
  if (!error && args.problem.sinks) backward_pass::add_up_dsinks(args, context.plan);
  return error;
}

}  // namespace short_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
