"""Bugs to plant in the CUDA kernels, and what catches each."""

from __future__ import annotations

from dataclasses import dataclass

from .build import Patch

RMS_NORM, RMS_NORM_LAUNCH = "csrc/cuda/rms_norm.cuh", "csrc/cuda/rms_norm.cu"
RMS_NORM_BACKWARD, GEMM = "csrc/cuda/rms_norm_backward.cuh", "tests/emulator/gemm.cuh"
ROPE, ROPE_LAUNCH = "csrc/cuda/rope.cuh", "csrc/cuda/rope.cu"
SWIGLU, SWIGLU_LAUNCH = "csrc/cuda/swiglu.cuh", "csrc/cuda/swiglu.cu"
ATTENTION_OPTIONS, ATTENTION_TILE = "csrc/cuda/attention_options.h", "csrc/cuda/attention_tile.cuh"
ATTENTION_SOFTMAX, ATTENTION_QUERY_ROW = "csrc/cuda/attention_softmax.cuh", "csrc/cuda/attention_query_row.cuh"
ATTENTION_FORWARD, ATTENTION_BACKWARD = "csrc/cuda/attention_forward.cuh", "csrc/cuda/attention_backward.cuh"
DECODING, TILE = "csrc/cuda/decoding.cuh", "csrc/cuda/tile.cuh"


@dataclass(frozen=True)
class Bug:
    """A planted bug, and by {kind of build: words of its report} what catches it."""

    name: str
    check: str
    patch: Patch
    caught: dict[str, str]


