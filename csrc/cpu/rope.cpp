// RoPE on the CPU. The mathematics: fastprimer/ops/rope.py; the arguments: csrc/rope.h.
//
// Memory-bound: the floor is to read and write q and k once, 2 (H + Hk) D numbers a token, beside R numbers of tables. A token's
// cosines and sines are widened once, a block at a time, and all of its heads are rotated by them.
#include "rope.h"

#include "columns.h"
#include "memory.h"
#include "parallel.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace {

constexpr int64_t BLOCK = 128;  // features that are rotated at a time

// The factors of BLOCK features: x' = x c + x_partner s, where the sign of s is that of the formula.
template <class A>
struct Factors {
  A c[BLOCK], s[BLOCK];
};

// Row `position` of the tables, columns begin..begin+n-1; NaN where there is no such row. Interleaved, every factor stands twice,
// as its pair does, the first time with -s.
template <class A, class T>
void load_factors(const Rope& a, int64_t position, int64_t begin, int64_t n, Factors<A>& factors) {
  const bool inside = 0 <= position && position < a.P;
  const T* cos = static_cast<const T*>(a.cos) + (inside ? position : 0) * a.stride_cos_row + begin;
  const T* sin = static_cast<const T*>(a.sin) + (inside ? position : 0) * a.stride_sin_row + begin;
  const int64_t step = a.interleaved ? 2 : 1;
  for (int64_t i = 0; i < n; i++) {
    const A c = inside ? to_wide(cos[i]) : A(__builtin_nan("")), s = inside ? to_wide(sin[i]) : A(__builtin_nan(""));
    factors.c[step * i] = c;
    factors.s[step * i] = a.inverse ? -s : s;
  }
  if (!a.interleaved) return;
  for (int64_t i = 0; i < n; i++) {
    factors.c[2 * i + 1] = factors.c[2 * i];
    factors.s[2 * i + 1] = factors.s[2 * i];
    factors.s[2 * i] = -factors.s[2 * i];
  }
}

template <class A, class T>
void load_factors_of(const Rope& a, int64_t position, int64_t begin, int64_t n, Factors<A>& factors) {
  if (a.table_dtype == a.dtype)
    load_factors<A, T>(a, position, begin, n, factors);
  else
    load_factors<A, float>(a, position, begin, n, factors);
}

// n pairs (x[i], x[i + half]) of one head.
template <class T, class Put>
inline void rotate_halves(const T* x, T* y, int64_t half, int64_t n, const Factors<Wide<T>>& factors, Put put) {
  fill_columns({y, y + half}, 0, n, put, [&](int64_t i, auto count) {
    const Vec<Wide<T>> a = load(x + i, count), b = load(x + half + i, count);
    const Vec<Wide<T>> c = load(factors.c + i, count), s = load(factors.s + i, count);
    return Outputs{a * c - b * s, a * s + b * c};
  });
}

// n features, neighbours in pairs, of one head.
template <class T, class Put>
inline void rotate_neighbours(const T* x, T* y, int64_t n, const Factors<Wide<T>>& factors, Put put) {
  fill_columns({y}, 0, n, put, [&](int64_t i, auto count) {
    const Vec<Wide<T>> v = load(x + i, count);
    return Outputs{v * load(factors.c + i, count) + exchanged(v, 1) * load(factors.s + i, count)};
  });
}

template <class T, class Put>
inline void rotate_heads(const Rope& a, const RopeHeads& heads, int64_t batch, int64_t token, int64_t begin, int64_t n,
                         const Factors<Wide<T>>& factors, Put put) {
  const T* x = static_cast<const T*>(heads.x) + batch * heads.stride_batch + token * heads.stride_token;
  T* y = static_cast<T*>(heads.rotated) + (batch * a.S + token) * heads.heads * a.D;
  for (int64_t head = 0; head < heads.heads; head++, x += heads.stride_head, y += a.D) {
    if (a.interleaved)
      rotate_neighbours(x + 2 * begin, y + 2 * begin, 2 * n, factors, put);
    else
      rotate_halves(x + begin, y + begin, a.R / 2, n, factors, put);
    if (begin == 0 && a.R < a.D) __builtin_memcpy(y + a.R, x + a.R, (a.D - a.R) * sizeof(T));
  }
}

int64_t position_of(const Rope& a, int64_t batch, int64_t token) {
  if (a.positions == nullptr) return token;
  const int64_t offset = batch * a.stride_positions_batch + token * a.stride_positions_token;
  return a.positions_are_64_bit ? static_cast<const int64_t*>(a.positions)[offset] : static_cast<const int32_t*>(a.positions)[offset];
}

template <class T>
bool heads_past_cache(const Rope& a, const RopeHeads& heads) {
  const int64_t head_bytes = a.D * sizeof(T), half_bytes = a.R / 2 * sizeof(T);
  return past_cache(heads.rotated, a.B * a.S * heads.heads, head_bytes, head_bytes) && half_bytes % REGISTER_BYTES == 0;
}

template <class T>
Error rotate(const Rope& a) {
  const int64_t numbers = (a.q.heads + a.k.heads) * a.D, pairs = a.interleaved ? BLOCK / 2 : BLOCK;
  const RopeHeads queries_and_keys[] = {a.q, a.k};
  for (const RopeHeads& heads : queries_and_keys) expect_writes(heads.rotated, a.B * a.S * heads.heads * a.D * sizeof(T));
  const bool past[] = {heads_past_cache<T>(a, a.q), heads_past_cache<T>(a, a.k)};
  parallel_for(a.B * a.S, numbers < GRAIN ? GRAIN / numbers : 1, [&](int64_t i) {
    const int64_t batch = i / a.S, token = i % a.S, position = position_of(a, batch, token);
    Factors<Wide<T>> factors;
    for (int64_t begin = 0; begin < a.R / 2; begin += pairs) {
      const int64_t n = a.R / 2 - begin < pairs ? a.R / 2 - begin : pairs;
      load_factors_of<Wide<T>, T>(a, position, begin, n, factors);
      for (int i = 0; i < 2; i++)
        with_stores(past[i], [&](auto put) { rotate_heads<T>(a, queries_and_keys[i], batch, token, begin, n, factors, put); });
    }
  });
  return nullptr;
}

}  // namespace

Error rope(const Rope& args) {
  return by_dtype(args.dtype, [&](auto element) { return rotate<decltype(element)>(args); });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
