// Cross-entropy on CUDA: which kernel serves a call, and in what shape.
#include <algorithm>
#include <type_traits>

#include "cross_entropy.cuh"
#include "cross_entropy_pieces.cuh"

namespace fastprimer {
namespace {

constexpr int64_t SHORT = 2048;  // numbers of a row, which a warp goes along

// A warp a token, or a block.
template <class... Parameters, class... Arguments>
Error launch_tokens(void (*kernel)(Parameters...), Cuda device, int64_t N, int64_t numbers, const Arguments&... arguments) {
  const int64_t tokens = numbers <= SHORT ? LOSS_THREADS / 2 / 32 : 1;
  const int64_t blocks = (N + tokens - 1) / tokens;
  if (blocks > 0x7FFFFFFF) return "too many tokens for one launch";
  const unsigned threads = tokens > 1 ? 32 : LOSS_THREADS;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads, static_cast<unsigned>(tokens)), 0, device, arguments...);
}

LossCap cap_of(const LossOptions& options, const float* bias) {
  const double c = options.softcap;
  return {static_cast<float>(c), static_cast<float>(c > 0 ? 1 / c : 0), bias, false};
}

LossArgs args_of(const CrossEntropyProblem& p) {
  return {p.logits, p.stride_logits_row, 0, p.V, nullptr, 0, p.target, p.N, p.V, p.options.ignore_index, cap_of(p.options, nullptr)};
}

LossArgs args_of(const LinearCrossEntropyProblem& p, const LogitsPiece& piece) {
  const float* bias = p.bias == nullptr ? nullptr : p.bias + piece.first;
  return {piece.logits,           piece.stride_row,       piece.first, piece.width, nullptr, 0, p.target, p.N, p.V,
          p.options.ignore_index, cap_of(p.options, bias)};
}

// The same piece as it is kept in 16 bits.
LossArgs args_of(const LinearCrossEntropyProblem& p, const LogitsPiece& piece, const Kept16& kept) {
  LossArgs args = args_of(p, piece);
  args.logits = kept.z + piece.first;
  args.stride_row = p.columns;
  args.blocks = kept_blocks(p.columns);
  args.shift = kept.shift;
  return args;
}

DlogitsArgs args_of(const LossArgs& in, const LossOptions& options, const LossGradients& gradients, const DlogitsPiece& out) {
  return {in, gradients, static_cast<float>(options.label_smoothing), static_cast<float>(options.z_loss), out};
}

}  // namespace

Error cross_entropy_forward(Cuda device, const CrossEntropyForward& args) {
  const CrossEntropyProblem& p = args.problem;
  const FoldArgs fold = {args_of(p), nullptr, nullptr, args.outputs, p.options.label_smoothing, p.options.z_loss};
  return by_dtype(p.dtype, [&](auto element) { return launch_tokens(cross_entropy_fold<decltype(element)>, device, p.N, p.V, fold); });
}

Error cross_entropy_backward(Cuda device, const CrossEntropyBackward& args) {
  const CrossEntropyProblem& p = args.problem;
  const DlogitsArgs dlogits = args_of(args_of(p), p.options, args.gradients, {args.dlogits, p.V, nullptr, nullptr});
  return by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_tokens(cross_entropy_dlogits<T, T>, device, p.N, p.V, dlogits);
  });
}

Error linear_cross_entropy_fold(Cuda device, const LinearCrossEntropyProblem& p, const LogitsPiece& piece, LossState* state,
                                const LossOutputs& outputs) {
  const FoldArgs fold = {args_of(p, piece), piece.kept ? piece.logits : nullptr, state,
                         outputs,           p.options.label_smoothing,           p.options.z_loss};
  return launch_tokens(cross_entropy_fold<float>, device, p.N, piece.width, fold);
}

Error linear_cross_entropy_keep(Cuda device, const LinearCrossEntropyProblem& p, const LogitsPiece& piece, const LossState* state,
                                const Kept16& kept) {
  const LossArgs from = args_of(p, piece), to = args_of(p, piece, kept);
  return launch_tokens(cross_entropy_keep, device, p.N, piece.width, from, state, kept, to.stride_row, to.blocks);
}

// From z or logits of In.
template <class In>
static Error launch_dlogits(Cuda device, Dtype dtype, const DlogitsArgs& args) {
  const Error error = by_dtype(dtype, [&](auto element) -> Error {
    using T = decltype(element);
    if constexpr (sizeof(T) > 2 && std::is_same_v<In, int16_t>)
      return "z of float32 is not kept in 16 bits";
    else
      return launch_tokens(cross_entropy_dlogits<In, T>, device, args.in.N, args.in.width, args);
  });
  if (error != nullptr || args.out.dbias == nullptr) return error;
  const dim3 grid(static_cast<unsigned>((args.in.width + 31) / 32)), block(32, DBIAS_LINES);
  return launch(cross_entropy_dbias<In>, grid, block, 0, device, args);
}

Error linear_cross_entropy_dlogits(Cuda device, const LinearCrossEntropyProblem& p, const LogitsPiece& piece, const Kept16& kept,
                                   const LossGradients& gradients, const DlogitsPiece& out) {
  const bool in_16_bits = piece.kept && p.in_16_bits;
  DlogitsArgs args = args_of(in_16_bits ? args_of(p, piece, kept) : args_of(p, piece), p.options, gradients, out);
  args.in.cap.done = piece.kept;
  return in_16_bits ? launch_dlogits<int16_t>(device, p.dtype, args) : launch_dlogits<float>(device, p.dtype, args);
}

Error linear_cross_entropy_scale(Cuda device, const LinearCrossEntropyProblem& p, const LossGradients& gradients, float* scale) {
  const LogitsPiece all = {nullptr, 0, 0, p.V, false};
  return launch(cross_entropy_scale, dim3(1), dim3(LOSS_THREADS), 0, device,
                args_of(args_of(p, all), p.options, gradients, {nullptr, 0, nullptr, nullptr}), scale);
}

Error linear_cross_entropy_tokens(Cuda device, const LinearCrossEntropyProblem& p, void* x) {
  return by_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_tokens(cross_entropy_tokens<T>, device, p.N, p.C, static_cast<const T*>(p.x), p.stride_x_row, p.target,
                         p.options.ignore_index, p.N, p.C, static_cast<T*>(x));
  });
}

Error linear_cross_entropy_add(Cuda device, Dtype dtype, float* sum, const float* part, int64_t count, const float* scale, void* out) {
  const int64_t needed = (count + 4 * LOSS_THREADS - 1) / (4 * LOSS_THREADS);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(needed, 16 * multiprocessors())));
  const float* before = sum;
  const auto add = [&](const float* factor, auto* to) {
    return launch(cross_entropy_add<std::remove_pointer_t<decltype(to)>>, grid, dim3(LOSS_THREADS), 0, device, before, part, count, factor,
                  to);
  };
  if (out == nullptr) return add(nullptr, sum);
  return by_dtype(dtype, [&](auto element) { return add(scale, static_cast<decltype(element)*>(out)); });
}

}  // namespace fastprimer
