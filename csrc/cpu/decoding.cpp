// Decoding on the CPU. The mathematics: fastprimer/ops/decoding.py; the arguments: csrc/decoding.h.
//
// Memory-bound: the floor is to read the keys and values that are seen once, T Hk (D + Dv) numbers a sequence; each meets the S H / Hk
// rows of queries of its group, 2 S H (D + Dv) FLOPs a key. Chunks of keys are worked on side by side, whatever sequence they belong to;
// how they are cut depends on lengths and shapes alone, and they are put together in their order.
#include "columns.h"
#include "decoding_plan.h"
#include "dots.h"
#include "simd_math.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace decoding_pass {
namespace {

constexpr int64_t LD_SCORES = CHUNK + LANES;

// What a chunk of keys contributes to a row: o and the sum of weights, both relative to 2^top.
struct Part {
  static constexpr int64_t HEAD = 2;
  float* data;

  float& top() const { return data[0]; }
  float& total() const { return data[1]; }
  float* o() const { return data + HEAD; }
};

template <class T>
struct Context {
  const Decoding& a;
  const Plan plan;
  const float factor, cap;  // of scores, in units of log 2; cap 0: none
  const Buffer<float> parts;

  explicit Context(const Decoding& args)
      : a(args),
        plan(args, sizeof(T)),
        factor(static_cast<float>(args.scale * 1.4426950408889634)),
        cap(static_cast<float>(args.softcap * 1.4426950408889634)),
        parts(plan.ready() ? plan.chunks() * args.Hk * plan.rows * (args.Dv + Part::HEAD) : 0) {}
  bool ready() const { return plan.ready() && parts.data(); }

  Part part(int64_t chunk, int64_t kv_head, int64_t row) const {
    return {parts.data() + ((chunk * a.Hk + kv_head) * plan.rows + row) * (a.Dv + Part::HEAD)};
  }
};

template <class T>
class DecodeChunk {
 public:
  explicit DecodeChunk(const Context<T>& context)
      : x_(context),
        a_(context.a),
        block_(context.plan.rows == 1 ? LANES : 16 / sizeof(T)),
        padded_(round_up(context.plan.rows, 4)),
        ld_q_(round_up(context.a.D, Dot<T>::size)),
        ld_o_(round_up(context.a.Dv, LANES)),
        q_(context.plan.heads * padded_ * ld_q_),
        scores_(context.plan.heads * padded_ * LD_SCORES),
        o_(context.plan.heads * padded_ * ld_o_) {}
  bool ready() const { return q_.data() && scores_.data() && o_.data(); }

