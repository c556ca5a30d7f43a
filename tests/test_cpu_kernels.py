"""Bugs planted in the CPU kernels, to be caught by the error budget on CASES.

The native library is built once more from a copy of the sources, one changed line at a time.
"""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastprimer.backends import native_reason

ROOT = Path(__file__).resolve().parent.parent
ISAS = ("portable", "avx2", "avx512")
CASES = {
    "rms_norm": ("odd", "gemma", "many-rows", "sliced"),
    "rope": ("partial", "interleaved", "positions", "packed-positions", "heads-first", "many-tokens"),
    "swiglu": ("odd", "packed", "gpt-oss", "gelu", "views", "many"),
    "attention": ("window", "window-both", "softcap", "sinks", "long-keys", "long-queries", "head-24", "packed-window", "packed-unlike"),
    "attention_with_kv_cache": ("speculative", "paged", "value-size", "many-queries", "large-values", "splits", "odd-features"),
    "route": ("deepseek-v3", "unnormalised", "topk-first", "biased", "ties", "ties-of-groups", "sigmoid-unnormalised"),
    "cross_entropy": ("mean", "per-token", "every-option", "lse", "everything", "several-pieces", "one-token", "strided", "far-from-zero"),
    "linear_cross_entropy": (
        "every-option",
        "lse",
        "several-blocks",
        "nothing-kept",
        "partly-kept",
        "all-kept",
        "partly-in-16-bits",
        "strided",
    ),
    "moe": ("top-2", "empty-experts", "skewed", "several-tiles", "odd-sizes", "one-token", "few-tokens", "transposed-weights"),
}

