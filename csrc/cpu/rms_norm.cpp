// RMSNorm on the CPU. The mathematics: fastprimer/ops/rms_norm.py; the arguments: csrc/rms_norm.h.
//
// Both passes are memory-bound: the floor is to read and write every row once (forward 2 C, backward 3 C numbers a row).
// A row is swept twice, first for its sum, then for its result, but stays in the L1 or L2 cache in between. The backward
// sweep adds the row's share of dweight on the way, into one of `partials` sums over consecutive rows; how many there are
// depends on the shape alone, and they are added up in their order, so the bits do not depend on the number of threads.
#include "rms_norm.h"

#include <cstdlib>

#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // numbers that are worth a thread of their own

int64_t grain_rows(int64_t C) { return C < GRAIN ? GRAIN / C : 1; }

// The weight as the kernels use it: weight + weight_offset in the accumulator type, or ones.
template <class T>
class WideWeight {
 public:
  WideWeight(const void* weight, Dtype dtype, double offset, int64_t C) : values_(static_cast<T*>(std::malloc(C * sizeof(T)))) {
    if (values_ == nullptr) return;
    if (weight == nullptr) {
      for (int64_t c = 0; c < C; c++) values_[c] = 1;
    } else if (dtype == Dtype::float64) {
      convert(static_cast<const double*>(weight), offset, C);
    } else if (dtype == Dtype::float32) {
      convert(static_cast<const float*>(weight), offset, C);
    } else if (dtype == Dtype::bfloat16) {
      convert(static_cast<const bfloat16*>(weight), offset, C);
    } else {
      convert(static_cast<const float16*>(weight), offset, C);
    }
  }
  ~WideWeight() { std::free(values_); }
  WideWeight(const WideWeight&) = delete;
  const T* data() const { return values_; }

 private:
  template <class W>
  void convert(const W* weight, double offset, int64_t C) {
    for (int64_t c = 0; c < C; c++) values_[c] = to_wide(weight[c]) + T(offset);
  }
  T* values_;
};

template <class T>
Error forward(const RmsNormForward& a) {
  using A = Wide<T>;
  const WideWeight<A> wide_weight(a.weight, a.weight_dtype, a.weight_offset, a.C);
  if (wide_weight.data() == nullptr) return "out of memory";
  expect_writes(a.y, a.N * a.C * sizeof(T));
  if (a.residual) expect_writes(a.h, a.N * a.C * sizeof(T));
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
    for_columns<A>(0, a.C, [&](int64_t c, auto n, int) { store(y + c, load(source + c, n) * rstd * load(w + c, n), n); });
  });
  return nullptr;
}

// One row of the backward pass. dweight is null, or this row's share is added to it.
template <class T>
inline void backward_row(const RmsNormBackward& a, int64_t row, const Wide<T>* w, Wide<T>* dweight) {
  using A = Wide<T>;
  const T* dy = static_cast<const T*>(a.dy) + row * a.stride_dy_row;
  const T* h = static_cast<const T*>(a.h) + row * a.stride_h_row;
  const T* dh = a.dh ? static_cast<const T*>(a.dh) + row * a.stride_dh_row : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.C;
  const A rstd = static_cast<const A*>(a.rstd)[row];
  const A products = sum_columns<A>(a.C, [&](int64_t c, auto n) {
    const Vec<A> dy_h = load(dy + c, n) * load(h + c, n);
    if (dweight) store(dweight + c, load(dweight + c, n) + dy_h * rstd, n);
    return dy_h * load(w + c, n);
  });
  const A shrink = products / A(a.C) * rstd * rstd;
  if (dh == nullptr) {
    for_columns<A>(0, a.C,
                   [&](int64_t c, auto n, int) { store(dx + c, rstd * (load(dy + c, n) * load(w + c, n) - load(h + c, n) * shrink), n); });
  } else {
    for_columns<A>(0, a.C, [&](int64_t c, auto n, int) {
      store(dx + c, rstd * (load(dy + c, n) * load(w + c, n) - load(h + c, n) * shrink) + load(dh + c, n), n);
    });
  }
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
  const WideWeight<A> w(a.weight, a.weight_dtype, a.weight_offset, a.C);
  if (w.data() == nullptr) return "out of memory";
  expect_writes(a.dx, a.N * a.C * sizeof(T));
  if (a.weight == nullptr) {
    parallel_for(a.N, grain_rows(a.C), [&](int64_t row) { backward_row<T>(a, row, w.data(), nullptr); });
    return nullptr;
  }
  parallel_for(a.partials, 1, [&](int64_t p) {
    A* partial = static_cast<A*>(a.partial) + p * a.C;
    for (int64_t c = 0; c < a.C; c++) partial[c] = 0;
    const int64_t end = a.N * (p + 1) / a.partials;
    for (int64_t row = a.N * p / a.partials; row < end; row++) backward_row<T>(a, row, w.data(), partial);
  });
  if (a.weight_dtype == a.dtype)
    add_partials<A, T>(a);
  else
    add_partials<A, float>(a);
  return nullptr;
}

}  // namespace

Error rms_norm_forward(const RmsNormForward& args) {
  switch (args.dtype) {
    case Dtype::float32:
      return forward<float>(args);
    case Dtype::bfloat16:
      return forward<bfloat16>(args);
    case Dtype::float16:
      return forward<float16>(args);
    case Dtype::float64:
      return forward<double>(args);
  }
  return "unknown dtype";
}

Error rms_norm_backward(const RmsNormBackward& args) {
  switch (args.dtype) {
    case Dtype::float32:
      return backward<float>(args);
    case Dtype::bfloat16:
      return backward<bfloat16>(args);
    case Dtype::float16:
      return backward<float16>(args);
    case Dtype::float64:
      return backward<double>(args);
  }
  return "unknown dtype";
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
