// RMSNorm on the CPU. The mathematics: fastprimer/ops/rms_norm.py; the arguments: csrc/rms_norm.h.
//
// Both passes are memory-bound: the floor is to read and write every row once (forward 2 C, backward 3 C numbers a row).
// A row is swept twice, first for its sum, then for its result, but stays in the L1 or L2 cache in between. The backward
// sweep adds the row's share of dweight on the way: rows are summed by FEW, those sums join one of `partials` sums over
// consecutive rows, and these are added up in their order. How many there are depends on the shape alone, so the bits do
// not depend on the number of threads.
#include "rms_norm.h"

#include "columns.h"
#include "memory.h"
#include "parallel.h"
#include "tasks.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace {

constexpr int64_t FEW = 32;  // rows that are summed up before they join a longer sum: its rounding error stays small

template <class T, class W>
void widen(const W* weight, Wide<T> offset, int64_t C, Wide<T>* w) {
  if constexpr (sizeof(Wide<W>) == sizeof(Wide<T>))
    for_columns<T>(0, C, [&](int64_t c, auto n, int) { store_in_turn(w + c, load(weight + c, n) + offset, n); });
  else
    for (int64_t c = 0; c < C; c++) w[c] = to_wide(weight[c]) + offset;
}

// The weight as the kernels use it: weight + weight_offset in the accumulator type, or ones, in the order in which registers come.
template <class T>
void widen_weight(const void* weight, bool as_x, double offset, int64_t C, Wide<T>* w) {
  if (weight == nullptr)
    for (int64_t c = 0; c < C; c++) w[c] = 1;
  else if (as_x)
    widen<T>(static_cast<const T*>(weight), offset, C, w);
  else
    widen<T>(static_cast<const float*>(weight), offset, C, w);
}

// Rows that are swept for their sums one after the other, before each is swept for its result: where rows are short, none waits for its
// root. The last sweeps read nothing but the caches: they ask for the next strip, into the L2 cache, so that the memory does not rest,
// but for forward with a residual, whose first sweep writes (benchmarks/NOTES.md). Behind the last row nothing is read.
template <class T>
int64_t strip_rows(int64_t C, int64_t at_least = 1) {
  constexpr int64_t strip_bytes = 8192;
  return larger(at_least, smaller(FEW, strip_bytes / (C * int64_t(sizeof(T)))));
}

// Rows of 16 bits whose sums backward takes side by side. Wider ones wait for the memory as it is, and go one by one.
constexpr int ROWS = 4;
template <class T>
constexpr bool SIDE_BY_SIDE = sizeof(T) == 2;
template <class T>
int64_t strip_rows_backward(int64_t C) {
  return SIDE_BY_SIDE<T> ? strip_rows<T>(C, ROWS) : 1;
}

// Bytes from which on rows that go one by one do not come by themselves, as the processor reads on.
constexpr int64_t LONG_ROW = 2048;

template <class T>
const T* row_of(const void* data, int64_t row, int64_t stride_row) {
  return data ? static_cast<const T*>(data) + row * stride_row : nullptr;
}

// h of a row that has a residual, and its rstd.
template <class T>
void sum_forward(const RmsNormForward& a, int64_t row) {
  using A = Wide<T>;
  const T* h = row_of<T>(a.x, row, a.stride_x_row);
  if (const T* residual = row_of<T>(a.residual, row, a.stride_residual_row)) {
    T* const sum = static_cast<T*>(a.h) + row * a.C;
    fill_columns({sum}, 0, a.C, ToCache{}, [&](int64_t c, auto n) { return Outputs{load(h + c, n) + load(residual + c, n)}; });
    h = sum;
  }
  const A squares = sum_columns<T>(a.C, [&](int64_t c, auto n) {
    const Vec<A> v = load(h + c, n);
    return v * v;
  });
  static_cast<A*>(a.rstd)[row] = A(1) / square_root(squares / A(a.C) + A(a.eps));
}

template <class T, class Put>
void scale_forward(const RmsNormForward& a, int64_t row, int64_t strip, const Wide<T>* w, Put put) {
  const T* h = a.residual ? row_of<T>(a.h, row, a.C) : row_of<T>(a.x, row, a.stride_x_row);
  const Wide<T> rstd = static_cast<const Wide<T>*>(a.rstd)[row];
  const T* ahead = a.residual ? nullptr : h + strip * a.stride_x_row;
  fill_columns({static_cast<T*>(a.y) + row * a.C}, 0, a.C, put, [=](int64_t c, auto n) {
    if (ahead) ask_for(ahead + c, n);
    return Outputs{Flushable<T>{load(h + c, n) * rstd * load_in_turn(w + c, n)}};
  });
}

