// Mixture of experts on the CPU. The mathematics: fastprimer/ops/moe.py; the arguments: csrc/moe.h.
#include "moe_backward.h"
#include "moe_few_backward.h"
#include "moe_forward.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
Error moe_forward(const MoeForward& args) {
  const moe_pass::Plan plan(args.problem, moe_pass::STEP);
  if (!plan.ready()) return OUT_OF_MEMORY;
  if (moe_pass::few_tokens(plan))
    return by_tile(args.problem.dtype, [&](auto element, auto) { return moe_pass::forward_of_few<decltype(element)>(args, plan); });
  return by_tile_or_force(args.problem.dtype,
                          [&](auto element, auto tile) { return moe_pass::forward<decltype(element), decltype(tile)>(args, plan); });
}

Error moe_backward(const MoeBackward& args) {
  return by_tile_or_force(args.problem.dtype, [&](auto element, auto tile) -> Error {
    const moe_pass::Plan plan(args.problem, moe_pass::TOKEN_STEP<decltype(tile)>);
    if (!plan.ready()) return OUT_OF_MEMORY;
    if (moe_pass::few_tokens(plan)) return moe_pass::backward_of_few<decltype(element)>(args, plan);
    return moe_pass::backward<decltype(element), decltype(tile)>(args, plan);
  });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
