// Attention backward on the CPU, in one sweep: a tile of queries meets the keys that it sees block by block and adds its share to dk
// and dv; its dq is complete at the end.
//
// Everything is transposed, keys by queries: then p and ds are left factors of dv = p do and dk = ds q as they come, and ds is the right
// factor of dq = k ds. Several sweeps, each over neighbouring tiles of a sequence, about as many pairs as any other, run side by side with
// a dk and dv of their own for the keys that they meet; those are added up in their order. How many there are depends on the shape alone.
//
// Compute-bound: 2 (3 D + 2 Dv) FLOPs for each visible pair. Moved: q, k, v, o, do and the gradients once, and float32 sums of dk and dv.
#pragma once
#include "attention_sweeps.h"
#include "simd_math.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace backward_pass {

// Of the exponential's polynomial: p is rounded to a tile's type.
template <class Tile>
constexpr int DEGREE = is_bfloat16<Tile> ? 3 : 6;

template <class T, class Tile>
class PackKeys {
 public:
  explicit PackKeys(const Context<Tile>& context) : x_(context) {}
  bool ready() const { return true; }

  void operator()(int64_t task) const {
    const Plan& plan = x_.plan;
    const auto [b, i] = x_.blocks[task / plan.p.Hk];
    const int64_t kv_head = task % plan.p.Hk, n0 = i * KEY_BLOCK, padded = plan.block_width(b, n0), at = plan.padded_key(b, kv_head, n0);
    const Sequence s = plan.sequence(b);
    const int64_t n = smaller(KEY_BLOCK, s.T - n0);
    const Heads &k = plan.p.k, &v = plan.p.v;
    Tile* keys = x_.k.data() + at * x_.width.ld;
    gather_rows(token<T>(k, s, s.k_begin, n0, kv_head), k.stride_token, n, padded, x_.width, keys);
    transpose_left(keys, padded, x_.width, x_.k_transposed.data() + at * x_.width.ld, padded);
    gather_rows(token<T>(v, s, s.k_begin, n0, kv_head), v.stride_token, n, padded, x_.width_v, x_.v.data() + at * x_.width_v.ld);
    x_.finite[at / KEY_STEP] = all_finite(keys, padded * x_.width.ld);
  }

 private:
  const Context<Tile>& x_;
};

// A tile of q or of do: its rows, their transpose as the right factor of a product, and the rows themselves as one.
template <class Tile>
struct QueryFactors {
  const Width<Tile>& width;
  Buffer<Tile> rows, transposed, paired;
  const Tile* right = nullptr;
  bool finite = true;

  explicit QueryFactors(const Width<Tile>& w)
      : width(w), rows(ROWS<Tile> * w.ld), transposed(ROWS<Tile> * w.ld), paired(is_bfloat16<Tile> ? ROWS<Tile> * w.ld : 0) {}
  bool ready() const { return rows.data() && transposed.data() && paired.data(); }

  // From rows that have been gathered.
  void prepare(int64_t n) {
    transpose_right(rows.data(), n, width, transposed.data(), ROWS<Tile>);
    right = right_factor(rows.data(), n, width, paired.data());
    finite = all_finite(rows.data(), n * width.ld);
  }
};

template <class T, class Tile>
class Sweep {
 public:
  explicit Sweep(const Context<Tile>& context)
      : x_(context),
        q_(x_.width),
        dout_(x_.width_v),
        scores_(KEY_BLOCK * ROWS<Tile>),
        dp_(KEY_BLOCK * ROWS<Tile>),
        p_(is_bfloat16<Tile> ? KEY_BLOCK * ROWS<Tile> : 0),
        ds_(is_bfloat16<Tile> ? KEY_BLOCK * ROWS<Tile> : 0),
        ds_paired_(is_bfloat16<Tile> ? KEY_BLOCK * ROWS<Tile> : 0),
        dq_(x_.width.ld * ROWS<Tile>),
        dq_rows_(16 * x_.width.ld),
        lse_(ROWS<Tile>),
        delta_(ROWS<Tile>) {}
  ~Sweep() { x_.multiply.release(); }
  bool ready() const {
    return q_.ready() && dout_.ready() && scores_.data() && dp_.data() && p_.data() && ds_.data() && ds_paired_.data() && dq_.data() &&
           dq_rows_.data() && lse_.data() && delta_.data();
  }

