// Attention on the CPU. The mathematics: fastprimer/ops/attention.py; the arguments: csrc/attention.h.
//
// Tiles of float32 and bfloat16 numbers are multiplied as they are, where the processor can; all others as float32.
#include "attention_backward.h"
#include "attention_forward.h"

namespace fastprimer {
inline namespace FASTPRIMER_ISA {
namespace {

// run(T{}, Tile{}) with the element type and the type of the tiles.
template <class Run>
Error by_tile(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::float32:
      return run(float{}, float{});
    case Dtype::float16:
      return run(float16{}, float{});
    case Dtype::bfloat16:
#if defined(__AVX512BF16__)
      if (library_products().bfloat16) return run(bfloat16{}, bfloat16{});
#endif
      return run(bfloat16{}, float{});
    case Dtype::float64:
      return "float64 is not written";
  }
  return "unknown dtype";
}

}  // namespace

Error attention_forward(const AttentionForward& args) {
  return by_tile(args.problem.dtype, [&](auto element, auto tile) { return forward_pass::run<decltype(element), decltype(tile)>(args); });
}

Error attention_backward(const AttentionBackward& args) {
  return by_tile(args.problem.dtype, [&](auto element, auto tile) { return backward_pass::run<decltype(element), decltype(tile)>(args); });
}

}  // namespace FASTPRIMER_ISA
}  // namespace fastprimer
