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

// A row of sums times a factor.
template <class T>
inline void write_row(const float* sums, const Width<float>& width, float factor, T* to) {
  for_columns<float>(0, width.C, [&](int64_t c, auto n, int) { store(to + c, load(sums + c, n) * factor, n); });
}

// Scores in units of log 2.
struct Scores {
  const float factor, cap;

  explicit Scores(const AttentionProblem& p) : factor(static_cast<float>(p.scale) * LOG2_E), cap(static_cast<float>(p.softcap) * LOG2_E) {}

  // Of some products of a query with keys; tanh: of the softcap.
  struct Capped {
    Vec<float> z, tanh;
  };
  ALWAYS_INLINE Capped operator()(Vec<float> products) const {
    if (cap == 0) return {products * factor, Vec<float>{}};
    const Vec<float> t = tanh_of(products * (factor / cap));
    return {t * cap, t};
  }
};

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
      : s(plan.sequence(task / plan.p.Hk)), kv_head(task % plan.p.Hk), tile(s, s.batch, kv_head, 0, s.S * plan.G, plan.G) {}

  Range keys_of_row(int64_t r) const { return s.keys_of(r / tile.G); }
  Range rows_of_key(int64_t j) const { return tile.rows_of(s.queries_of(j)); }
};

template <class T>
class Forward {
 public:
  explicit Forward(const Context<AttentionForward>& context)
      : a_(context.args),
        plan_(context.plan),
        scores_of_(plan_.p),
        k_(plan_.p.D),
        v_(plan_.p.Dv),
        q_(ROWS * k_.width.ld),
        p_(ROWS * KEYS),
        o_(ROWS * v_.width.ld),
        softmax_(ROWS) {}
  bool ready() const { return k_.ready() && v_.ready() && q_.data() && p_.data() && o_.data() && softmax_.ready(); }