  void operator()(int64_t task) {
    const Plan& plan = x_.plan;
    const auto [b, sweep] = x_.sweeps[task / plan.p.Hk];
    const int64_t kv_head = task % plan.p.Hk;
    const Sequence s = plan.sequence(b);
    const Range tiles = x_.tiles_of_sweep(b, sweep), keys = x_.keys_of_sweep(s, b, sweep);
    if (!keys.empty()) {
      const int64_t at = x_.padded_key(sweep, b, kv_head, keys.begin);
      __builtin_memset(x_.dk.data() + at * x_.width.ld, 0, keys.size() * x_.width.ld * sizeof(float));
      __builtin_memset(x_.dv.data() + at * x_.width_v.ld, 0, keys.size() * x_.width_v.ld * sizeof(float));
    }
    for (int64_t i = tiles.begin; i < tiles.end; i++) {
      const int64_t row0 = i * ROWS<Tile>;
      const QueryTile tile(s, kv_head, row0, smaller(ROWS<Tile>, s.S * plan.G - row0), plan.G);
      prepare(tile);
      for_key_blocks(tile, [&](int64_t block, Range keys) {
        for_strips_of_keys(tile, keys, [&](const Patch& patch) { meet(tile, sweep, block, patch); });
      });
      write_dq(tile);
    }
  }

