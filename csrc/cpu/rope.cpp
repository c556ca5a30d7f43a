#include "rope.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {

Error rope(const Rope&) { return "not written yet"; }

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