template <class T>
Error forward(const RmsNormForward& a) {
  const Buffer<Wide<T>> w(a.C);
  if (w.data() == nullptr) return OUT_OF_MEMORY;
  widen_weight<T>(a.weight, a.weight_dtype == a.dtype, a.weight_offset, a.C, w.data());
  expect_writes(a.y, a.N * a.C * sizeof(T));
  if (a.residual) expect_writes(a.h, a.N * a.C * sizeof(T));
  const int64_t strip = strip_rows<T>(a.C);
  with_stores(past_cache(a.y, a.N, a.C * sizeof(T), a.C * sizeof(T)), [&](auto put) {
    parallel_for((a.N + strip - 1) / strip, GRAIN / (a.C * strip) + 1, [&](int64_t i) {
      const int64_t begin = i * strip, end = smaller(a.N, begin + strip);
      for (int64_t row = begin; row < end; row++) sum_forward<T>(a, row);
      for (int64_t row = begin; row < end; row++) scale_forward<T>(a, row, strip, w.data(), put);
    });
  });
  return nullptr;
}

// What a row of h is shrunk by. dweight is null, or this row's share is added to it, in the order in which registers come.
template <class T>
Wide<T> sum_backward(const RmsNormBackward& a, int64_t row, const Wide<T>* w, Wide<T>* dweight) {
  using A = Wide<T>;
  const T *dy = row_of<T>(a.dy, row, a.stride_dy_row), *h = row_of<T>(a.h, row, a.stride_h_row);
  const A rstd = static_cast<const A*>(a.rstd)[row];
  const A products = sum_columns<T>(a.C, [&](int64_t c, auto n) {
    const Vec<A> dy_h_hat = load(dy + c, n) * (load(h + c, n) * rstd);  // dy h may be too large for its type
    if (dweight) store_in_turn(dweight + c, load_in_turn(dweight + c, n) + dy_h_hat, n);
    return dy_h_hat * load_in_turn(w + c, n);
  });
  return products / A(a.C) * rstd;
}

// The same of ROWS rows, for which the weight and dweight come once.
template <class T>
void sum_rows_backward(const RmsNormBackward& a, int64_t row, const Wide<T>* w, Wide<T>* dweight, Wide<T>* shrink) {
  using A = Wide<T>;
  const T *dy[ROWS], *h[ROWS];
  A rstd[ROWS], products[ROWS] = {};
  for (int r = 0; r < ROWS; r++) {
    dy[r] = row_of<T>(a.dy, row + r, a.stride_dy_row);
    h[r] = row_of<T>(a.h, row + r, a.stride_h_row);
    rstd[r] = static_cast<const A*>(a.rstd)[row + r];
  }
  for (int64_t begin = 0; begin < a.C; begin += SUM_BLOCK) {
    Vec<A> sums[ROWS] = {};
    for_columns<T>(begin, smaller(a.C, begin + SUM_BLOCK), [&](int64_t c, auto n, int) __attribute__((always_inline)) {
      const Vec<A> w_c = load_in_turn(w + c, n);
      Vec<A> dweight_c = dweight ? load_in_turn(dweight + c, n) : Vec<A>{};
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const Vec<A> dy_h_hat = load(dy[r] + c, n) * (load(h[r] + c, n) * rstd[r]);
        dweight_c += dy_h_hat;
        sums[r] += dy_h_hat * w_c;
      }
      if (dweight) store_in_turn(dweight + c, dweight_c, n);
    });
    for (int r = 0; r < ROWS; r++) products[r] += sum<A>(sums[r]);
  }
  for (int r = 0; r < ROWS; r++) shrink[r] = products[r] / A(a.C) * rstd[r];
}

template <class T, class Put>
void scale_backward(const RmsNormBackward& a, int64_t row, int64_t strip, const Wide<T>* w, Wide<T> shrink, Put put) {
  const T* dy = row_of<T>(a.dy, row, a.stride_dy_row);
  const T* h = row_of<T>(a.h, row, a.stride_h_row);
  const T* dh = row_of<T>(a.dh, row, a.stride_dh_row);
  T* const dx = static_cast<T*>(a.dx) + row * a.C;
  const Wide<T> rstd = static_cast<const Wide<T>*>(a.rstd)[row];
  const bool early = SIDE_BY_SIDE<T> || a.C * int64_t(sizeof(T)) >= LONG_ROW;
  const T *dy_ahead = dy + strip * a.stride_dy_row, *h_ahead = h + strip * a.stride_h_row;
  const auto through_norm = [=](int64_t c, auto n) __attribute__((always_inline)) {
    if (early) ask_for(dy_ahead + c, n), ask_for(h_ahead + c, n);
    return rstd * (load(dy + c, n) * load_in_turn(w + c, n) - load(h + c, n) * shrink);
  };
  if (dh == nullptr) {
    fill_columns({dx}, 0, a.C, put, [=](int64_t c, auto n) { return Outputs{Flushable<T>{through_norm(c, n)}}; });
  } else {
    const T* dh_ahead = dh + strip * a.stride_dh_row;
    fill_columns({dx}, 0, a.C, put, [=](int64_t c, auto n) {
      if (early) ask_for(dh_ahead + c, n);
      return Outputs{Flushable<T>{through_norm(c, n) + load(dh + c, n)}};
    });
  }
}