 private:
  void prepare(const QueryTile& tile) {
    const AttentionBackward& a = x_.args;
    const int64_t padded = tile.padded();
    gather_queries<T>(a.problem.q, tile, x_.width, q_.rows.data());
    x_.scale.apply_sign(q_.rows.data(), tile.rows * x_.width.ld);
    gather_queries<T>(a.dout, tile, x_.width_v, dout_.rows.data());
    q_.prepare(padded);
    dout_.prepare(padded);
    __builtin_memset(dq_.data(), 0, x_.width.ld * ROWS<Tile> * sizeof(float));
    for (int64_t r = 0; r < padded; r++) {
      lse_[r] = __builtin_inff();  // so p is 0: behind the tile's rows, and for a row that sees nothing, which has no gradient
      delta_[r] = 0;
    }
    tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      const int64_t at = x_.plan.lse_offset(tile.sequence, head, a.stride_lse_batch, a.stride_lse_head) + position;
      if (a.lse[at] != -__builtin_inff()) {
        const T* o = static_cast<const T*>(a.o) + x_.plan.query_row(tile.sequence, position, head) * a.problem.Dv;
        const Tile* dout = dout_.rows.data() + r * x_.width_v.ld;
        const float product = sum_columns<float>(a.problem.Dv, [&](int64_t c, auto n) { return load(o + c, n) * load(dout + c, n); });
        lse_[r] = a.lse[at] * LOG2_E;
        delta_[r] = product - (a.dlse ? a.dlse[at] : 0.0f);
      }
      a.delta[at] = delta_[r];
    });
  }

  void meet(const QueryTile& tile, int64_t sweep, int64_t block, const Patch& patch) const {
    const Range keys = patch.keys, rows = patch.rows;
    const int64_t b = tile.sequence.batch, n = keys.size(), m = rows.size(), ld = ROWS<Tile>, ld_block = x_.plan.block_width(b, block);
    const int64_t block_at = x_.plan.padded_key(b, tile.kv_head, block), at = block_at + keys.begin - block;
    const int64_t sum_at = x_.padded_key(sweep, b, tile.kv_head, keys.begin), columns = column_of_right_factor<Tile>(rows.begin);
    const Tile *k = x_.k.data() + at * x_.width.ld, *v = x_.v.data() + at * x_.width_v.ld;
    const Tile* k_transposed = x_.k_transposed.data() + block_at * x_.width.ld + keys.begin - block;
    float *dk = x_.dk.data() + sum_at * x_.width.ld, *dv = x_.dv.data() + sum_at * x_.width_v.ld;
    float *scores = scores_.data() + rows.begin, *dp = dp_.data() + rows.begin;
    x_.multiply(n, m, x_.width.used, k, x_.width.ld, q_.transposed.data() + columns, ld, scores, ld, false);
    x_.multiply(n, m, x_.width_v.used, v, x_.width_v.ld, dout_.transposed.data() + columns, ld, dp, ld, false);
    // Rows behind the tile's last one hold 0, and 0 times an infinite key is no number.
    const bool all = patch.seen_by_all(tile) && (rows.end <= tile.rows || x_.finite[block_at / KEY_STEP]);
    if (x_.scale.cap > 0)
      all ? differentiate<true, false>(tile, patch) : differentiate<true, true>(tile, patch);
    else
      all ? differentiate<false, false>(tile, patch) : differentiate<false, true>(tile, patch);
    const Tile *q_right = q_.right + rows.begin * x_.width.ld, *dout_right = dout_.right + rows.begin * x_.width_v.ld;
    if (all || dout_.finite)
      x_.multiply(n, x_.width_v.used, m, p() + rows.begin, ld, dout_right, x_.width_v.ld, dv, x_.width_v.ld, true);
    else
      add_seen_rows(tile, keys, p(), dout_, dv);
    if (all || q_.finite)
      x_.multiply(n, x_.width.used, m, ds() + rows.begin, ld, q_right, x_.width.ld, dk, x_.width.ld, true);
    else
      add_seen_rows(tile, keys, ds(), q_, dk);
    if (all || x_.finite[block_at / KEY_STEP])
      x_.multiply(x_.width.used, m, n, k_transposed, ld_block, ds_right() + columns, ld, dq_.data() + rows.begin, ld, true);
    else
      add_seen_keys(tile, keys, k);
  }

  Tile* p() const {
    if constexpr (is_bfloat16<Tile>)
      return p_.data();
    else
      return scores_.data();  // in place
  }
  Tile* ds() const {
    if constexpr (is_bfloat16<Tile>)
      return ds_.data();
    else
      return dp_.data();  // in place
  }
  const Tile* ds_right() const { return is_bfloat16<Tile> ? ds_paired_.data() : ds(); }

  Range rows_seeing(const QueryTile& tile, int64_t j) const {
    return j < tile.sequence.T ? tile.rows_of(tile.sequence.queries_of(j)) : Range{0, 0};
  }

  // From the scores and dp of these keys to p and ds.
  template <bool CAPPED, bool MASKED>
  void differentiate(const QueryTile& tile, const Patch& patch) const {
    const Range keys = patch.keys;
    const float inner = CAPPED ? x_.scale.factor / x_.scale.cap : 0;
    for (int64_t j = 0; j < keys.end - keys.begin; j += 2) {
      const Range seen[2] = {MASKED ? rows_seeing(tile, keys.begin + j) : Range{},
                             MASKED ? rows_seeing(tile, keys.begin + j + 1) : Range{}};
      for (int64_t r = patch.rows.begin; r < patch.rows.end; r += LANES) {
        Vec<float> ds[2];
        for (int u = 0; u < 2; u++) {
          const int64_t at = (j + u) * ROWS<Tile> + r;
          const Vec<float> score = load(scores_.data() + at);
          const Vec<float> t = CAPPED ? tanh_of(score * inner) : Vec<float>{};
          const Vec<float> z = CAPPED ? t * x_.scale.cap : score * x_.scale.factor;
          Vec<float> p_row = exp2_of<DEGREE<Tile>>(z - load(lse_.data() + r));
          ds[u] = p_row * (load(dp_.data() + at) - load(delta_.data() + r));
          if (CAPPED) ds[u] *= 1 - t * t;
          if (MASKED) {
            const auto is_seen = lanes_within(seen[u], r);
            p_row = is_seen ? p_row : Vec<float>{};
            ds[u] = is_seen ? ds[u] : Vec<float>{};
          }
          store(p() + at, Flushable<Tile>{p_row});
        }
        store_ds(j, r, ds);
      }
    }
  }

  void store_ds(int64_t j, int64_t r, const Vec<float> (&values)[2]) const {
    Tile* row = ds() + j * ROWS<Tile> + r;
#if defined(__AVX512BF16__)
    if constexpr (is_bfloat16<Tile>) {
      Tile both[2 * LANES];
      store_both(both, values[0], values[1]);
      __builtin_memcpy(row, both, LANES * sizeof(Tile));
      __builtin_memcpy(row + ROWS<Tile>, both + LANES, LANES * sizeof(Tile));
      _mm512_storeu_si512(ds_paired_.data() + j * ROWS<Tile> + 2 * r, alternating(_mm512_loadu_si512(both)));
      return;
    }
#endif
    store(row, values[0]);
    store(row + ROWS<Tile>, values[1]);
  }

  // sums += factor rows, key by key, of the rows that see it: 0 times a row that does not could be NaN.
  void add_seen_rows(const QueryTile& tile, Range keys, const Tile* factor, const QueryFactors<Tile>& factors, float* sums) const {
    for (int64_t j = 0; j < keys.end - keys.begin; j++) {
      const Range seen = rows_seeing(tile, keys.begin + j);
      float* sum = sums + j * factors.width.ld;
      for (int64_t r = seen.begin; r < seen.end; r++) {
        const float weight = to_wide(factor[j * ROWS<Tile> + r]);
        const Tile* row = factors.rows.data() + r * factors.width.ld;
        for_columns<float>(0, factors.width.used,
                           [&](int64_t c, auto n, int) { store(sum + c, load(sum + c, n) + weight * load(row + c, n), n); });
      }
    }
  }

  // dq likewise, row by row, of the keys that it sees.
  void add_seen_keys(const QueryTile& tile, Range keys, const Tile* k) const {
    for (int64_t j = 0; j < keys.end - keys.begin; j++) {
      const Range seen = rows_seeing(tile, keys.begin + j);
      for (int64_t r = seen.begin; r < seen.end; r++)
        for (int64_t c = 0; c < x_.width.C; c++)
          dq_[c * ROWS<Tile> + r] += to_wide(k[j * x_.width.ld + c]) * to_wide(ds()[j * ROWS<Tile> + r]);
    }
  }

  void write_dq(const QueryTile& tile) const {
    const AttentionProblem& p = x_.plan.p;
    const float scale = static_cast<float>(p.scale);
    tile.for_rows([&](int64_t r, int64_t position, int64_t head) {
      for (int64_t c = 0; r % 16 == 0 && c < x_.width.used; c += 16)
        transpose_block(words(dq_.data() + c * ROWS<Tile> + r), ROWS<Tile>, words(dq_rows_.data() + c), x_.width.ld);
      const float* row = dq_rows_.data() + r % 16 * x_.width.ld;
      write_row(row, p.D, scale, static_cast<T*>(x_.args.dq) + x_.plan.query_row(tile.sequence, position, head) * p.D);
    });
  }

  const Context<Tile>& x_;
  QueryFactors<Tile> q_, dout_;
  Buffer<float> scores_, dp_;
  Buffer<Tile> p_, ds_, ds_paired_;
  Buffer<float> dq_, dq_rows_, lse_, delta_;
};

