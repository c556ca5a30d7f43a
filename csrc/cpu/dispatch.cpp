// From an operation on the CPU to its kernel for this processor. Every kernel of csrc/cpu/ is listed here once; it is
// compiled for each instruction set into the namespace of that name (CMakeLists.txt).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "attention.h"
#include "brgemm.h"
#include "cross_entropy.h"
#include "decoding.h"
#include "isa.h"
#include "memory.h"
#include "moe.h"
#include "parallel.h"
#include "rms_norm.h"
#include "rope.h"
#include "routing.h"
#include "swiglu.h"

#define FASTPRIMER_CPU_KERNELS(KERNEL)                            \
  KERNEL(rms_norm_forward, RmsNormForward)                        \
  KERNEL(rms_norm_backward, RmsNormBackward)                      \
  KERNEL(rope, Rope)                                              \
  KERNEL(swiglu_forward, SwiGluForward)                           \
  KERNEL(swiglu_backward, SwiGluBackward)                         \
  KERNEL(attention_forward, AttentionForward)                     \
  KERNEL(attention_backward, AttentionBackward)                   \
  KERNEL(decoding, Decoding)                                      \
  KERNEL(route_forward, RouteForward)                             \
  KERNEL(route_backward, RouteBackward)                           \
  KERNEL(moe_forward, MoeForward)                                 \
  KERNEL(moe_backward, MoeBackward)                               \
  KERNEL(cross_entropy_forward, CrossEntropyForward)              \
  KERNEL(cross_entropy_backward, CrossEntropyBackward)            \
  KERNEL(linear_cross_entropy_forward, LinearCrossEntropyForward) \
  KERNEL(linear_cross_entropy_backward, LinearCrossEntropyBackward)

namespace fastprimer {

#define DECLARE(name, Arguments) Error name(const Arguments& args);
namespace portable {
FASTPRIMER_CPU_KERNELS(DECLARE)
}
namespace avx2 {
FASTPRIMER_CPU_KERNELS(DECLARE)
}
namespace avx512 {
FASTPRIMER_CPU_KERNELS(DECLARE)
}

namespace {
Isa isa = best_isa();
}

#if defined(__x86_64__)
#define DISPATCH(name, Arguments)                                                                      \
  Error name(Cpu, const Arguments& args) {                                                             \
    return isa == AVX512 ? avx512::name(args) : isa == AVX2 ? avx2::name(args) : portable::name(args); \
  }
#else
#define DISPATCH(name, Arguments) \
  Error name(Cpu, const Arguments& args) { return portable::name(args); }
#endif
FASTPRIMER_CPU_KERNELS(DISPATCH)

// At least 32K numbers and, from 32 rows on, eight rows to each partial sum, at most 64 of them (of fewer rows four): a matter of the
// shape alone.
int64_t rms_norm_partials(Cpu, int64_t N, int64_t C) {
  const int64_t by_size = N * C / (1 << 15), by_rows = N < 4 ? N : N < 32 ? 4 : N / 8;
  const int64_t partials = by_size < by_rows ? by_size : by_rows;
  return partials < 1 ? 1 : partials > 64 ? 64 : partials;
}

// On the CPU the kernels allocate their scratch memory themselves, thread by thread.
int64_t moe_forward_scratch(Cpu, const MoeProblem&) { return 0; }
int64_t moe_backward_scratch(Cpu, const MoeProblem&) { return 0; }

void parallel_ranges(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, n, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

namespace {

// Tests try every instruction set on one processor: sets an upper limit, returns the one in use.
int64_t limit_cpu_instruction_set(int64_t limit) {
  const Isa best = best_isa();
  isa = limit < best ? Isa(limit < 0 ? 0 : limit) : best;
  return isa;
}

}  // namespace
}  // namespace fastprimer

STABLE_TORCH_LIBRARY_IMPL(fastprimer, CompositeExplicitAutograd, m) {
  m.impl("limit_cpu_instruction_set", TORCH_BOX(&fastprimer::limit_cpu_instruction_set));
  m.impl("allow_brgemm", TORCH_BOX(&fastprimer::allow_brgemm));
  m.impl("force_bfloat16_tiles", TORCH_BOX(&fastprimer::force_bfloat16_tiles));
  m.impl("poison_scratch", TORCH_BOX(&fastprimer::poison_scratch));
}
