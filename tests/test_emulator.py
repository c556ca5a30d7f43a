"""The CUDA kernels, run by the emulator of tests/emulator: plain, under ASan with UBSan, and under TSan. And bugs, planted to be caught.

The long form, all shapes and many schedules: PYTHONPATH=tests python -m emulator.sanitize --seeds 20
"""

import itertools
import os

import pytest

from emulator import probe
from emulator.bugs import BUGS
from emulator.bugs_hopper import BUGS as BUGS_HOPPER
from emulator.bugs_losses import BUGS as BUGS_LOSSES
from emulator.bugs_moe import BUGS as BUGS_MOE
from emulator.build import CHECKS, KINDS, Patch, compile_check, patched_tree, reason_not, run_check

ALL_BUGS = [*BUGS, *BUGS_HOPPER, *BUGS_MOE, *BUGS_LOSSES]
SEEDS = {"plain": 4, "address": 1, "thread": 1}


HOPPER_LAYOUTS = {
    "tma swizzle": ("(address / SWIZZLED_ROW % 8) << 4", "(address / SWIZZLED_ROW % 4) << 4", ["tma", "wgmma"]),
    "tma outside": ("first[d] + i[d] + add >= 0", "first[d] + i[d] + add >= -1", ["tma"]),
    "wgmma rows of a tile": ("panel_stride + k / 8 * eight_rows", "panel_stride + (k / 8 ^ 1) * eight_rows", ["registers"]),
    "wgmma registers": ("registers[r / 8 + k / 8 * 2]", "registers[r / 8 * 2 + k / 8]", ["registers"]),
    "wgmma rows": ("sums[lane / 4 + i / 2 % 2 * 8]", "sums[lane / 4 * 2 + i / 2 % 2]", ["wgmma"]),
}
"""{file, what: a change of the emulator's layouts, and of which primitives that changes the numbers}"""


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """A folder of compiled parts of programs, of all workers of pytest-xdist together."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "objects"
    folder.mkdir(exist_ok=True)
    return folder


def require(kind):
    if reason_not(kind):
        pytest.skip(reason_not(kind))


def checks():
    """Each of them takes seconds to compile: `make check` has two of them."""
    for name, kind in itertools.product(CHECKS, KINDS):
        few = kind == "plain" and name in ("swiglu", "routing")
        yield pytest.param(name, kind, marks=[] if few else pytest.mark.slow)


@pytest.mark.parametrize("name, kind", list(checks()))
def test_check(name, kind, tmp_path, objects):
    require(kind)
    result = run_check(compile_check(name, kind, tmp_path, objects=objects), SEEDS[kind], quick=kind != "plain")
    assert result.returncode == 0, result.stdout


@pytest.mark.planted
@pytest.mark.slow
@pytest.mark.parametrize("bug", ALL_BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug, tmp_path, objects):
    for kind, words in bug.caught.items():
        require(kind)
        folder = tmp_path / kind
        folder.mkdir()
        result = run_check(compile_check(bug.check, kind, folder, bug.patch, objects), SEEDS["plain"], until=words)
        assert result.returncode != 0, f"{kind}: not caught"
        assert words in result.stdout, f"{kind}: caught, but not as {words!r}: {result.stdout}"


@pytest.mark.slow
def test_probe_notices_another_layout(tmp_path):
    require("plain")
    source = probe.PROBES["native"]
    ours = probe.emulated(source)
    assert not any(probe.differences(ours, ours).values())
    bug = Patch("tests/emulator/matrix.h", "row.a[r + k / 8 * 2]", "row.a[2 * r + k / 8]")
    result = probe.differences(ours, probe.emulated(source, patched_tree(bug, tmp_path)))
    assert {name for name, difference in result.items() if difference} == {"mma_bfloat16", "mma_float16", "gemm_bfloat16", "gemm_float16"}


@pytest.mark.slow
@pytest.mark.parametrize("change", HOPPER_LAYOUTS, ids=str)
def test_probe_notices_another_layout_of_hopper(change, tmp_path):
    require("plain")
    source = probe.PROBES["sm_90a"]
    before, after, wrong = HOPPER_LAYOUTS[change]
    ours = probe.emulated(source)
    theirs = probe.emulated(source, patched_tree(Patch(f"tests/emulator/{change.split()[0]}.h", before, after), tmp_path))
    found = {name for name, difference in probe.differences(ours, theirs).items() if difference}
    assert found == {name for name in probe.parse(ours) if any(word in name for word in wrong)}


@pytest.mark.parametrize("architecture", probe.PROBES)
def test_probe_agrees_with_hardware(architecture):
    if probe.reason_no_hardware(architecture):
        pytest.skip(f"not compared with hardware: {probe.reason_no_hardware(architecture)}")
    assert not any(probe.differences(probe.emulated(probe.PROBES[architecture]), probe.hardware(architecture)).values())