PLANTED = {
    "rms_norm": {
        "dropped weight offset": ("rms_norm.cpp", "load(weight + c, n) + offset, n)", "load(weight + c, n), n)"),
        "wrong dweight reduction": ("rms_norm.cpp", "for (int64_t p = 0; p < a.partials; p++)", "for (int64_t p = 1; p < a.partials; p++)"),
        "partial sums not cleared": ("rms_norm.cpp", "    fill_zero(partial, a.C);\n", ""),
        "elements never written": (
            "rms_norm.cpp",
            "static_cast<A*>(a.rstd)[row] = A(1)",
            "if (row % 4 != 3) static_cast<A*>(a.rstd)[row] = A(1)",
        ),
        "a lane left out of the sum": (
            "simd.h",
            "n > 0; n /= 2) v += exchanged(v, n);",
            "n > 0; n /= 2) v += n == 1 ? Vec<T>{} : exchanged(v, n);",
        ),
    },
    "rope": {
        "backward turns the same way": ("rope.cpp", "a.inverse ? -s : s", "s"),
        "positions ignored": ("rope.cpp", "if (a.positions == nullptr) return token;", "return token;"),
        "k where q lies": ("rope.cpp", "x = static_cast<const T*>(heads.x)", "x = static_cast<const T*>(a.q.x)"),
        "the rest is not copied": ("rope.cpp", "if (begin == 0 && a.R < a.D)", "if (begin > 0 && a.R < a.D)"),
        "a pair's factors do not alternate": ("rope.cpp", "factors.s[2 * i] = -factors.s[2 * i];", ""),
    },
    "swiglu": {
        "a gradient through the clamp": ("swiglu.cpp", "gate > limit ? Vec<A>{} : dy", "dy"),
        "dropped offset": ("swiglu.cpp", "CLAMPS ? b + offset : b", "b"),
        "the cubic term forgotten": ("swiglu.cpp", "a * (alpha + beta * (a * a))", "a * alpha"),
        "powers of other columns": ("swiglu.cpp", "powers + c - first, n)", "powers, n)"),
        "pieces of a row overlap": ("swiglu.cpp", "begin = i % pieces * BLOCK;", "begin = i % pieces * (BLOCK - 1);"),
        "a term of the exponential": ("simd_math.h", "r * 0.16666521f + 0.49999993f", "r * 0.16666521f + 0.499f"),
    },
    "attention": {
        "a key too many": ("attention_plan.h", "smaller(diagonal + right + 1, T)", "smaller(diagonal + right + 2, T)"),
        "a query too many": ("attention_plan.h", "larger(diagonal - right, 0)", "larger(diagonal - right - 1, 0)"),
        "the last keys never met": ("attention_plan.h", "end = round_up(seen.end, KEY_STEP)", "end = seen.end / KEY_STEP * KEY_STEP"),
        "rows of a wider strip left out": ("attention_plan.h", "patch.rows.end = rows.end;", ""),
        "keys of a wider strip left out": ("attention_plan.h", "patch.keys.end = strip.end;", ""),
        "sums not scaled down": ("attention_forward.h", "store(sums, load(sums) * shrink);", ""),
        "the sink has no share": ("attention_plan.h", "sum * scale + exp2_of<6>(own - highest)", "sum * scale"),
        "the gradient of lse dropped": ("attention_backward.h", "product - (a.dlse ? a.dlse[at] : 0.0f)", "product"),
        "softcap without its slope": ("attention_backward.h", "if (CAPPED) ds[u] *= 1 - t * t;", ""),
        "a total of 0 taken for one": ("attention_plan.h", "sees_nothing = sum == 0.0f", "sees_nothing = sum < 0.0f"),
        "short: softcap without its slope": ("attention_short.h", " * (1 - score.tanh * score.tanh)", ""),
        "short: gradients of what is not seen": ("attention_short.h", "store(ds_row, is_seen ? ds : Vec<float>{});", "store(ds_row, ds);"),
        "short: later queries left out": ("attention_short.h", "r < n; r += KEYS) transpose", "r < 1; r += KEYS) transpose"),
        "a logarithm of few terms": ("simd_math.h", "194440e-4f - 0.5f", "194440e-4f - 0.499f"),
        "the sums of dq not cleared": (
            "attention_backward.h",
            "    __builtin_memset(dq_.data(), 0, x_.width.ld * ROWS<Tile> * sizeof(float));\n",
            "",
        ),
        "a sweep left out": ("attention_backward.h", "int64_t sweep = sweeps.begin; sweep <", "int64_t sweep = sweeps.begin + 1; sweep <"),
        "a term left out of the products": (
            "products.h",
            "k < K; k++) {\n    Vec<float> b[REGISTERS];",
            "k + 1 < K; k++) {\n    Vec<float> b[REGISTERS];",
        ),
    },
    "attention_with_kv_cache": {
        "a new token not appended": ("decoding.cpp", "larger(chunk.keys.begin, cached); j <", "larger(chunk.keys.begin, cached + 1); j <"),
        "new tokens written where others lie": ("decoding.cpp", "row_of<T>(a_.v, b, j - cached, h)", "row_of<T>(a_.v, b, 0, h)"),
        "the page is that of the first token": ("decoding_plan.h", "a.pages_of_sequence + page]", "a.pages_of_sequence]"),
        "all heads of a group have the first one's queries": ("decoding_plan.h", "+ row % (a.H / a.Hk)", "+ 0 * row"),
        "keys past a row's last are weighed": (
            "decoding.cpp",
            "for (int64_t c = seen.end; c < end; c++)",
            "for (int64_t c = end; c < end; c++)",
        ),
        "a chunk left out": (
            "decoding.cpp",
            "const Part part = x.part(i, kv_head, r);",
            "const Part part = x.part(chunks.begin, kv_head, r);",
        ),
        "parts not brought to one maximum": ("decoding.cpp", "__builtin_exp2(part.top() - top)", "__builtin_exp2(0 * part.top())"),
        "the sink has no share": ("decoding.cpp", "double total = __builtin_exp2(sink - top);", "double total = 0;"),
        "some keys meet rows that do not see them": ("decoding.cpp", "values + seen.begin * stride", "values"),
        "a column too few": ("dots.h", "  if (c < C) add(c, Constant<1>{}, C - c);", "  if (c < C) add(c, Constant<1>{}, C - c - 1);"),
    },
    "route": {
        "a tie goes to the higher number": ("routing.cpp", "return a > b || (a != a && b == b);", "return a >= b || (a != a && b == b);"),
        "the bias weighs too": (
            "routing.cpp",
            "choice_[e] = bias ? scores_[e] + bias[e] : scores_[e];",
            "choice_[e] = bias ? scores_[e] += bias[e] : scores_[e];",
        ),
        "a group is worth its largest choice alone": (
            "routing.cpp",
            "worth_[g] = best == 2 ? best_[0] + best_[1] : best_[0];",
            "worth_[g] = best_[0];",
        ),
        "the scale has no gradient": ("routing.cpp", "(dr_[k] = weighting.scale * dweights[k])", "(dr_[k] = dweights[k])"),
        "only the chosen have a gradient": ("routing.cpp", "from_wide<T>(-scores_[e] * mean)", "from_wide<T>(0.0)"),
        "rows past the caches are not written": ("routing.cpp", "if (!past_cache_) return;", "return;"),
        "a sigmoid without its slope": ("routing.cpp", "slopes[i] = chosen[i] >= 0 ? small : large;", ""),
        "the last group never looked at": (
            "routing.cpp",
            "for (int64_t g = 0; g < a_.groups; g++) {\n      choose",
            "for (int64_t g = 0; g + 1 < a_.groups; g++) {\n      choose",
        ),
    },
    "cross_entropy": {
        "the sum not brought to a new maximum": ("cross_entropy_row.h", "if (sum > 0) sum *= A(__builtin_exp(double(top - most)));", ""),
        "z-loss without its slope": ("cross_entropy_row.h", "1 + 2 * options.z_loss * lse", "1 + options.z_loss * lse"),
        "the gradient of lse dropped": ("cross_entropy_row.h", "* lse) + dlse)", "* lse) + 0 * dlse)"),
        "the gradient by the rounded lse": ("cross_entropy_row.h", "+ dlse) * correction)", "+ dlse))"),
        "softcap without its slope": ("cross_entropy_row.h", "CAPPED ? dz * slope(z) : dz", "dz"),
        "smoothed over another number of words": (
            "cross_entropy_row.h",
            "dloss * options.label_smoothing / V",
            "dloss * options.label_smoothing",
        ),
        "argmax counted from its piece": ("cross_entropy_row.h", "first + find(z, n, most);", "find(z, n, most);"),
        "the smallest of 16-bit numbers": (
            "cross_entropy_row.h",
            "(Signed a, Signed b) { return a > b",
            "(Signed a, Signed b) { return a < b",
        ),
        "sums no better than gradients": ("cross_entropy_row.h", "SUM_DEGREE = sizeof(T) == 4 ? 6 : 5", "SUM_DEGREE = GRADIENT_DEGREE<T>"),
        "argmax the first of its register": ("cross_entropy_row.h", "  while (to_wide(z[v]) != wanted) v++;\n", ""),
        "the target looked for in every block": ("cross_entropy.cpp", "here = target - first;", "here = target;"),
        "an ignored token's gradient not cleared": ("cross_entropy.cpp", "    __builtin_memset(dlogits, 0, p.V * sizeof(T));\n", ""),
    },
    "linear_cross_entropy": {
        "a part of the vocabulary left out": ("cross_entropy_forward.h", "for (int64_t part = 1; part <", "for (int64_t part = 2; part <"),
        "what was kept of other words": ("cross_entropy_plan.h", "tokens_[i + r], first_, n_", "tokens_[i + r], 0 * first_, n_"),
        "a shift for all that is kept": ("cross_entropy_kept.h", "kept_blocks(p.columns) + first / KEPT_BLOCK;", "kept_blocks(p.columns);"),
        "a range overwrites those before it": ("cross_entropy_backward.h", "x_.range > 0);", "false);"),
        "the gradient of the bias from one token": ("cross_entropy_backward.h", "load(dbias + v, count) + d, count);", "d, count);"),
        "dx of an ignored token not cleared": (
            "cross_entropy_backward.h",
            "__builtin_memset(dx + n * p.C, 0, p.C * sizeof(T));",
            "continue;",
        ),
        "the first columns of x for all": ("cross_entropy_backward.h", "x_.weight.data() + c * pairs", "x_.weight.data() + 0 * pairs"),
        "the target looked for in the wrong tile": ("cross_entropy_backward.h", "p_.target[token] - tiles_.first()", "p_.target[token]"),
        "tokens follow each other": ("cross_entropy_plan.h", "numbers_[n++] = i;", "numbers_[n] = n, n++;"),
    },
    "moe": {
        "an expert begins a pair late": (
            "moe_plan.h",
            "next_[e] = begin_[e];",
            "next_[e] = begin_[e] + (e > 0 && begin_[e + 1] > begin_[e] + 1);",
        ),
        "the weight forgotten": ("moe_few.h", "load(z + i * p.C + c, count) * p.weights[i]", "load(z + i * p.C + c, count)"),
        "a token's last expert left out": ("moe_few.h", "i < (n + 1) * p.K; i++) {", "i < (n + 1) * p.K - (p.K > 1); i++) {"),
        "u of unrounded numbers": (
            "moe_few.h",
            "Silu<T>(a_c).value * load(hidden + F + c, count)",
            "Silu<T>(a_c).value * 1.01f * load(b + c, count)",
        ),
        "the weight forgotten among many tokens": ("moe_forward.h", "y.weight * load(z", "load(z"),
        "a block's u where another's lies": ("moe_forward.h", "plan.padded_begin(e0) + i0) *", "plan.padded_begin(e0)) *"),
        "experts overwrite each other": ("moe_forward.h", "store(to, load(to, part) + y", "store(to, y"),
        "the weight forgotten in ddown": ("moe_plan.h", "store(wu + c, w * u, count);", "store(wu + c, u, count);"),
        "a slice of dweights left out": (
            "moe_backward.h",
            "for (int64_t s = 0; s < slices; s++)",
            "for (int64_t s = 1; s < slices; s++)",
        ),
        "an empty expert's gradient not cleared": ("moe_backward.h", "? clear_gradients(e, f, features) :", "? void() :"),
        "rows behind an expert's last not cleared": (
            "moe_backward.h",
            "const int64_t written = r < n ? width.C : 0;",
            "const int64_t written = width.C;",
        ),
        "an expert's last row of dx left out": (
            "moe_backward.h",
            "for (int64_t r = 0; r < rows; r++) add(",
            "for (int64_t r = 0; r < rows - (rows > 1); r++) add(",
        ),
        "a range of features where the first lies": (
            "moe_backward.h",
            "gate_up<T>(e, i * p_.F + range_.begin + f)",
            "gate_up<T>(e, i * p_.F + f)",
        ),
        "gradients in place where they do not fill it": ("moe_backward.h", "p_.C % STEP == 0 && p_.F % STEP == 0", "p_.C % STEP == 0"),
        "dx from gate alone": ("moe_backward.h", "gate_up<T>(e, i * p_.F + range_.begin + f)", "gate_up<T>(e, range_.begin + f)"),
        "an empty expert's gradient not cleared for a few tokens": (
            "moe_few_backward.h",
            "if (x_.gradient) clear(gradient(e, first), n * x_.columns, x_.past_cache);",
            "",
        ),
        "the gradient of a few tokens' weights from all but the last": (
            "moe_few_backward.h",
            "for (int64_t i = 0; i < plan_.rows(e); i++) {\n        const int64_t pair",
            "for (int64_t i = 0; i < plan_.rows(e) - (plan_.rows(e) > 1); i++) {\n        const int64_t pair",
        ),
        "a few tokens' last piece left out": (
            "moe_few_backward.h",
            "piece < sweep.pieces; piece++)",
            "piece < sweep.pieces - (sweep.pieces > 1); piece++)",
        ),
        "the weight forgotten in ddown of a few tokens": ("moe_few_backward.h", "store(wu + f, w * (", "store(wu + f, ("),
    },
    "all": {
        "off-by-one tail": ("columns.h", "  if (c < end) body(c, end - c, 0);", "  if (c + 1 < end) body(c, end - c - 1, 0);"),
    },
    "all but rope": {
        "unmasked tail": ("columns.h", "  if (c < end) body(c, end - c, 0);", "  if (c < end) body(c, All{}, 0);"),
    },
    "in pairs": {
        "halves of a pair exchanged": (
            "simd.h",
            "packus_epi32(rounded(first), rounded(second))",
            "packus_epi32(rounded(second), rounded(first))",
        ),
        "the first of a pair twice": ("simd.h", "_mm256_unpackhi_epi16", "_mm256_unpacklo_epi16"),
    },
    "memory-bound": {
        "stores past the caches lost": ("columns.h", "    stream(p, v);\n", ""),
    },
}
"""By operation: {bug: (file of csrc/cpu, text, what it becomes)}."""

