"""The CUDA kernels, run by the emulator of tests/emulator: plain, under ASan with UBSan, and under TSan. And bugs, planted to be caught.

The long form, all shapes and many schedules: PYTHONPATH=tests python -m emulator.sanitize --seeds 20
"""

from dataclasses import dataclass

import pytest

from emulator import probe
from emulator.build import CHECKS, KINDS, Patch, compile_check, patched_tree, reason_not, run_check

RMS_NORM, RMS_NORM_LAUNCH, GEMM = "csrc/cuda/rms_norm.cuh", "csrc/cuda/rms_norm.cu", "tests/emulator/gemm.cuh"
SEEDS = {"plain": 4, "address": 2, "thread": 1}


def require(kind):
    if reason_not(kind):
        pytest.skip(reason_not(kind))


@pytest.mark.parametrize("kind", [kind if kind == "plain" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
@pytest.mark.parametrize("name", CHECKS)
def test_check(name, kind, tmp_path):
    require(kind)
    result = run_check(compile_check(name, kind, tmp_path), SEEDS[kind], quick=kind != "plain")
    assert result.returncode == 0, result.stdout


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
        Patch(RMS_NORM, "if (j < vectors) h[k] = load<V>(x + j * V);", "if (j <= vectors) h[k] = load<V>(x + j * V);"),
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
        Patch(RMS_NORM, "for (int i = 1; i < lines; i++)", "for (int i = 1; i < lines - 1; i++)"),
        {"plain": "dweight is wrong"},
    ),
    Bug(
        "blocks share a row of partial sums",
        "rms_norm",
        Patch(
            RMS_NORM, "at_row(static_cast<float*>(args.partial), blockIdx.x, args.C), static", "static_cast<float*>(args.partial), static"
        ),
        {"plain": "dweight is wrong", "thread": "data race"},
    ),
    Bug("dropped weight offset", "rms_norm", Patch(RMS_NORM, "w[i] += offset;", "w[i] += 0;"), {"plain": "y is wrong"}),
    Bug(
        "16-byte accesses without a look at the stride",
        "rms_norm",
        Patch(RMS_NORM_LAUNCH, "args.C * sizeof(T) % 16 == 0 && aligned<T>(args.dy, args.stride_dy_row)", "aligned<T>(args.dy, 0)"),
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
]


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug, tmp_path):
    for kind, words in bug.caught.items():
        require(kind)
        folder = tmp_path / kind
        folder.mkdir()
        result = run_check(compile_check(bug.check, kind, folder, bug.patch), SEEDS["plain"])
        assert result.returncode != 0, f"{kind}: not caught"
        assert words in result.stdout, f"{kind}: caught, but not as {words!r}: {result.stdout}"


def test_probe_notices_another_layout(tmp_path):
    require("plain")
    ours = probe.emulated()
    assert not any(probe.differences(ours, ours).values())
    bug = Patch("tests/emulator/matrix.h", "row.a[r + k / 8 * 2]", "row.a[2 * r + k / 8]")
    result = probe.differences(ours, probe.emulated(patched_tree(bug, tmp_path)))
    assert {name for name, difference in result.items() if difference} == {"mma_bfloat16", "mma_float16", "gemm_bfloat16", "gemm_float16"}


@pytest.mark.skipif(bool(probe.reason_no_hardware()), reason=f"not compared with hardware: {probe.reason_no_hardware()}")
def test_probe_agrees_with_hardware():
    assert not any(probe.differences(probe.emulated(), probe.hardware()).values())
