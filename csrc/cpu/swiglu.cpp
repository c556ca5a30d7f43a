#include "swiglu.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

Error swiglu_forward(const SwiGluForward&) { return "not written yet"; }
Error swiglu_backward(const SwiGluBackward&) { return "not written yet"; }

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
