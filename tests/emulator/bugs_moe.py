"""Bugs to plant in the CUDA kernels of routing and of the mixture of experts, and what catches each."""

from __future__ import annotations

from .bugs import TILE, Bug
from .build import Patch

ROUTING, GEMM, DISPATCH = "csrc/cuda/routing.cuh", "csrc/cuda/grouped_gemm.cuh", "csrc/cuda/moe_dispatch.cuh"
FORWARD, BACKWARD, LAUNCH = "csrc/cuda/moe_forward.cuh", "csrc/cuda/moe_backward.cuh", "csrc/cuda/moe.cu"
RACE = {"plain": "FAILED", "thread": "data race"}


def routing(name: str, before: str, after: str, caught: str | dict[str, str]) -> Bug:
    return Bug(name, "routing", Patch(ROUTING, before, after), {"plain": caught} if isinstance(caught, str) else caught)


def moe(name: str, file: str, before: str, after: str, caught: str | dict[str, str]) -> Bug:
    return Bug(name, "moe", Patch(file, before, after), {"plain": caught} if isinstance(caught, str) else caught)


BUGS = [
    routing("of equal choices the later", "candidate > best ? candidate", "candidate >> 32 >= best >> 32 ? candidate", "experts is wrong"),
    routing("a NaN is chosen last", "if (v != v) return 0xFFFFFFFFu;", "if (v != v) return 1;", "experts is wrong"),
    routing("a group is worth its largest choice alone", "first + second : first", "first : first", "is wrong"),
    routing("all groups are kept", "group_keys[e / size] == 0 ?", "group_keys[e / size] < ~0u ?", "experts is wrong"),
    routing("weights without their scale", "[token.n * K + k] = scale * r", "[token.n * K + k] = 0 * scale + r", "weights is wrong"),
    routing("the sigmoid's slope", "dl * rest", "dl", "dlogits is wrong"),
    routing("the softmax's sum", "(row[e] - dot)", "row[e]", "dlogits is wrong"),
    routing(
        "a number that is no expert's is read", "experts[k] >= 0 && experts[k] < E", "experts[k] >= 0", {"address": "AddressSanitizer"}
    ),
    routing(
        "missing barrier of a warp",
        "  __syncwarp();\n  for (int k = lane; k < K; k += LANES) {\n    if (!valid(k)) continue;\n    const",
        "  for (int k = lane; k < K; k += LANES) {\n    if (!valid(k)) continue;\n    const",
        {"plain": "dlogits is wrong", "thread": "data race"},
    ),
    moe("missing barrier", GEMM, "    __syncthreads();  // the stage has arrived", "    // the stage has arrived", RACE),
    moe("data of cp.async used early", GEMM, "copy_async_wait<Shape::STAGES - 2>", "copy_async_wait<Shape::STAGES - 1>", "is wrong"),
    moe(
        "a stage is overwritten while it is read",
        GEMM,
        "stage == 0 ? Shape::STAGES - 1 : stage - 1",
        "stage == 0 ? Shape::STAGES - 1 : stage",
        "is wrong",
    ),
    moe(
        "a tile is written over a stage that is read",
        GEMM,
        "  __syncthreads();  // nobody reads a stage any more",
        "  // nobody reads a stage any more",
        RACE,
    ),
    moe("wrong part of a matrix", GEMM, "k + lane / 16 * 8 + lane % 8", "k + lane / 8 % 2 * 8 + lane % 8", "is wrong"),
    moe("unswizzled shared memory", TILE, "(chunk ^ (row % 8))", "chunk", "bank conflicts"),
    moe("what lies behind the depth is multiplied", GEMM, "inside = k < depth && count > 0", "inside = count > 0", "is wrong"),
    moe(
        "lanes count before others have looked",
        DISPATCH,
        "__popc(before));\n    __syncwarp();",
        "__popc(before));",
        {"thread": "data race"},
    ),
    moe("the pairs of chunks share places", DISPATCH, "= sum + scan.before", "= sum", "hidden is wrong"),
    moe(
        "an expert's pairs begin among another's",
        DISPATCH,
        "= at.begins[e] + at.counts",
        "= at.begins[max(e, 1) - 1] + at.counts",
        "FAILED",
    ),
    moe("the last rows of an expert have no tile", DISPATCH, "(count + (1 << at.row_bits) - 1) >>", "count >>", "hidden is wrong"),
    moe("a number that is no expert's counts", DISPATCH, "e >= 0 && e < at.E", "e >= 0 && e <= at.E", {"address": "AddressSanitizer"}),
    moe(
        "hidden of no expert is not cleared",
        DISPATCH,
        "other < 32 && hidden != nullptr",
        "other < 0 && hidden != nullptr",
        "hidden is wrong",
    ),
    moe("rows of another expert are written", FORWARD, "place >= tile.end || count <= 0", "count <= 0", {"plain": "FAILED"}),
    moe("wrong row gathered", FORWARD, "at.token_at[begin + i]", "at.token_at[begin]", "hidden is wrong"),
    moe(
        "gates and ups swapped",
        FORWARD,
        "product.load_chunk(up, row, first + IN_TURN)",
        "product.load_chunk(up, row, first)",
        "hidden is wrong",
    ),
    moe("y without weights", FORWARD, "z[v] *= w;", "z[v] *= 0 * w + 1;", "y is wrong"),
    moe("a pair is left out of its token's sum", FORWARD, "for (int k = 0; k < at.K; k++)", "for (int k = 1; k < at.K; k++)", "y is wrong"),
    moe("a pair without an expert counts", FORWARD, "place < 0 ? 0 : row[v]", "row[v]", "y is wrong"),
    moe("a part of dweights is left out", BACKWARD, "tile < tiles && place >= 0", "tile + 1 < tiles && place >= 0", "dweights is wrong"),
    moe("ddown without weights", BACKWARD, "wu[v] = w * u;", "wu[v] = u;", "ddown is wrong"),
    moe("dhidden without weights", BACKWARD, "(w * d[v], gate", "(d[v], gate", "is wrong"),
    moe(
        "an empty expert's gradient is not written",
        BACKWARD,
        "count = at.begins[e + 1] - begin;",
        "count = at.begins[e + 1] - begin;\n  if (count == 0) return;",
        "dgate_up is wrong",
    ),
    moe(
        "16-byte accesses without a look at the stride",
        LAUNCH,
        "wide<T>(args.dy, args.stride_dy_row)",
        "wide<T>(args.dy, 0)",
        "is not aligned",
    ),
]
