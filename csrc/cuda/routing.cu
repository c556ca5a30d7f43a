// Routing on CUDA: which kernel serves a call, and in what shape.
#include <algorithm>

#include "routing.cuh"

namespace fastprimer {
namespace {

constexpr size_t SHARED = 96 << 10;  // of a block at most

// As many tokens a block as its shared memory has room for; `row` numbers of 32 bits each.
template <int LANES, class Args>
Error launch_tokens(void (*kernel)(Args), Cuda device, const Args& args, int64_t row) {
  constexpr int64_t IN_WARP = 32 / LANES;
  const int64_t warps = std::min<int64_t>(ROUTING_THREADS / 32, SHARED / (row * 4 * IN_WARP)), tokens = warps * IN_WARP;
  const int64_t blocks = (args.N + tokens - 1) / tokens;
  if (blocks > 0x7FFFFFFF) return "too many tokens for one launch";
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * warps)), row * 4 * tokens, device, args);
}

}  // namespace

Error route_forward(Cuda device, const RouteForward& args) {
  if (args.E > ROUTING_MOST_EXPERTS) return "more than 4096 experts are not supported";
  return by_dtype(args.dtype, [&](auto element) -> Error {
    using T = decltype(element);
    const int64_t row = args.E + std::max(args.K, args.groups);
    if (args.E <= ROUTING_FEW_EXPERTS) return launch_tokens<8>(route_forward_tokens<T, 8>, device, args, row);
    return launch_tokens<32>(route_forward_tokens<T, 32>, device, args, row);
  });
}

Error route_backward(Cuda device, const RouteBackward& args) {
  if (args.E > ROUTING_MOST_EXPERTS) return "more than 4096 experts are not supported";
  return by_dtype(args.dtype, [&](auto element) -> Error {
    using T = decltype(element);
    if (args.E <= ROUTING_FEW_EXPERTS) return launch_tokens<8>(route_backward_tokens<T, 8>, device, args, args.E);
    return launch_tokens<32>(route_backward_tokens<T, 32>, device, args, args.E);
  });
}

}  // namespace fastprimer