// dk and dv of a block of keys: the sums of all sweeps.
template <class T, class Tile>
class AddSweeps {
 public:
  explicit AddSweeps(const Context<Tile>& context) : x_(context) {}
  bool ready() const { return true; }

  void operator()(int64_t task) const {
    const Plan& plan = x_.plan;
    const AttentionProblem& p = plan.p;
    const auto [b, i] = x_.blocks[task / p.Hk];
    const int64_t kv_head = task % p.Hk;
    const Sequence s = plan.sequence(b);
    const float magnitude = static_cast<float>(p.scale < 0 ? -p.scale : p.scale);  // the sign is in the queries already
    Range sweeps{};
    for (int64_t j = i * KEY_BLOCK; j < smaller((i + 1) * KEY_BLOCK, s.T); j++) {
      if (j % KEY_STEP == 0) sweeps = x_.sweeps_with_key(s, b, j);
      const int64_t to = plan.key_token(s, j) * p.Hk + kv_head, from = plan.padded_key(b, kv_head, j);
      add(x_.dk, x_.width, sweeps, from, magnitude, static_cast<T*>(x_.args.dk) + to * p.D);
      add(x_.dv, x_.width_v, sweeps, from, 1, static_cast<T*>(x_.args.dv) + to * p.Dv);
    }
  }

 private:
  void add(const Buffer<float>& sums, const Width<Tile>& width, Range sweeps, int64_t key, float scale, T* to) const {
    const int64_t stride = x_.plan.padded_keys() * width.ld;
    const float* from = sums.data() + key * width.ld;
    for_columns<float>(0, width.C, [&](int64_t c, auto n, int) {
      Vec<float> total{};
      for (int64_t sweep = sweeps.begin; sweep < sweeps.end; sweep++) total += load(from + sweep * stride + c, n);
      store(to + c, total * scale, n);
    });
  }

  const Context<Tile>& x_;
};

// dsink = -sum exp(sink - lse) delta over all queries of a head, sequence by sequence.
inline void add_up_dsinks(const AttentionBackward& a, const Plan& plan) {
  parallel_for(a.problem.H, 1, [&](int64_t head) {
    const float sink = a.problem.sinks[head];
    double total = 0;
    for (int64_t b = 0; b < a.problem.B; b++) {
      const Sequence s = plan.sequence(b);
      const int64_t at = plan.lse_offset(s, head, a.stride_lse_batch, a.stride_lse_head);
      total += sum_columns<float>(s.S, [&](int64_t i, auto n) {
        const Vec<float> lse = load(a.lse + at + i, n), delta = load(a.delta + at + i, n);
        const Vec<float> share = exp2_of<6>((sink - lse) * LOG2_E) * delta;
        // Behind the last row, too, delta is 0, but not below a large sink is lse, which is 0 there: infinity times 0.
        return (lse == -__builtin_inff()) | (delta == 0.0f) ? Vec<float>{} : share;
      });
    }
    a.dsinks[head] = static_cast<float>(-total);
  });
}

template <class T, class Tile>
Error run(const AttentionBackward& args) {
  const Context<Tile> context(args);
  if (!context.ready()) return OUT_OF_MEMORY;
  const int64_t Hk = args.problem.Hk;
  if (const Error error = run_tasks<PackKeys<T, Tile>>(context.blocks.size() * Hk, context)) return error;
  if (const Error error = run_tasks<Sweep<T, Tile>>(context.sweeps.size() * Hk, context)) return error;
  if (args.problem.sinks) add_up_dsinks(args, context.plan);
  return run_tasks<AddSweeps<T, Tile>>(context.blocks.size() * Hk, context);
}

}  // namespace backward_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