  void operator()(int64_t i) const {
    const Task task(plan_, i);
    const QueryTile& tile = task.tile;
    k_.gather<T>(plan_.p.k, task.s, task.kv_head);
    k_.transpose();
    v_.gather<T>(plan_.p.v, task.s, task.kv_head);
    gather_queries<T>(plan_.p.q, tile, k_.width, q_.data());
    multiply(q_.data(), tile.rows, k_, p_.data());
    tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      exponentiate(r, task.s.keys_of(position));
      if (plan_.p.sinks) softmax_.sink[r] = plan_.p.sinks[head] * LOG2_E;
    });
    softmax_.finish(tile.rows, plan_.p.sinks);
    const auto seen = [&](int64_t r) { return task.keys_of_row(r); };
    add_up(tile.rows, task.s.T, p_.data(), KEYS, v_.rows.data(), v_.width, v_.finite(), seen, o_.data());
    tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      a_.lse[plan_.lse_offset(task.s, head, a_.stride_lse_batch, a_.stride_lse_head) + position] = softmax_.top[r];
      T* o = static_cast<T*>(a_.o) + (plan_.query_token(task.s, position) * plan_.p.H + head) * plan_.p.Dv;
      write_row(o_.data() + r * v_.width.ld, v_.width, softmax_.total[r], o);
    });
  }

 private:
  // From a row's products to p = exp2(score - top), their sum, and top.
  void exponentiate(int64_t r, Range seen) const {
    float* row = p_.data() + r * KEYS;
    Vec<float> z[REGISTERS], most = Vec<float>{} - __FLT_MAX__, sums{};
    for (int i = 0; i < REGISTERS; i++) {
      z[i] = lanes_within(seen, i * LANES) ? scores_of_(load(row + i * LANES)).z : Vec<float>{} - __builtin_inff();
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

  const AttentionForward& a_;
  const Plan& plan_;
  const Scores scores_of_;
  const KeyRows k_, v_;
  const Buffer<float> q_, p_, o_;
  const Softmax softmax_;
};

template <class T>
class Backward {
 public:
  explicit Backward(const Context<AttentionBackward>& context)
      : a_(context.args),
        plan_(context.plan),
        scores_of_(plan_.p),
        k_(plan_.p.D),
        v_(plan_.p.Dv),
        q_(ROWS * k_.width.ld),
        dout_(ROWS * v_.width.ld),
        p_(ROWS * KEYS),
        ds_(ROWS * KEYS),
        weights_(KEYS * ROWS),
        sums_(ROWS * larger(k_.width.ld, v_.width.ld)),
        scale_(static_cast<float>(plan_.p.scale)) {}
  bool ready() const {
    return k_.ready() && v_.ready() && q_.data() && dout_.data() && p_.data() && ds_.data() && weights_.data() && sums_.data();
  }

  void operator()(int64_t i) const {
    const AttentionProblem& p = plan_.p;
    const Task task(plan_, i);
    const QueryTile& tile = task.tile;
    k_.gather<T>(p.k, task.s, task.kv_head);
    v_.gather<T>(p.v, task.s, task.kv_head);
    k_.transpose();
    v_.transpose();
    gather_queries<T>(p.q, tile, k_.width, q_.data());
    gather_queries<T>(a_.dout, tile, v_.width, dout_.data());
    multiply(q_.data(), tile.rows, k_, p_.data());
    multiply(dout_.data(), tile.rows, v_, ds_.data());
    tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      differentiate(r, task.s.keys_of(position), plan_.lse_offset(task.s, head, a_.stride_lse_batch, a_.stride_lse_head) + position,
                    static_cast<const T*>(a_.o) + row_of_query(task.s, position, head) * p.Dv);
    });
    write_dq(task);
    write_dk_dv(task);
  }

 private:
  // From a row's products with the keys, and those of its gradient with the values, to p and ds; `at`: where its lse lies.
  void differentiate(int64_t r, Range seen, int64_t at, const T* o) const {
    const bool sees = a_.lse[at] != -__builtin_inff();
    const float* dout = dout_.data() + r * v_.width.ld;
    const float product = sum_columns<float>(v_.width.C, [&](int64_t c, auto n) { return load(o + c, n) * load(dout + c, n); });
    const float lse = sees ? a_.lse[at] * LOG2_E : __builtin_inff(), delta = sees ? product - (a_.dlse ? a_.dlse[at] : 0.0f) : 0.0f;
    a_.delta[at] = delta;
    for (int i = 0; i < REGISTERS; i++) {
      float *p_row = p_.data() + r * KEYS + i * LANES, *ds_row = ds_.data() + r * KEYS + i * LANES;
      const Scores::Capped score = scores_of_(load(p_row));
      const Vec<float> p = exp2_of<6>(score.z - lse), ds = p * (load(ds_row) - delta) * (1 - score.tanh * score.tanh);
      const auto is_seen = lanes_within(seen, i * LANES);
      store(p_row, is_seen ? p : Vec<float>{});
      store(ds_row, is_seen ? ds : Vec<float>{});
    }
  }

  int64_t row_of_query(const Sequence& s, int64_t position, int64_t head) const {
    return plan_.query_token(s, position) * plan_.p.H + head;
  }

  void write_dq(const Task& task) const {
    const auto seen = [&](int64_t r) { return task.keys_of_row(r); };
    add_up(task.tile.rows, task.s.T, ds_.data(), KEYS, k_.rows.data(), k_.width, k_.finite(), seen, sums_.data());
    task.tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      T* dq = static_cast<T*>(a_.dq) + row_of_query(task.s, position, head) * plan_.p.D;
      write_row(sums_.data() + r * k_.width.ld, k_.width, scale_, dq);
    });
  }

  void write_dk_dv(const Task& task) const {
    write_key_rows(task, ds_.data(), q_.data(), k_.width, scale_, static_cast<T*>(a_.dk));
    write_key_rows(task, p_.data(), dout_.data(), v_.width, 1, static_cast<T*>(a_.dv));
  }

  // The keys' gradients from weights (rows, KEYS) of rows of q or do.
  void write_key_rows(const Task& task, const float* weights, const float* rows, const Width<float>& width, float factor, T* to) const {
    const int64_t n = task.tile.rows;
    for (int64_t r = 0; r < n; r += KEYS) transpose_block(words(weights + r * KEYS), KEYS, words(weights_.data() + r), ROWS);
    const auto seen = [&](int64_t j) { return task.rows_of_key(j); };
    add_up(task.s.T, n, weights_.data(), ROWS, rows, width, all_finite(rows, n * width.ld), seen, sums_.data());
    for (int64_t j = 0; j < task.s.T; j++)
      write_row(sums_.data() + j * width.ld, width, factor, to + (plan_.key_token(task.s, j) * plan_.p.Hk + task.kv_head) * width.C);
  }

  const AttentionBackward& a_;
  const Plan& plan_;
  const Scores scores_of_;
  const KeyRows k_, v_;
  const Buffer<float> q_, dout_, p_, ds_, weights_, sums_;
  const float scale_;
};

template <class Pass, class Args>
Error run(const Context<Args>& context) {
  return context.ready() ? run_tasks<Pass>(context.plan.p.B * context.plan.p.Hk, context) : OUT_OF_MEMORY;
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