  void operator()(int64_t task) const {
    const Chunk chunk = x_.plan.chunk(task);
    const int64_t heads = chunk.heads;
    if (a_.appended > 0) append(chunk);
    for (int64_t h = 0; h < heads; h++) gather_queries(chunk.sequence, chunk.first + h, q_.data() + h * padded_ * ld_q_);
    multiply_keys(chunk);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t r = 0; r < x_.plan.rows; r++) softmax(chunk, chunk.first + h, r, scores_of(h, r));
    __builtin_memset(o_.data(), 0, heads * padded_ * ld_o_ * sizeof(float));
    multiply_values(chunk);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t r = 0; r < x_.plan.rows; r++)
        __builtin_memcpy(x_.part(chunk.index, chunk.first + h, r).o(), o_of(h, r), a_.Dv * sizeof(float));
  }

 private:
  float* scores_of(int64_t h, int64_t r) const { return scores_.data() + (h * padded_ + r) * LD_SCORES; }
  float* o_of(int64_t h, int64_t r) const { return o_.data() + (h * padded_ + r) * ld_o_; }
  // Of the row, within the chunk's keys: those that it sees.
  Range seen_by(const Chunk& chunk, int64_t r) const { return chunk.sequence.keys_of(x_.plan.position(r)).within(chunk.keys); }

  // The new tokens among these keys. No other task reads or writes them.
  void append(const Chunk& chunk) const {
    const int64_t cached = chunk.sequence.T - a_.S, b = chunk.sequence.batch;
    for (int64_t j = larger(chunk.keys.begin, cached); j < chunk.keys.end; j++) {
      const Block at = x_.plan.block(b, j, 1);
      for (int64_t h = chunk.first; h < chunk.first + chunk.heads; h++) {
        __builtin_memcpy(row_of<T>(a_.k_cache, at.page, at.row, h), row_of<T>(a_.k, b, j - cached, h), a_.D * sizeof(T));
        __builtin_memcpy(row_of<T>(a_.v_cache, at.page, at.row, h), row_of<T>(a_.v, b, j - cached, h), a_.Dv * sizeof(T));
      }
    }
  }

  void gather_queries(const Sequence& s, int64_t kv_head, typename Dot<T>::Number* to) const {
    __builtin_memset(to, 0, padded_ * ld_q_ * sizeof(*to));
    for (int64_t r = 0; r < x_.plan.rows; r++, to += ld_q_) {
      const T* row = row_of<T>(a_.q, s.batch, x_.plan.position(r), x_.plan.query_head(kv_head, r));
      for_columns<float>(0, a_.D, [&](int64_t c, auto n, int) { store(to + c, load(row + c, n), n); });
    }
  }

  // body(h, j, n, row, next) for the heads of a task and the rows of a cache that hold keys j .. j + n - 1 of the chunk, a few at a time,
  // and those that it will be called with after all heads have had these.
  template <class Body>
  void for_blocks(const Heads& cache, const Chunk& chunk, Range keys, const Body& body) const {
    const auto block_at = [&](int64_t j) {  // up to a multiple of block_, so that pages do not change the order of sums
      const int64_t key = chunk.keys.begin + j, n = block_ - key % block_;
      return x_.plan.block(chunk.sequence.batch, key, smaller(n, keys.end - j));
    };
    if (keys.empty()) return;
    Block next = block_at(keys.begin);
    for (int64_t j = keys.begin; j < keys.end;) {
      const Block block = next;
      if (j + block.n < keys.end) next = block_at(j + block.n);
      for (int64_t h = 0; h < chunk.heads; h++)
        body(h, j, block.n, row_of<T>(cache, block.page, block.row, chunk.first + h),
             row_of<T>(cache, next.page, next.row, chunk.first + h));
      j += block.n;
    }
  }

  void multiply_keys(const Chunk& chunk) const {
    const auto multiply = [&](int64_t h, int64_t j, int64_t n, const T* keys, const T* next) {
      for_row_blocks(x_.plan.rows, [&](int64_t r, auto rows) {
        dots_of_rows<decltype(rows)::value>(q_.data() + (h * padded_ + r) * ld_q_, ld_q_, keys, a_.k_cache.stride_token, n, a_.D,
                                            scores_of(h, r) + j, LD_SCORES, r == 0 ? next : keys);
      });
    };
    for_blocks(a_.k_cache, chunk, {0, chunk.keys.end - chunk.keys.begin}, multiply);
  }

  // Turns a row's scores into weights relative to the largest; what is not seen has the weight 0.
  void softmax(const Chunk& chunk, int64_t kv_head, int64_t r, float* score) const {
    const Part part = x_.part(chunk.index, kv_head, r);
    const Range seen = seen_by(chunk, r);
    part.top() = -__builtin_inff();
    part.total() = 0;
    if (seen.empty()) return;
    const int64_t begin = seen.begin / LANES * LANES, end = round_up(seen.end, LANES);
    Vec<float> most = Vec<float>{} - __FLT_MAX__;
    for (int64_t c = begin; c < end; c += LANES) {
      Vec<float> z = load(score + c) * x_.factor;
      if (x_.cap > 0) z = tanh_of(z / x_.cap) * x_.cap;
      store(score + c, z);
    }
    for (int64_t c = begin; c < seen.begin; c++) score[c] = -__builtin_inff();
    for (int64_t c = seen.end; c < end; c++) score[c] = -__builtin_inff();
    for (int64_t c = begin; c < end; c += LANES) most = at_least(most, load(score + c));
    const float top = largest(most);
    Vec<float> sums{};
    for (int64_t c = begin; c < end; c += LANES) {
      const Vec<float> p = exp2_of<6>(load(score + c) - top);
      store(score + c, p);
      sums += p;
    }
    part.top() = top;
    part.total() = sum<float>(sums);
  }

  void multiply_values(const Chunk& chunk) const {
    // 0 times NaN is NaN: only the keys that all rows see meet all rows.
    const int64_t n = chunk.keys.end - chunk.keys.begin;
    const int64_t begin = smaller(seen_by(chunk, x_.plan.rows - 1).begin, n), end = larger(seen_by(chunk, 0).end, begin);
    multiply_values_by_all(chunk, {begin, end});
    multiply_values_by_some(chunk, {0, begin});
    multiply_values_by_some(chunk, {end, n});
  }

  void multiply_values_by_all(const Chunk& chunk, Range keys) const {
    for_blocks(a_.v_cache, chunk, keys, [&](int64_t h, int64_t j, int64_t n, const T* values, const T* next) {
      for_row_blocks(x_.plan.rows, [&](int64_t r, auto rows) {
        add_weighted_rows<decltype(rows)::value>(scores_of(h, r) + j, LD_SCORES, values, a_.v_cache.stride_token, n, a_.Dv, o_of(h, r),
                                                 ld_o_, r == 0 ? next : values);
      });
    });
  }

  void multiply_values_by_some(const Chunk& chunk, Range keys) const {
    const int64_t stride = a_.v_cache.stride_token;
    for_blocks(a_.v_cache, chunk, keys, [&](int64_t h, int64_t j, int64_t n, const T* values, const T* next) {
      for (int64_t r = 0; r < x_.plan.rows; r++) {
        const Range seen = seen_by(chunk, r).within({j, j + n});
        if (seen.empty()) continue;
        add_weighted_rows<1>(scores_of(h, r) + j + seen.begin, LD_SCORES, values + seen.begin * stride, stride, seen.end - seen.begin,
                             a_.Dv, o_of(h, r), ld_o_, next + seen.begin * stride);
      }
    });
  }

  const Context<T>& x_;
  const Decoding& a_;
  const int64_t block_;  // keys that all heads of a task meet before the next ones: from the first-level cache
  const int64_t padded_, ld_q_, ld_o_;
  Buffer<typename Dot<T>::Number> q_;
  Buffer<float> scores_, o_;
};

