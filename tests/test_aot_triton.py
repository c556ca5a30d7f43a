"""The Triton kernels compile for GPUs that are not here, without spills and with the instructions they should have.

The long form, every case for every target: make gate
"""

import dataclasses
import functools
import re

import pytest

pytest.importorskip("triton")

from aot import triton_cases as cases  # noqa: E402
from aot.table import markdown  # noqa: E402
from aot.triton_gate import TARGETS, inspect, launches_on, short_form  # noqa: E402
from fastprimer.backends import interpreting  # noqa: E402
from fastprimer.kernels import rms_norm  # noqa: E402
from mutation import mutated  # noqa: E402

pytestmark = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET is set: nothing compiles")


def faults(case, targets=TARGETS):
    return [str(row) for row in inspect(case, targets) if row.faults]


@functools.cache
def chosen():
    return short_form(cases.CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_gate(case):
    found = faults(case, {name: TARGETS[name] for name in chosen()[case.name]})
    assert not found, "\n".join(found)


def test_the_short_form_has_every_case_and_every_kernel_on_every_target():
    assert set(chosen()) == {case.name for case in cases.CASES} and all(chosen().values())
    every, short = set(), set()
    for case in cases.CASES:
        for name in TARGETS:
            kernels = {(launch.kernel.__name__, launch.width, name) for launch in launches_on(name, case)}
            every |= kernels
            short |= kernels if name in chosen()[case.name] else set()
    assert short == every and len({target for _, _, target in every}) == len(TARGETS)


def test_the_table_counts_instructions():
    case = next(case for case in cases.CASES if case.name.startswith("decoding float16"))
    rows = inspect(case, {name: TARGETS[name] for name in ("sm_80", "gfx942")})
    head, _, line = markdown(("kernel", "case"), (row.cell for row in rows)).splitlines()
    assert head == "| kernel | case | sm_80 | gfx942 |"
    assert re.fullmatch(r"\| attention_with_kv_cache_kernel \| decoding .* \| \d+ / \S+ / .*HMMA.* \| \d+ / \S+ / .*MFMA.* \|", line)


@pytest.mark.slow
def test_planted_spilling_tile_is_caught(tmp_path):
    planted = mutated(rms_norm, "Limits(4096, 8192)", "Limits(4096, 65536)", tmp_path)
    found = faults(cases.rms_norm_backward(cases.FLOAT32, 4096, 65536, True, kernels=planted))
    assert len(found) == len(TARGETS) and all("spills" in row for row in found), found


def test_planted_narrow_access_is_caught():
    case = cases.rms_norm_forward(cases.BFLOAT16, 4096, 1001)
    found = faults(dataclasses.replace(case, requires=cases.WIDE_ACCESS))
    assert len(found) == len(TARGETS) and all("no instruction like" in row for row in found), found


def test_planted_shared_memory_is_caught():
    targets = {name: dataclasses.replace(target, shared_limit=63) for name, target in TARGETS.items()}
    found = faults(cases.rms_norm_forward(cases.BFLOAT16, 4096, 4096), targets)
    assert len(found) == len(TARGETS) and all("64 bytes of shared memory, the limit is 63" in row for row in found), found
