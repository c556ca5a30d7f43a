// What the passes of a mixture of experts share on the CPU: which tokens go to an expert, its weights as factors of products, and the
// sums over a token's experts.
#pragma once
#include "dots.h"
#include "moe.h"
#include "pack.h"
#include "products.h"
#include "simd_math.h"
#include "tasks.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace moe_pass {

constexpr int64_t SLICE = 64;  // hidden features, or columns of x and y, that one task is about
constexpr int64_t STEP = 16;   // sizes of products are multiples of it

// Numbers of tokens in the backward pass are multiples of this.
template <class Tile>
constexpr int64_t TOKEN_STEP = is_bfloat16<Tile> ? STEP : TRANSPOSED;

// Pairs sorted by expert, in the order of tokens within each: a histogram, its running sum, and a stable scatter. In scratch memory
// every expert's rows begin at a multiple of `step`, and zeros follow them up to the next.
class Plan {
 public:
  const MoeProblem& p;

  Plan(const MoeProblem& problem, int64_t step)
      : p(problem), begin_(p.E + 1), padded_(p.E + 1), next_(p.E), pairs_(p.N * p.K), tokens_(p.N * p.K) {
    if (!ready()) return;
    __builtin_memset(next_.data(), 0, p.E * sizeof(int64_t));
    for (int64_t i = 0; i < p.N * p.K; i++) next_[p.experts[i]]++;
    begin_[0] = padded_[0] = 0;
    for (int64_t e = 0; e < p.E; e++) {
      begin_[e + 1] = begin_[e] + next_[e];
      padded_[e + 1] = padded_[e] + round_up(next_[e], step);
      active_ += next_[e] > 0;
      next_[e] = begin_[e];
    }
    for (int64_t n = 0; n < p.N; n++) {
      for (int64_t i = n * p.K; i < (n + 1) * p.K; i++) {
        const int64_t place = next_[p.experts[i]]++;
        pairs_[place] = i;
        tokens_[place] = n;
      }
    }
  }
  bool ready() const { return begin_.data() && padded_.data() && next_.data() && pairs_.data() && tokens_.data(); }

  int64_t rows(int64_t e) const { return begin_[e + 1] - begin_[e]; }
  int64_t padded_rows(int64_t e) const { return padded_[e + 1] - padded_[e]; }
  int64_t padded_begin(int64_t e) const { return padded_[e]; }
  int64_t all_padded_rows() const { return ready() ? padded_[p.E] : 0; }
  int64_t active_experts() const { return active_; }
  // Row i of an expert.
  int64_t pair(int64_t e, int64_t i) const { return pairs_[begin_[e] + i]; }
  int64_t token(int64_t e, int64_t i) const { return tokens_[begin_[e] + i]; }

  template <class T>
  const T* gate_up(int64_t e, int64_t row) const {
    return static_cast<const T*>(p.gate_up) + e * p.stride_gate_up_expert + row * p.stride_gate_up_row;
  }
  template <class T>
  const T* down(int64_t e, int64_t row) const {
    return static_cast<const T*>(p.down) + e * p.stride_down_expert + row * p.stride_down_row;
  }

 private:
  Buffer<int64_t> begin_, padded_, next_, pairs_, tokens_;
  int64_t active_ = 0;
};

// Rows i0 .. i0 + n - 1 of an expert from a tensor like x, as `padded` rows of a tile.
template <class T, class Tile>
void gather_tokens(const void* x, int64_t stride_row, const Plan& plan, int64_t e, int64_t i0, int64_t n, int64_t padded,
                   const Width<Tile>& width, Tile* tile) {
  for (int64_t r = 0; r < n; r++) gather_row(static_cast<const T*>(x) + plan.token(e, i0 + r) * stride_row, width, tile + r * width.ld);
  __builtin_memset(tile + n * width.ld, 0, (padded - n) * width.ld * sizeof(Tile));
}

// `n` rows of `columns` weights as the left factor of a product, with a multiple of STEP rows: where they lie, if the product can read
// them there, else a copy.
template <class T, class Tile>
class LeftFactor {
 public:
  LeftFactor(int64_t most_rows, int64_t most_columns) : copy_(round_up(most_rows, STEP) * Width<Tile>(most_columns).ld) {}
  bool ready() const { return copy_.data() != nullptr; }

  const Tile* data;
  int64_t ld, M, K;

  LeftFactor& operator()(const T* rows, int64_t stride, int64_t n, int64_t columns) {
    const Width<Tile> width(columns);
    M = round_up(n, STEP);
    K = width.used;
    if constexpr (sizeof(T) == sizeof(Tile)) {
      if (M == n && K == columns) {
        data = rows;
        ld = stride;
        return *this;
      }
    }
    gather_rows(rows, stride, n, M, width, copy_.data());
    data = copy_.data();
    ld = width.ld;
    return *this;
  }

 private:
  Buffer<Tile> copy_;
};

// silu(a), and its slope.
template <class T>
struct Silu {
  Vec<float> value, slope;

  ALWAYS_INLINE explicit Silu(Vec<float> a) : Silu(a, Sigmoid<T>(a)) {}