// o and lse of a row, from its parts in their order, with the sink.
template <class T>
void finish(const Context<T>& x, int64_t b, int64_t kv_head, int64_t r, float* o) {
  const Decoding& a = x.a;
  const int64_t head = x.plan.query_head(kv_head, r), position = x.plan.position(r);
  const Range chunks = x.plan.chunks_of(b);
  const double sink = a.sinks ? a.sinks[head] * 1.4426950408889634 : -__builtin_inf();
  double top = sink > -__builtin_inf() ? sink : -__FLT_MAX__;
  for (int64_t i = chunks.begin; i < chunks.end; i++) {
    const double part_top = x.part(i, kv_head, r).top();
    top = part_top > top || part_top != part_top ? part_top : top;
  }
  double total = __builtin_exp2(sink - top);
  __builtin_memset(o, 0, a.Dv * sizeof(float));
  for (int64_t i = chunks.begin; i < chunks.end; i++) {
    const Part part = x.part(i, kv_head, r);
    const double weight = __builtin_exp2(part.top() - top);
    const float narrow = static_cast<float>(weight);
    total += weight * part.total();
    if (part.total() == 0) continue;
    for_columns<float>(0, a.Dv, [&](int64_t c, auto n, int) { store(o + c, load(o + c, n) + narrow * load(part.o() + c, n), n); });
  }
  const bool sees_nothing = total == 0;
  a.lse[(b * a.H + head) * a.S + position] =
      sees_nothing ? -__builtin_inff() : static_cast<float>((top + __builtin_log2(total)) * 0.6931471805599453);
  const float share = sees_nothing ? 0.0f : static_cast<float>(1 / total);
  T* to = static_cast<T*>(a.o) + ((b * a.S + position) * a.H + head) * a.Dv;
  for_columns<float>(0, a.Dv, [&](int64_t c, auto n, int) { store(to + c, load(o + c, n) * share, n); });
}

template <class T>
Error run(const Decoding& args) {
  const Context<T> x(args);
  if (!x.ready()) return OUT_OF_MEMORY;
  if (Error error = run_tasks<DecodeChunk<T>>(x.plan.tasks(), x)) return error;
  const Buffer<float> sums(args.B * args.Hk * args.Dv);
  if (!sums.data()) return OUT_OF_MEMORY;
  parallel_for(args.B * args.Hk, 16, [&](int64_t i) {
    for (int64_t r = 0; r < x.plan.rows; r++) finish(x, i / args.Hk, i % args.Hk, r, sums.data() + i * args.Dv);
  });
  return nullptr;
}

}  // namespace
}  // namespace decoding_pass

Error decoding(const Decoding& args) {
  switch (args.dtype) {
    case Dtype::float32:
      return decoding_pass::run<float>(args);
    case Dtype::bfloat16:
      return decoding_pass::run<bfloat16>(args);
    case Dtype::float16:
      return decoding_pass::run<float16>(args);
    case Dtype::float64:
      return "float64 is not written";
  }
  return "unknown dtype";
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
