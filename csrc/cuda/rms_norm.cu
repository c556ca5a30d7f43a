// RMSNorm on CUDA: which kernel serves a call, and in what shape.
#include <algorithm>

#include "rms_norm_backward.cuh"

namespace fastprimer {
namespace {

constexpr int BLOCKS_PER_MULTIPROCESSOR_FORWARD = 64;  // a bound on the grid, far above what runs at once
constexpr int BLOCKS_PER_MULTIPROCESSOR_BACKWARD = 2;  // of about 512 threads: with up to 64 registers, all run at once

// How a row lies in a block (see rms_norm.cuh). K = 0: the row is too wide for registers.
struct Layout {
  int K;
  dim3 block;
};

// One warp a row as long as 4 vectors a thread suffice, else as few vectors a thread as 512 threads allow, up to max_K.
Layout layout_of(int64_t vectors, int max_K) {
  int K = 1;
  const int threads_wanted = vectors <= 4 * 32 ? 32 : RMS_NORM_THREADS;
  while (K * threads_wanted < vectors) K *= 2;
  if (K > max_K) return {0, dim3(RMS_NORM_THREADS)};
  int threads = 1;
  const int64_t needed = (vectors + K - 1) / K;
  while (threads < 32 && threads < needed) threads *= 2;
  if (needed > 32) threads = static_cast<int>((needed + 31) / 32 * 32);
  return {K, dim3(threads, RMS_NORM_THREADS / threads)};
}

int64_t blocks_for(int64_t N, const Layout& layout, int blocks_per_multiprocessor) {
  return std::min<int64_t>((N + layout.block.y - 1) / layout.block.y, blocks_per_multiprocessor * multiprocessors());
}

// Elements in 16 bytes.
template <class T>
constexpr int WIDE = 16 / sizeof(T);

template <class T>
bool vectorizable(const RmsNormForward& args) {
  return args.C % WIDE<T> == 0 && aligned<T, WIDE<T>>(args.x, args.stride_x_row) &&
         aligned<T, WIDE<T>>(args.residual, args.stride_residual_row) && aligned<T, WIDE<T>>(args.weight, 0) &&
         aligned<T, WIDE<T>>(args.y, 0) && aligned<T, WIDE<T>>(args.residual == nullptr ? nullptr : args.h, 0);
}

template <class T>
bool vectorizable(const RmsNormBackward& args) {
  return args.C % WIDE<T> == 0 && aligned<T, WIDE<T>>(args.dy, args.stride_dy_row) && aligned<T, WIDE<T>>(args.dh, args.stride_dh_row) &&
         aligned<T, WIDE<T>>(args.h, args.stride_h_row) && aligned<T, WIDE<T>>(args.weight, 0) && aligned<T, WIDE<T>>(args.dx, 0) &&
         aligned<T, WIDE<T>>(args.partial, 0);
}

template <class Args>
RmsNormWeight weight_of(const Args& args) {
  return {args.weight, args.weight_dtype == Dtype::float32, static_cast<float>(args.weight_offset)};
}

template <class T, int V>
Error forward(Cuda device, const RmsNormForward& args) {
  const Layout layout = layout_of(args.C / V, 8);
  const auto kernel = layout.K == 1   ? rms_norm_forward_rows<T, V, 1>
                      : layout.K == 2 ? rms_norm_forward_rows<T, V, 2>
                      : layout.K == 4 ? rms_norm_forward_rows<T, V, 4>
                      : layout.K == 8 ? rms_norm_forward_rows<T, V, 8>
                                      : rms_norm_forward_wide<T, V>;
  const dim3 grid(blocks_for(args.N, layout, BLOCKS_PER_MULTIPROCESSOR_FORWARD));
  return launch(kernel, grid, layout.block, 0, device, args, weight_of(args), static_cast<float>(args.eps));
}

template <class T, int V>
Error backward(Cuda device, const RmsNormBackward& args) {
  const Layout layout = layout_of(args.C / V, 4);
  const auto kernel = layout.K == 1   ? rms_norm_backward_rows<T, V, 1>
                      : layout.K == 2 ? rms_norm_backward_rows<T, V, 2>
                      : layout.K == 4 ? rms_norm_backward_rows<T, V, 4>
                                      : rms_norm_backward_wide<T, V>;
  const dim3 grid(args.dweight == nullptr ? rms_norm_partials(device, args.N, args.C) : args.partials);
  const int rows = layout.block.y;
  const size_t shared_bytes = rows == 1 ? 0 : sizeof(float) * layout.block.x * rows * V;
  return launch(kernel, grid, layout.block, shared_bytes, device, args, weight_of(args));
}

template <class W>
Error sum_partials(Cuda device, const RmsNormBackward& args) {
  const dim3 grid((args.C + 31) / 32), block(32, std::min<int64_t>(args.partials, RMS_NORM_LINES));
  return launch(rms_norm_dweight<W>, grid, block, 0, device, static_cast<const float*>(args.partial), args.partials, args.C,
                static_cast<W*>(args.dweight));
}

Error unsupported(int64_t C, Dtype dtype, Dtype weight_dtype) {
  if (C > 1 << 30) return "rows of more than 2^30 columns are not supported";
  if (weight_dtype != dtype && weight_dtype != Dtype::float32) return "weight must have x's dtype or be float32";
  return nullptr;
}

}  // namespace

// Grid and workspace of the persistent backward pass. More blocks would make the second pass longer, fewer would leave
// multiprocessors without enough loads in flight.
int64_t rms_norm_partials(Cuda, int64_t N, int64_t) { return std::min<int64_t>(N, BLOCKS_PER_MULTIPROCESSOR_BACKWARD * multiprocessors()); }

Error rms_norm_forward(Cuda device, const RmsNormForward& args) {
  if (Error error = unsupported(args.C, args.dtype, args.weight_dtype)) return error;
  return by_dtype(args.dtype, [&](auto element) -> Error {
    using T = decltype(element);
    return vectorizable<T>(args) ? forward<T, WIDE<T>>(device, args) : forward<T, 1>(device, args);
  });
}

Error rms_norm_backward(Cuda device, const RmsNormBackward& args) {
  if (Error error = unsupported(args.C, args.dtype, args.weight_dtype)) return error;
  return by_dtype(args.dtype, [&](auto element) -> Error {
    using T = decltype(element);
    const Error error = vectorizable<T>(args) ? backward<T, WIDE<T>>(device, args) : backward<T, 1>(device, args);
    if (error != nullptr || args.dweight == nullptr) return error;
    return args.weight_dtype == args.dtype ? sum_partials<T>(device, args) : sum_partials<float>(device, args);
  });
}

}  // namespace fastprimer