GROUPS = {op: (op,) for op in CASES} | {
    "all": tuple(CASES),
    "all but rope": tuple(op for op in CASES if op != "rope"),  # where the next head is written over what is written too far
    "memory-bound": ("rms_norm", "rope", "swiglu", "cross_entropy"),
    "in pairs": ("rms_norm", "rope", "swiglu", "cross_entropy"),
}
"""Which operations a bug breaks."""

ONLY = {"in pairs": "avx2"}
"""{group: the instruction set that alone has its code}."""

LATER = {"linear_cross_entropy": [None] * len(PLANTED["cross_entropy"])}
"""Of two operations that share sources, one waits until the other's bugs are through."""

TOGETHER = itertools.zip_longest(*(LATER.get(op, []) + [(op, bug) for bug in PLANTED[op]] for op in CASES))
ROUNDS = [
    *([planted for planted in bugs if planted] for bugs in TOGETHER),
    *([(group, bug)] for group in GROUPS if group not in CASES for bug in PLANTED[group]),
]
"""Bugs of different operations are planted, and judged, together."""

JUDGE = f"""
import os, pathlib, sys
import torch
import fastprimer
from fastprimer.cases import loss_case, moe_case, rms_norm_case, rope_case, route_case, swiglu_case
from fastprimer.cases.attention import attention_case, decoding_case
from fastprimer.testing import CASES, compare
from fastprimer.verify import dtypes_of
sys.modules["fastprimer.backends"].PACKAGE = pathlib.Path(sys.argv[1])
large = {{
    "rms_norm": rms_norm_case("large", 1024, 4352),
    "rope": rope_case("large", (1, 512), 64, 4, 128, 128, P=512),
    "swiglu": swiglu_case("large", 1024, 4352),
    "attention": attention_case("large", (1, 300, 2, 64), (1, 300, 1, 64), causal=True, scale=1.0),
    "attention_with_kv_cache": decoding_case("large", [700, 80], 5, 8, 2, 72, window=(300, None), scale=1.0),
    "route": route_case("large", 33000, 64, 5, renormalize=False, scale=2.0),
    "cross_entropy": loss_case("cross_entropy", "large", 512, 4224, reduction="none", softcap=3.0, return_lse=True),
    "linear_cross_entropy": loss_case("linear_cross_entropy", "large", 300, 4400, 280, ignored=range(9), bias=True, reduction="none"),
    "moe": moe_case("large", 330, 40, 1100, 2, 2, skew=0.2),
}}

def rows(op):  # every compared tensor: all dtypes of small cases, a large case, that with the project's own matrix products too
    small = [c for c in CASES if c.op == op and c.name in {CASES}[op]]
    for dtype in dtypes_of("cpu", op):
        for case in small:
            yield from compare(case, dtype, "cpu")
    yield from compare(large[op], torch.float32, "cpu")
    if op in ("attention", "moe", "linear_cross_entropy"):
        torch.ops.fastprimer.allow_brgemm(False)
        yield from compare(large[op], torch.float32, "cpu")
        torch.ops.fastprimer.allow_brgemm(True)

def judge(op):
    compared = wrong = 0
    for row in rows(op):
        compared, wrong = compared + 1, wrong + (not row.ok)
        if wrong and sys.argv[2] == "until-wrong":
            break
    print(op, compared, wrong, flush=True)

for op in sys.argv[3:]:  # each in a process of its own: a crash, a bug of memory that is seen in the coarsest way, says nothing of another
    if os.fork() == 0:
        try:
            judge(op)
        except RuntimeError:  # what the products' library throws for sizes that no product has
            print(op, 1, 1, flush=True)
        os._exit(0)
    status = os.wait()[1]
    if os.WIFSIGNALED(status):
        print(op, 1, 1, flush=True)
    elif status:
        sys.exit(1)
"""


