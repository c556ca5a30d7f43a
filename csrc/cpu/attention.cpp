// Attention on the CPU. The mathematics: fastprimer/ops/attention.py; the arguments: csrc/attention.h.
#include "attention_backward.h"
#include "attention_forward.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

Error attention_forward(const AttentionForward& args) {
  return by_tile(args.problem.dtype, [&](auto element, auto tile) { return forward_pass::run<decltype(element), decltype(tile)>(args); });
}

Error attention_backward(const AttentionBackward& args) {
  return by_tile(args.problem.dtype, [&](auto element, auto tile) { return backward_pass::run<decltype(element), decltype(tile)>(args); });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