template <class T, class Put>
void backward_rows(const RmsNormBackward& a, int64_t begin, int64_t end, const Wide<T>* w, Wide<T>* dweight, Put put) {
  const int64_t strip = strip_rows_backward<T>(a.C);
  Wide<T> shrink[FEW];
  for (int64_t first = begin; first < end; first += strip) {
    const int64_t n = smaller(strip, end - first);
    int64_t i = 0;
    if constexpr (SIDE_BY_SIDE<T>)
      for (; i + ROWS <= n; i += ROWS) sum_rows_backward<T>(a, first + i, w, dweight, shrink + i);
    for (; i < n; i++) shrink[i] = sum_backward<T>(a, first + i, w, dweight);
    for (i = 0; i < n; i++) scale_backward<T>(a, first + i, strip, w, shrink[i], put);
  }
}

template <class T>
void fill_zero(T* p, int64_t n) {
  for (int64_t i = 0; i < n; i++) p[i] = 0;
}

// dweight = the partial sums added in their order.
template <class A, class W>
void add_partials(const RmsNormBackward& a) {
  const A* partial = static_cast<const A*>(a.partial);
  W* dweight = static_cast<W*>(a.dweight);
  constexpr int64_t block = 256;  // columns
  parallel_for((a.C + block - 1) / block, GRAIN / (block * a.partials) + 1, [&](int64_t b) {
    const int64_t begin = b * block, width = a.C - begin < block ? a.C - begin : block;
    A total[block] = {};
    for (int64_t p = 0; p < a.partials; p++)
      for_columns<A>(0, width,
                     [&](int64_t c, auto n, int) { store(total + c, load(total + c, n) + load(partial + p * a.C + begin + c, n), n); });
    for (int64_t c = 0; c < width; c++) dweight[begin + c] = from_wide<W>(total[c]);
  });
}

template <class T, class Put>
void backward_with_dweight(const RmsNormBackward& a, const Wide<T>* w, Wide<T>* sums_of_few, Put put) {
  parallel_for(a.partials, 1, [&](int64_t p) {
    Wide<T>* partial = static_cast<Wide<T>*>(a.partial) + p * a.C;
    Wide<T>* few_rows = sums_of_few + p * a.C;
    fill_zero(partial, a.C);
    const int64_t end = a.N * (p + 1) / a.partials;
    for (int64_t first = a.N * p / a.partials; first < end; first += FEW) {
      fill_zero(few_rows, a.C);
      backward_rows<T>(a, first, smaller(end, first + FEW), w, few_rows, put);
      for_columns<T>(0, a.C, [&](int64_t c, auto n, int) { store(partial + c, load(partial + c, n) + load_in_turn(few_rows + c, n), n); });
    }
  });
}

template <class T>
Error backward(const RmsNormBackward& a) {
  using A = Wide<T>;
  const Buffer<A> w(a.C), sums_of_few(a.dweight ? a.partials * a.C : 1);
  if (w.data() == nullptr || sums_of_few.data() == nullptr) return OUT_OF_MEMORY;
  widen_weight<T>(a.weight, a.weight_dtype == a.dtype, a.weight_offset, a.C, w.data());
  expect_writes(a.dx, a.N * a.C * sizeof(T));
  with_stores(past_cache(a.dx, a.N, a.C * sizeof(T), a.C * sizeof(T)), [&](auto put) {
    if (a.dweight) return backward_with_dweight<T>(a, w.data(), sums_of_few.data(), put);
    const int64_t strip = strip_rows_backward<T>(a.C);
    parallel_for((a.N + strip - 1) / strip, GRAIN / (a.C * strip) + 1,
                 [&](int64_t i) { backward_rows<T>(a, i * strip, smaller(a.N, (i + 1) * strip), w.data(), nullptr, put); });
  });
  if (a.dweight == nullptr) return nullptr;
  if (a.weight_dtype == a.dtype)
    add_partials<A, T>(a);
  else
    add_partials<A, float>(a);
  return nullptr;
}

}  // namespace

Error rms_norm_forward(const RmsNormForward& args) {
  return by_dtype(args.dtype, [&](auto element) { return forward<decltype(element)>(args); });
}

Error rms_norm_backward(const RmsNormBackward& args) {
  return by_dtype(args.dtype, [&](auto element) { return backward<decltype(element)>(args); });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