class Build:
    """A copy of the sources and its build folder."""

    def __init__(self, folder: Path):
        pybind11 = pytest.importorskip("pybind11")
        self.folder, self.source = folder, folder / "source"
        self.source.mkdir()
        shutil.copytree(ROOT / "csrc", self.source / "csrc")
        recipe = (ROOT / "CMakeLists.txt").read_text()
        # Without much optimisation: half the time, and no other results. For this processor alone, which runs nothing else.
        self.isa = isa = ISAS[torch.ops.fastprimer.limit_cpu_instruction_set(len(ISAS) - 1)]
        (self.source / "CMakeLists.txt").write_text(re.sub(r"(?<=set\(ISAS ).*(?=\))", isa, recipe).replace(" -O3 ", " -O1 "))
        dispatch = self.source / "csrc/cpu/dispatch.cpp"
        dispatch.write_text(re.sub(r"return isa == AVX512 \?.*;", f"return {isa}::name(args);", dispatch.read_text()))
        self.configure = ["cmake", "-S", self.source, "-B", folder / "build", f"-DPython_EXECUTABLE={sys.executable}"]
        self.configure += [f"-DFASTPRIMER_TORCH={Path(torch.__file__).parent}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        self.configure += ["-DFASTPRIMER_CUDA=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]  # all but the kernels, which say for themselves
        subprocess.run(self.configure, check=True, capture_output=True)

    def judge(self, operations, until: str = "all") -> dict[str, tuple[int, int]]:
        """{operation: (compared tensors, those beyond their budget)} of the library as its sources are now.

        "until-wrong": an operation is done with at its first tensor beyond the budget.
        """
        build = subprocess.run(["cmake", "--build", self.folder / "build", "--parallel", "2"], capture_output=True, text=True)
        assert build.returncode == 0, build.stdout[-2000:]
        subprocess.run(["cmake", "--install", self.folder / "build", "--prefix", self.folder / "package"], check=True, capture_output=True)
        command = [sys.executable, "-c", JUDGE, self.folder / "package", until, *operations]
        judged = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert judged.returncode == 0, judged.stderr
        return {op: (int(compared), int(wrong)) for op, compared, wrong in map(str.split, judged.stdout.splitlines())}


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    if native_reason():
        pytest.skip(native_reason())
    if shutil.which("cmake") is None:
        pytest.skip("CMake is not on the path")
    return Build(tmp_path_factory.mktemp("planted"))


@pytest.mark.slow(minutes=5)
def test_the_copy_itself_is_right(build):
    found = build.judge(CASES)
    assert set(found) == set(CASES) and all(compared > 50 and wrong == 0 for compared, wrong in found.values())


@pytest.mark.planted
@pytest.mark.slow(minutes=5)
@pytest.mark.parametrize("bugs", ROUNDS, ids=lambda bugs: "; ".join(bug for _, bug in bugs))
def test_planted_bugs_are_caught(build, bugs):
    before = {}
    if any(build.isa != ONLY.get(op, build.isa) for op, _ in bugs):
        pytest.skip(f"kernels for {build.isa} have no such code")
    for op, bug in bugs:
        name, old, new = PLANTED[op][bug]
        path = build.source / "csrc/cpu" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {name}"
        before.setdefault(path, text)
        path.write_text(text.replace(old, new))
    try:
        broken = {o: bug for op, bug in bugs for o in GROUPS[op]}
        found = build.judge(broken, "until-wrong")
        missed = {o: bug for o, bug in broken.items() if not found[o][1]}
        assert not missed
    finally:
        for path, text in before.items():
            path.write_text(text)
