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
  const moe_pass::Plan routed(args.problem, moe_pass::STEP);
  if (!routed.ready()) return OUT_OF_MEMORY;
  if (moe_pass::few_tokens(routed))
    return by_tile(args.problem.dtype, [&](auto element, auto) { return moe_pass::backward_of_few<decltype(element)>(args, routed); });
  return by_tile_or_force(args.problem.dtype, [&](auto element, auto tile) {
    const moe_pass::Plan plan(args.problem, moe_pass::TOKEN_STEP<decltype(tile)>);
    return plan.ready() ? moe_pass::backward<decltype(element), decltype(tile)>(args, plan) : OUT_OF_MEMORY;
  });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
