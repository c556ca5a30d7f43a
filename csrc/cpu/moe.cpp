#include "moe.h"

#include "isa.h"
namespace fastprimer {
inline namespace FASTPRIMER_ISA {
Error moe_forward(const MoeForward&) { return "not written"; }
Error moe_backward(const MoeBackward&) { return "not written"; }
}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
