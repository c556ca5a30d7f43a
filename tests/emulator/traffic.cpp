// What the emulated kernels have done since this was last asked: how many bytes they have loaded and stored, and how many products warps
// have made by wgmma, which only kernels for Hopper do.
#include "traffic.h"

#include <torch/csrc/stable/library.h>

#include "wgmma.h"

namespace {

int64_t take_traffic() { return emulator::traffic.exchange(0); }
int64_t take_products() { return static_cast<int64_t>(emulator::products.exchange(0)); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastprimer_emulated, CompositeExplicitAutograd, m) {
  m.impl("take_traffic", TORCH_BOX(&take_traffic));
  m.impl("take_products", TORCH_BOX(&take_products));
}
