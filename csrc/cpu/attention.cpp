// Attention on the CPU. The mathematics: fastprimer/ops/attention.py; the arguments: csrc/attention.h.
#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_short.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

Error attention_forward(const AttentionForward& args) {
  return by_tile(args.problem.dtype, [&](auto element, auto tile) {
    using T = decltype(element);
    using Tile = decltype(tile);
    return short_pass::fits<Tile>(args.problem) ? short_pass::forward<T>(args) : forward_pass::run<T, Tile>(args);
  });
}

Error attention_backward(const AttentionBackward& args) {
  return by_tile(args.problem.dtype, [&](auto element, auto tile) {
    using T = decltype(element);
    using Tile = decltype(tile);
    return short_pass::fits<Tile>(args.problem) ? short_pass::backward<T>(args) : backward_pass::run<T, Tile>(args);
  });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
