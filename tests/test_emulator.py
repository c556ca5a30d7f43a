"""The CUDA kernels, run by the emulator of tests/emulator: plain, under ASan with UBSan, and under TSan. And bugs, planted to be caught.

The long form, all shapes and many schedules: PYTHONPATH=tests python -m emulator.sanitize --seeds 20
"""

import pytest

from emulator import probe
from emulator.bugs import BUGS
from emulator.build import CHECKS, KINDS, Patch, compile_check, patched_tree, reason_not, run_check

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
