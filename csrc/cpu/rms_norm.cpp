// RMSNorm on the CPU. The mathematics: fastprimer/ops/rms_norm.py; the arguments: csrc/rms_norm.h.
//
// Both passes are memory-bound: the floor is to read and write every row once (forward 2 C, backward 3 C numbers a row).
// A row is swept twice, first for its sum, then for its result, but stays in the L1 or L2 cache in between. The backward
// sweep adds the row's share of dweight on the way: rows are summed by FEW, those sums join one of `partials` sums over
// consecutive rows, and these are added up in their order. How many there are depends on the shape alone, so the bits do
// not depend on the number of threads.
#include "rms_norm.h"

#include "memory.h"
#include "parallel.h"
#include "simd.h"
#include "tasks.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace {

constexpr int64_t FEW = 32;  // rows that are summed up before they join a longer sum: its rounding error stays small

int64_t grain_rows(int64_t C) { return C < GRAIN ? GRAIN / C : 1; }

template <class T, class W>
void convert(const void* weight, double offset, int64_t C, T* w) {
  for (int64_t c = 0; c < C; c++) w[c] = to_wide(static_cast<const W*>(weight)[c]) + T(offset);
}

// The weight as the kernels use it: weight + weight_offset in the accumulator type, or ones.
template <class T>
void widen_weight(const void* weight, Dtype dtype, double offset, int64_t C, T* w) {
  if (weight == nullptr) {
    for (int64_t c = 0; c < C; c++) w[c] = 1;
    return;
  }
  by_dtype(dtype, [&](auto element) -> Error {
    convert<T, decltype(element)>(weight, offset, C, w);
    return nullptr;
  });
}

template <class T>
Error forward(const RmsNormForward& a) {
  using A = Wide<T>;
  const Buffer<A> wide_weight(a.C);
  if (wide_weight.data() == nullptr) return OUT_OF_MEMORY;
  widen_weight(a.weight, a.weight_dtype, a.weight_offset, a.C, wide_weight.data());
  expect_writes(a.y, a.N * a.C * sizeof(T));
  if (a.residual) expect_writes(a.h, a.N * a.C * sizeof(T));
  const bool past = past_cache(a.y, a.N, a.C * sizeof(T), a.C * sizeof(T));
  parallel_for(a.N, grain_rows(a.C), [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x_row;
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + row * a.stride_residual_row : nullptr;
    T* h = a.residual ? static_cast<T*>(a.h) + row * a.C : nullptr;
    T* y = static_cast<T*>(a.y) + row * a.C;
    const A* w = wide_weight.data();
    A squares;
    if (residual == nullptr) {
      squares = sum_columns<A>(a.C, [&](int64_t c, auto n) {
        const Vec<A> v = load(x + c, n);
        return v * v;
      });
    } else {
      squares = sum_columns<A>(a.C, [&](int64_t c, auto n) {
        const Vec<A> v = rounded<T>(load(x + c, n) + load(residual + c, n));
        store(h + c, v, n);
        return v * v;
      });
    }
    const A rstd = A(1) / square_root(squares / A(a.C) + A(a.eps));
    static_cast<A*>(a.rstd)[row] = rstd;
    const T* source = residual ? h : x;
    with_stores(past, [&](auto put) {
      for_columns<A>(0, a.C, [&](int64_t c, auto n, int) { put(y + c, Flushable<T>{load(source + c, n) * rstd * load(w + c, n)}, n); });
    });
  });
  return nullptr;
}

// The second sweep over a row reads nothing but the caches: it asks for the next row, into the L2 cache, so that the memory does not
// rest. Short rows come by themselves, as the processor reads on. Behind the last row nothing is read.
constexpr int64_t LONG_ROW = 2048;  // bytes

// One row of the backward pass. dweight is null, or this row's share is added to it.
template <class T>
inline void backward_row(const RmsNormBackward& a, int64_t row, const Wide<T>* w, Wide<T>* dweight, bool past) {
  using A = Wide<T>;
  const T* dy = static_cast<const T*>(a.dy) + row * a.stride_dy_row;
  const T* h = static_cast<const T*>(a.h) + row * a.stride_h_row;
  const T* dh = a.dh ? static_cast<const T*>(a.dh) + row * a.stride_dh_row : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.C;
  const A rstd = static_cast<const A*>(a.rstd)[row];
  const A products = sum_columns<A>(a.C, [&](int64_t c, auto n) {
    const Vec<A> dy_h_hat = load(dy + c, n) * (load(h + c, n) * rstd);  // dy h may be too large for its type
    if (dweight) store(dweight + c, load(dweight + c, n) + dy_h_hat, n);
    return dy_h_hat * load(w + c, n);
  });
  const A shrink = products / A(a.C) * rstd;
  const bool long_rows = a.C * sizeof(T) >= LONG_ROW;
  with_stores(past, [&](auto put) {
    if (dh == nullptr) {
      for_columns<A>(0, a.C, [&](int64_t c, auto n, int) {
        if (long_rows) ask_for(dy + a.stride_dy_row + c), ask_for(h + a.stride_h_row + c);
        put(dx + c, Flushable<T>{rstd * (load(dy + c, n) * load(w + c, n) - load(h + c, n) * shrink)}, n);
      });
    } else {
      for_columns<A>(0, a.C, [&](int64_t c, auto n, int) {
        if (long_rows) ask_for(dy + a.stride_dy_row + c), ask_for(h + a.stride_h_row + c), ask_for(dh + a.stride_dh_row + c);
        put(dx + c, Flushable<T>{rstd * (load(dy + c, n) * load(w + c, n) - load(h + c, n) * shrink) + load(dh + c, n)}, n);
      });
    }
  });
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

template <class T>
Error backward(const RmsNormBackward& a) {
  using A = Wide<T>;
  const Buffer<A> w(a.C);
  if (w.data() == nullptr) return OUT_OF_MEMORY;
  widen_weight(a.weight, a.weight_dtype, a.weight_offset, a.C, w.data());
  expect_writes(a.dx, a.N * a.C * sizeof(T));
  const bool past = past_cache(a.dx, a.N, a.C * sizeof(T), a.C * sizeof(T));
  if (a.weight == nullptr) {
    parallel_for(a.N, grain_rows(a.C), [&](int64_t row) { backward_row<T>(a, row, w.data(), nullptr, past); });
    return nullptr;
  }
  const Buffer<A> sums_of_few(a.partials * a.C);
  if (sums_of_few.data() == nullptr) return OUT_OF_MEMORY;
  parallel_for(a.partials, 1, [&](int64_t p) {
    A* partial = static_cast<A*>(a.partial) + p * a.C;
    A* few_rows = sums_of_few.data() + p * a.C;
    fill_zero(partial, a.C);
    const int64_t end = a.N * (p + 1) / a.partials;
    for (int64_t first = a.N * p / a.partials; first < end; first += FEW) {
      fill_zero(few_rows, a.C);
      for (int64_t row = first; row < end && row < first + FEW; row++) backward_row<T>(a, row, w.data(), few_rows, past);
      for_columns<A>(0, a.C, [&](int64_t c, auto n, int) { store(partial + c, load(partial + c, n) + load(few_rows + c, n), n); });
    }
  });
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
