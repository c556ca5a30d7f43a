"""Bugs to plant in the CUDA kernels of cross-entropy, and what catches each."""

from __future__ import annotations

from .bugs import Bug
from .build import Patch

KERNELS, LAUNCH = "csrc/cuda/cross_entropy.cuh", "csrc/cuda/cross_entropy.cu"
PIECES = "csrc/cuda/cross_entropy_pieces.cuh"


def bug(name: str, before: str, after: str, caught: str | dict[str, str], file: str = KERNELS) -> Bug:
    return Bug(name, "cross_entropy", Patch(file, before, after), {"plain": caught} if isinstance(caught, str) else caught)


BUGS = [
    bug("a sum is not brought to its new maximum", "      sum *= exp_for<T>(top - most);\n", "", "lse is wrong"),
    bug("sums are added as they are", "sum *= top == most ? 1 : expf(top - most);", "(void)most;", "lse is wrong"),
    bug("of equal words the last", "z[i] == most || z[i] != z[i] ? i : at", "at == 0 ? W - 1 : at", "argmax is wrong"),
    bug("a NaN is overlooked", "most > top || (most != most && top == top)", "most > top", "a NaN hides"),
    bug(
        "a warp of a block is left out",
        "for (unsigned i = 1; i < blockDim.x / 32; i++)",
        "for (unsigned i = 2; i < blockDim.x / 32; i++)",
        "lse is wrong",
    ),
    bug(
        "missing barrier",
        "    __syncthreads();\n    if (threadIdx.x > 0) return;\n    for",
        "    if (threadIdx.x > 0) return;\n    for",
        {"plain": "is wrong", "thread": "data race"},
    ),
    bug("the second piece forgets the first", "if (in.first > 0) state = args.state[n];", "", "is wrong"),
    bug("argmax counted from its piece", "if (seen.argmax >= 0) seen.argmax += in.first;", "", "argmax is wrong"),
    bug("a kept piece stays logits", "store(z_row + column, z);", "(void)z_row;", "is wrong"),
    bug(
        "a kept piece's target is capped twice",
        "if (args.z == nullptr) in.cap.apply(z, target);",
        "in.cap.apply(z, target);",
        "loss is wrong",
    ),
    bug(
        "a target that is no word's is read",
        "if (target >= 0 && target < in.width) {",
        "if (target >= 0) {",
        {"address": "AddressSanitizer"},
    ),
    bug(
        "smoothing forgets the other words",
        "loss += args.label_smoothing * (top - all.total",
        "loss += 0 * (top - all.total",
        "loss is wrong",
    ),
    bug("z-loss without its slope", "(1 + 2 * args.z_loss * lse)", "(1 + args.z_loss * lse)", "dlogits is wrong"),
    bug("the gradient of lse dropped", "+ number(args.gradients.dlse))", "+ 0 * number(args.gradients.dlse))", "dlogits is wrong"),
    bug("the gradient by the rounded lse", "number(args.gradients.correction);", "1;", "of the sure token"),
    bug(
        "the loss by the rounded lse",
        "log_sum + (1 - args.label_smoothing) * (top - state.z_target)",
        "lse - (1 - args.label_smoothing) * state.z_target",
        "of the sure token",
    ),
    bug("softcap without its slope", "dz[i] *= cap.slope(z[i]);", "dz[i] *= 1;", "dlogits is wrong"),
    bug("an ignored token has a gradient", "if (!in.counts(n)) {  // its", "if (false) {  // its", "of an ignored token are wrong"),
    bug(
        "unaligned head left out",
        "for (int64_t i = thread; i < head; i += threads)",
        "for (int64_t i = thread + 1; i < head; i += threads)",
        "is wrong",
    ),
    bug("tail left out", "for (int64_t i = tail + thread; i < count;", "for (int64_t i = tail + thread; i < count - 1;", "is wrong"),
    bug(
        "16-byte access to an unaligned row",
        "if (head > count || address(in + head) % 16 != 0) head = count;",
        "if (head > count) head = count;",
        "aligned",
    ),
    bug("a line of dbias left out", "for (int i = 1; i < DBIAS_LINES; i++)", "for (int i = 2; i < DBIAS_LINES; i++)", "dbias is wrong"),
    bug(
        "lines of dbias meet too early",
        "  __syncthreads();\n  if (threadIdx.y > 0 || column",
        "  if (threadIdx.y > 0 || column",
        {"plain": "dbias is wrong", "thread": "data race"},
    ),
    bug(
        "an ignored token's x is multiplied", "counts ? v : decltype(v){}", "counts || true ? v : decltype(v){}", "tokens is wrong", PIECES
    ),
    bug("a part overwrites the sum", "v.data[k] += before.data[k];", "v.data[k] += 0 * before.data[k];", "is wrong", PIECES),
    bug("16 bits are rounded down", "rintf(fminf", "floorf(fminf", "kept is wrong", PIECES),
    bug(
        "16 bits by the pieces before",
        "if (args.state != nullptr) args",
        "if (in.first + in.width < in.V) args",
        "kept is wrong",
    ),
    bug(
        "a vector's second block",
        "/ KEPT_BLOCK == block ? here : behind",
        "/ KEPT_BLOCK == block ? here : here + 0 * behind",
        "dlogits is wrong",
    ),
    bug("a kept piece is capped again", "args.in.cap.done = piece.kept;", "args.in.cap.done = false;", "dlogits is wrong", LAUNCH),
    bug("the bias of the first words for all", "p.bias + piece.first;", "p.bias;", "is wrong", LAUNCH),
]