 private:
  ALWAYS_INLINE Silu(Vec<float> a, const Sigmoid<T>& sigma) : value(a * sigma.value), slope(sigma.value + a * sigma.slope) {}
};

// da, db and w u of some features of a pair with weight w, from d and what forward saved, a and F numbers behind it b; and d u, their share
// of dweights.
template <class T, class To>
float differentiate_row(const T* hidden, int64_t F, float w, int64_t features, const float* d_row, To* da, To* db, To* wu) {
  return sum_columns<float>(features, [&](int64_t c, auto count) {
    const Vec<float> a = load(hidden + c, count), b = load(hidden + F + c, count), d = load(d_row + c, count);
    const Silu<T> silu(a);
    const Vec<float> u = silu.value * b, du = w * d;
    store(da + c, du * b * silu.slope, count);
    store(db + c, du * silu.value, count);
    store(wu + c, w * u, count);
    return d * u;
  });
}

// Whether the gradients of all experts' weights are worth storing past the caches, and may be.
template <class T>
bool gradient_past_cache(const void* gradient, int64_t rows, int64_t columns) {
  return past_cache(gradient, rows, columns * sizeof(T), columns * sizeof(T));
}

// Of an expert without tokens: zeros for n numbers of a gradient, whole rows or, between features that are multiples of a line, of as many.
template <class T>
void clear(T* gradient, int64_t n, bool past_cache) {
  const int64_t bytes = n * sizeof(T);
  if (!past_cache) {
    __builtin_memset(gradient, 0, bytes);
    return;
  }
  for (int64_t i = 0; i < bytes; i += REGISTER_BYTES) stream(reinterpret_cast<float*>(reinterpret_cast<char*>(gradient) + i), Vec<float>{});
}

// Of a tile of sums (features, rows), rows ld apart, a multiple of STEP of each: body(place(r), c, numbers, count) for n rows r and
// `columns` features from c on, up to 16 at a time, numbers[i] = tile[(c + i) ld + r].
template <class Place, class Body>
void for_transposed(const float* tile, int64_t ld, int64_t n, int64_t columns, const Place& place, const Body& body) {
  alignas(REGISTER_BYTES) float block[16 * 16];
  decltype(place(0)) places[16];  // found once for all features
  for (int64_t r0 = 0; r0 < n; r0 += 16) {
    const int64_t rows = smaller(16, n - r0);
    for (int64_t r = 0; r < rows; r++) places[r] = place(r0 + r);
    for (int64_t c = 0; c < columns; c += 16) {
      transpose_block(words(tile + c * ld + r0), ld, words(block), 16);
      for (int64_t r = 0; r < rows; r++) body(places[r], c, block + 16 * r, smaller(16, columns - c));
    }
  }
}

// What follows asks for rows whose place the processor does not foresee: so they come while the product before their use is computed.
template <class T>
void ask_for_row(const T* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += LINE<T>) ask_for(row + c);
}

template <class T>
void ask_for_rows(const T* rows, int64_t stride, int64_t n, int64_t columns) {
  for (int64_t r = 0; r < n; r++) ask_for_row(rows + r * stride, columns);
}

// Some features of a pair in hidden.
template <class T>
void ask_for_hidden(const void* hidden, int64_t pair, int64_t F, int64_t f, int64_t features) {
  ask_for_rows(static_cast<const T*>(hidden) + pair * 2 * F + f, F, 2, features);
}

// Float sums of an output of T (rows, columns), slice by slice of its columns: in the output itself if it is of float, else in scratch
// memory, each slice in one piece. (Parts of rows a power of two apart would push each other out of the caches.)
template <class T>
class SlicedSums {
 public:
  SlicedSums(void* output, int64_t rows, int64_t columns)
      : output_(static_cast<T*>(output)), rows_(rows), columns_(columns), other_(IN_PLACE ? 0 : rows * round_up(columns, SLICE)) {}
  bool ready() const { return other_.data() != nullptr; }

  // Columns c .. c + SLICE - 1 of a row; c is a multiple of SLICE.
  float* row(int64_t n, int64_t c) const {
    if constexpr (IN_PLACE)
      return output_ + n * columns_ + c;
    else
      return other_.data() + c * rows_ + n * SLICE;
  }

  void clear(int64_t c) const {
    for (int64_t n = 0; n < rows_; n++) __builtin_memset(row(n, c), 0, smaller(SLICE, columns_ - c) * sizeof(float));
  }

  void write() const {
    if constexpr (IN_PLACE) return;
    parallel_for(rows_, GRAIN / columns_ + 1, [&](int64_t n) {
      for (int64_t c = 0; c < columns_; c += SLICE) {
        T* to = output_ + n * columns_ + c;
        for_columns<float>(0, smaller(SLICE, columns_ - c),
                           [&](int64_t i, auto count, int) { store(to + i, load(row(n, c) + i, count), count); });
      }
    });
  }

 private:
  static constexpr bool IN_PLACE = sizeof(T) == sizeof(float);

  T* const output_;
  const int64_t rows_, columns_;
  const Buffer<float> other_;
};

}  // namespace moe_pass
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
