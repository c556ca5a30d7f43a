// SwiGLU on CUDA: which kernel serves a call, and in what shape.
#include <algorithm>

#include "swiglu.cuh"

namespace fastprimer {
namespace {

constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 64;  // about as many, of wide rows, far above what runs at once

struct Shape {
  dim3 grid, block;
};

// Short rows share a block. A long one is cut into blocks of equal size, smaller ones where there would not be one for every
// multiprocessor.
Shape shape_of(int64_t N, int64_t vectors, int K) {
  const int64_t needed = std::max<int64_t>((vectors + K - 1) / K, 1);
  int64_t threads = 1, most = SWIGLU_THREADS, blocks = 1;
  while (most > 32 && needed * N < most * multiprocessors()) most /= 2;
  if (needed <= 32) {
    while (threads < needed) threads *= 2;
  } else {
    blocks = (needed + most - 1) / most;
    threads = ((needed + blocks - 1) / blocks + 31) / 32 * 32;
    blocks = (needed + threads - 1) / threads;
  }
  const int64_t rows = std::max<int64_t>(most / threads, 1), groups = (N + rows - 1) / rows;
  const int64_t most_groups = std::max<int64_t>(BLOCKS_PER_MULTIPROCESSOR * multiprocessors() / blocks, 1);
  return {dim3(blocks, std::min<int64_t>({groups, most_groups, 65535})), dim3(threads, rows)};
}

// Whether each of N rows begins where 16-byte accesses are allowed. The stride of a single row is of no interest.
template <class T, int V>
bool rows_aligned(int64_t N, const void* p, int64_t stride_row) {
  return aligned<T, V>(p, N > 1 ? stride_row : 0);
}

template <class T, int V>
bool vectorizable(const SwiGluForward& a) {
  return rows_aligned<T, V>(a.N, a.gate, a.stride_gate_row) && rows_aligned<T, V>(a.N, a.up, a.stride_up_row) &&
         rows_aligned<T, V>(a.N, a.y, a.F);
}

template <class T, int V>
bool vectorizable(const SwiGluBackward& a) {
  return rows_aligned<T, V>(a.N, a.dy, a.stride_dy_row) && rows_aligned<T, V>(a.N, a.gate, a.stride_gate_row) &&
         rows_aligned<T, V>(a.N, a.up, a.stride_up_row) && rows_aligned<T, V>(a.N, a.dgate, a.stride_dgate_row) &&
         rows_aligned<T, V>(a.N, a.dup, a.stride_dup_row);
}

GatedActivation constants(const Activation& activation) {
  return {static_cast<float>(activation.alpha), static_cast<float>(activation.beta), static_cast<float>(activation.limit),
          static_cast<float>(activation.offset)};
}

template <int V, class Args>
Error launch_rows(void (*kernel)(Args, GatedActivation), Cuda device, const Args& args) {
  const Shape shape = shape_of(args.N, args.F / V, SWIGLU_VECTORS<V>);
  return launch(kernel, shape.grid, shape.block, 0, device, args, constants(args.activation));
}

}  // namespace

Error swiglu_forward(Cuda device, const SwiGluForward& args) {
  return by_dtype(args.dtype, [&](auto element) -> Error {
    using T = decltype(element);
    constexpr int V = 16 / sizeof(T);
    return vectorizable<T, V>(args) ? launch_rows<V, SwiGluForward>(swiglu_forward_rows<T, V>, device, args)
                                    : launch_rows<1, SwiGluForward>(swiglu_forward_rows<T, 1>, device, args);
  });
}

Error swiglu_backward(Cuda device, const SwiGluBackward& args) {
  return by_dtype(args.dtype, [&](auto element) -> Error {
    using T = decltype(element);
    constexpr int V = 16 / sizeof(T);
    return vectorizable<T, V>(args) ? launch_rows<V, SwiGluBackward>(swiglu_backward_rows<T, V>, device, args)
                                    : launch_rows<1, SwiGluBackward>(swiglu_backward_rows<T, 1>, device, args);
  });
}

}  // namespace fastprimer