BUGS = [
    Bug(
        "missing barrier",
        "rms_norm",
        Patch(RMS_NORM, "  __syncthreads();\n  float sum = 0;\n", "  float sum = 0;\n"),
        {"plain": "is wrong", "thread": "data race"},
    ),
    Bug(
        "off-by-one tail",
        "rms_norm",
        Patch(RMS_NORM, "if (j < vectors) h[k] = load<V>(row", "if (j <= vectors) h[k] = load<V>(row"),
        {"plain": "is wrong"},
    ),
    Bug(
        "unmasked tail",
        "rms_norm",
        Patch(RMS_NORM, "if (j < vectors) h[k] = add(", "h[k] = add("),
        {"address": "heap-buffer-overflow"},
    ),
    Bug(
        "out-of-bounds store",
        "rms_norm",
        Patch(RMS_NORM, "if (j < vectors) store(h_out + j * V, h[k]);", "store(h_out + j * V, h[k]);"),
        {"plain": "a write past its end", "address": "heap-buffer-overflow"},
    ),
    Bug(
        "wrong dW reduction: a partial sum is dropped",
        "rms_norm",
        Patch(RMS_NORM_BACKWARD, "for (int i = 1; i < lines; i++)", "for (int i = 1; i < lines - 1; i++)"),
        {"plain": "dweight is wrong"},
    ),
    Bug(
        "blocks share a row of partial sums",
        "rms_norm",
        Patch(
            RMS_NORM_BACKWARD,
            "at_row(static_cast<float*>(args.partial), blockIdx.x, args.C), static",
            "static_cast<float*>(args.partial), static",
        ),
        {"plain": "dweight is wrong", "thread": "data race"},
    ),
    Bug("dropped weight offset", "rms_norm", Patch(RMS_NORM, "w[i] += offset;", "w[i] += 0;"), {"plain": "y is wrong"}),
    Bug(
        "16-byte accesses without a look at the stride",
        "rms_norm",
        Patch(RMS_NORM_LAUNCH, "WIDE<T>>(args.dy, args.stride_dy_row)", "WIDE<T>>(args.dy, 0)"),
        {"plain": "is not aligned"},
    ),
    Bug(
        "wrong row of an mma fragment",
        "gemm",
        Patch(GEMM, "m_warp + 16 * i + lane / 4 + e / 2 * 8", "m_warp + 16 * i + lane % 8 + e / 2 * 8"),
        {"plain": "d is wrong"},
    ),
    Bug("early use of cp.async data", "gemm", Patch(GEMM, "copy_async_wait<0>();", "copy_async_wait<1>();"), {"plain": "not waited for"}),
    Bug(
        "early use of all but the last cp.async data",
        "gemm",
        Patch(GEMM, "copy_async_wait<1>();", "copy_async_wait<2>();"),
        {"plain": "d is wrong"},
    ),
    Bug(
        "a stage is overwritten while others read it",
        "gemm",
        Patch(GEMM, "    __syncthreads();  // nobody reads the stage any more\n", ""),
        {"plain": "d is wrong", "thread": "data race"},
    ),
    Bug(
        "no permutation of the chunks of a tile",
        "gemm",
        Patch(GEMM, "((chunk ^ row) % 8)", "(chunk % 8)"),
        {"plain": "bank conflicts"},
    ),
    Bug(
        "all that a lane loads is stored",
        "rope",
        Patch(ROPE, "      if (head + k * lanes >= heads) break;\n      change", "      change"),
        {"address": "heap-buffer-overflow"},
    ),
    Bug(
        "heads past the end are loaded",
        "rope",
        Patch(ROPE, "head + k * lanes < heads ? head + k * lanes : heads - 1", "head + k * lanes"),
        {"address": "heap-buffer-overflow"},
    ),
    Bug(
        "a negative position is looked up",
        "rope",
        Patch(ROPE, "if (position >= 0 && position < args.P)", "if (position < args.P)"),
        {"address": "AddressSanitizer"},
    ),
    Bug(
        "positions past the tables are looked up",
        "rope",
        Patch(ROPE, "if (position >= 0 && position < args.P)", "if (position >= 0)"),
        {"address": "AddressSanitizer"},
    ),
    Bug(
        "positions of 32 bits are read as 64",
        "rope",
        Patch(ROPE, "return args.positions_are_64_bit ?", "return args.positions != nullptr ?"),
        {"plain": "FAILED", "address": "heap-buffer-overflow"},
    ),
    Bug(
        "16-byte accesses without a look at the stride of heads",
        "rope",
        Patch(ROPE_LAUNCH, "aligned<T, V>(heads.x, heads.stride_head) && ", ""),
        {"plain": "is not aligned"},
    ),
    Bug(
        "16-byte accesses without a look at the rows of the tables",
        "rope",
        Patch(ROPE_LAUNCH, "aligned<T, PAIRS>(args.cos, args.stride_cos_row) &&", "aligned<T, PAIRS>(args.cos, 0) ||"),
        {"plain": "is not aligned"},
    ),
    Bug("backward by forward's angle", "rope", Patch(ROPE, "args.inverse ? -s[i] : s[i]", "s[i]"), {"plain": "is wrong"}),
    Bug(
        "k has q's strides",
        "rope",
        Patch(ROPE, "(of_q ? args.q.stride_head : args.k.stride_head)", "args.q.stride_head"),
        {"plain": "k is wrong"},
    ),
    Bug(
        "half of the rest of a head is forgotten",
        "rope",
        Patch(ROPE, "units = rotary + (D - R) / V", "units = rotary + (D - R) / V / 2"),
        {"plain": "is not a copy"},
    ),
    Bug(
        "blocks share tokens",
        "rope",
        Patch(ROPE, "static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z", "static_cast<int64_t>(blockIdx.x) + threadIdx.z"),
        {"plain": "is wrong", "thread": "data race"},
    ),
    Bug(
        "vectors past the end are loaded",
        "swiglu",
        Patch(SWIGLU, "return j < vectors ? j : vectors - 1;", "return j;"),
        {"address": "heap-buffer-overflow"},
    ),
    Bug(
        "all that a thread loads is stored",
        "swiglu",
        Patch(SWIGLU, "if (j < at.vectors) store(y", "store(y"),
        {"plain": "a write past its end", "address": "heap-buffer-overflow"},
    ),
    Bug(
        "the last number of a row is forgotten",
        "swiglu",
        Patch(SWIGLU, "i < end; i += blockDim.x) {\n      store(y", "i < end - 1; i += blockDim.x) {\n      store(y"),
        {"plain": "y is wrong"},
    ),
    Bug(
        "blocks share a part of a row",
        "swiglu",
        Patch(SWIGLU, "static_cast<int64_t>(blockIdx.x) * blockDim.x * K", "static_cast<int64_t>(blockIdx.x) * blockDim.x"),
        {"thread": "data race"},
    ),
    Bug(
        "16-byte accesses without a look at the strides of rows",
        "swiglu",
        Patch(SWIGLU_LAUNCH, "N > 1 ? stride_row : 0", "0 * (N + stride_row)"),
        {"plain": "is not aligned"},
    ),
    Bug("a clamp swallows NaN", "swiglu", Patch(SWIGLU, "smaller(a, limit)", "fminf(a, limit)"), {"plain": "wrong for gate nan"}),
    Bug(
        "an infinite square meets beta = 0", "swiglu", Patch(SWIGLU, "fminf(a * a, 3e38f)", "(a * a)"), {"plain": "is wrong for gate -1000"}
    ),
    Bug("1 - sigma cancels", "swiglu", Patch(SWIGLU, "e * r * r}", "r - r * r}"), {"plain": "dgate is wrong"}),
    Bug("a clamped gate has a gradient", "swiglu", Patch(SWIGLU, "(gate > limit ? 0 : dy)", "dy"), {"plain": "dgate is wrong"}),
    Bug(
        "a clamped up has a gradient",
        "swiglu",
        Patch(SWIGLU, "(fabsf(up) > limit ? 0 : dy)", "dy"),
        {"plain": "dup is wrong"},
    ),
    Bug(
        "keys and values are used before all threads have copied theirs",
        "attention",
        Patch(ATTENTION_FORWARD, "    __syncthreads();  // the stage has arrived", "    // the stage has arrived"),
        {"plain": "is wrong", "thread": "data race"},
    ),
    Bug(
        "early use of keys and values",
        "attention",
        Patch(ATTENTION_FORWARD, "copy_async_wait<0>();", "copy_async_wait<1>();"),
        {"plain": "not waited for"},
    ),
    Bug(
        "no permutation of the chunks of an attention tile",
        "attention",
        Patch(TILE, "(chunk ^ (row % 8))", "chunk"),
        {"plain": "bank conflicts"},
    ),
    Bug(
        "wrong row of a fragment of queries",
        "attention",
        Patch(ATTENTION_TILE, "a.chunk(row_a + 16 * m + lane % 16,", "a.chunk(row_a + 16 * m + lane % 8,"),
        {"plain": "is wrong"},
    ),
    Bug(
        "a query sees the key after its last",
        "attention",
        Patch(ATTENTION_SOFTMAX, "key >= end)", "key > end)"),
        {"plain": "lse is wrong"},
    ),
    Bug(
        "keys past the end of a sequence are loaded",
        "attention",
        Patch(ATTENTION_TILE, "inside = first + row < end && count > 0", "inside = first < end && count > 0"),
        {"plain": "is wrong", "address": "AddressSanitizer"},
    ),
    Bug(
        "a sum of weights keeps its old maximum",
        "attention",
        Patch(ATTENTION_SOFTMAX, "total[m][r] * rescale[m][r] + sum", "total[m][r] + sum"),
        {"plain": "lse is wrong"},
    ),
    Bug(
        "all heads of a group have the first one's queries",
        "attention",
        Patch(ATTENTION_TILE, "(r - token * G) * stride_head", "0 * stride_head"),
        {"plain": "is wrong"},
    ),
    Bug(
        "the row after the last is stored",
        "attention",
        Patch(ATTENTION_TILE, "if (first_row + row >= end || left <= 0) continue;", "if (first_row + row > end || left <= 0) continue;"),
        {"plain": "a write past its end", "address": "AddressSanitizer"},
    ),
    Bug(
        "16-byte accesses without a look at the stride of tokens",
        "attention",
        Patch(ATTENTION_OPTIONS, "aligned<T, V>(heads.data, heads.stride_token) &&", ""),
        {"plain": "is not aligned"},
    ),
    Bug(
        "the last queries that see a tile of keys are forgotten",
        "attention",
        Patch(ATTENTION_BACKWARD, "at.end_query_of(last_key)", "at.end_query_of(min(first_key, last_key))"),
        {"plain": "dk is wrong"},
    ),
    Bug(
        "rows of queries are overwritten while others read them",
        "attention",
        Patch(ATTENTION_BACKWARD, "query_rows[stage ^ 1][threadIdx.x] = next", "query_rows[stage][threadIdx.x] = next"),
        {"plain": "dk is wrong", "thread": "data race"},
    ),
    Bug(
        "NaN in a key reaches the gradients of queries that do not see it",
        "attention",
        Patch(ATTENTION_BACKWARD, "clear_nan<OTHER, THREADS>(k_tile(stage), threadIdx.x);", ""),
        {"plain": "dq is wrong"},
    ),
    Bug(
        "the gradient of a softcap is forgotten",
        "attention",
        Patch(ATTENTION_QUERY_ROW, "(dp - row.delta) * (1 - ratio * ratio)", "(dp - row.delta) * (1 - 0 * ratio * ratio)"),
        {"plain": "dq is wrong"},
    ),
    Bug(
        "wrong dsinks reduction: a partial sum is dropped",
        "attention",
        Patch(ATTENTION_BACKWARD, "for (int warp = 1; warp", "for (int warp = 2; warp"),
        {"plain": "dsinks is wrong"},
    ),
    Bug(
        "keys and values of a cache are used before all threads have copied theirs",
        "decoding",
        Patch(DECODING, "    __syncthreads();  // the stage has arrived", "    // the stage has arrived"),
        {"plain": "is wrong", "thread": "data race"},
    ),
    Bug(
        "the sums of warps are put together before they are there",
        "decoding",
        Patch(DECODING, "  __syncthreads();\n  const DecodingParts parts", "  const DecodingParts parts"),
        {"plain": "is wrong", "thread": "data race"},
    ),
    Bug(
        "the sums of warps overwrite keys that others still read",
        "decoding",
        Patch(
            DECODING,
            "  __syncthreads();\n#pragma unroll\n  for (int r = 0; r < 2; r++) {",
            "#pragma unroll\n  for (int r = 0; r < 2; r++) {",
        ),
        {"plain": "is wrong", "thread": "data race"},
    ),
    Bug(
        "what lies behind the last key of a part is weighed",
        "decoding",
        Patch(DECODING, "if (key >= end)", "if (key > end)"),
        {"plain": "lse is wrong"},
    ),
    Bug(
        "queries of the middle see the last token",
        "decoding",
        Patch(DECODING, "end = max(begin, end_key_of(0));", "end = max(begin, end_key_of(S - 1));"),
        {"plain": "is wrong"},
    ),
    Bug(
        "the last part of a sequence is left out",
        "decoding",
        Patch(DECODING, "split < count; split++", "split + 1 < count; split++"),
        {"plain": "lse is wrong"},
    ),
    Bug(
        "parts are added up in different units",
        "decoding",
        Patch(DECODING, "total = total * rescale + weight * more_total;", "total = total + weight * more_total;"),
        {"plain": "lse is wrong"},
    ),
    Bug(
        "a new token is written to the row of the one before",
        "decoding",
        Patch(DECODING, "row(static_cast<int>(position))", "row(max(0, static_cast<int>(position) - 1))"),
        {"plain": "not in the cache"},
    ),
    Bug(
        "new tokens are written where there is no room",
        "decoding",
        Patch(DECODING, "if (position < 0 || position >= args.room) return;", "if (position < 0) return;"),
        {"address": "AddressSanitizer"},
    ),
    Bug(
        "a page that is not there is read",
        "decoding",
        Patch(DECODING, "min(max(pages[page], 0), last_page) * stride_page", "pages[page] * stride_page"),
        {"address": "AddressSanitizer"},
    ),
]
