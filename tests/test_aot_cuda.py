"""The CUDA kernels compile for GPUs that are not here, without spills and with the instructions they should have."""

import re
from pathlib import Path

import pytest

from aot.cuda_gate import CASES, SHARED_LIMIT, TARGETS, Case, inspect, reason_not

pytestmark = pytest.mark.skipif(bool(reason_not()), reason=reason_not())

ROOT = Path(__file__).resolve().parent.parent
PLANTED = """
#include "device.cuh"

namespace fastprimer {

__global__ void narrow_copy(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

__global__ void __launch_bounds__(1024) spilling_tile(const float* x, float* y) {
  float tile[96];
#pragma unroll
  for (int i = 0; i < 96; i++) tile[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; i++) y[i * 1024 + threadIdx.x] = tile[i] * tile[(i * 37 + 11) % 96];
}

__global__ void large_shared(float* y) {
  FASTPRIMER_SHARED(numbers, float[12000]);
  numbers[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = numbers[threadIdx.x + y[0] > 1];
}

}  // namespace fastprimer
"""


SERIALIZED = """
#include "hopper.cuh"

namespace fastprimer {

__global__ void touched_early(const float* x, float* y, int n) {
  float d[8][4] = {};
  const uint64_t tile = matrix_descriptor(dynamic_shared(), 0);
  warpgroup_fence(d);
  for (int i = 0; i < n; i++) {
    warpgroup_multiply<bfloat16>(d, tile, tile, true);
    warpgroup_commit();
    d[0][0] += x[i];
  }
  warpgroup_wait<0>(d);
  for (int i = 0; i < 32; i++) y[32 * threadIdx.x + i] = d[i / 4][i % 4];
}

}  // namespace fastprimer
"""


def faults(rows):
    return {(row.kernel, row.target): row.faults for row in rows if row.faults}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.source.stem)
def test_gate(case):
    rows = inspect(case)
    assert {row.target for row in rows} == set(case.targets)
    assert not faults(rows), "\n".join(map(str, rows))
    assert any(case.requires(row.kernel) for row in rows), "no kernel has a required instruction: were the kernels renamed?"


def test_the_library_is_built_for_every_target_unless_told_otherwise():
    recipe = (ROOT / "CMakeLists.txt").read_text()
    assert tuple(f"sm_{number}" for number in re.search(r'_ARCHITECTURES "(.*?)"', recipe)[1].split(";")) == TARGETS


@pytest.mark.slow
def test_planted_faults_are_caught(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    case = Case(source, lambda kernel: ("LDG.E.128",) if kernel == "narrow_copy" else ())
    found = faults(inspect(case, shared_limit=dict.fromkeys(SHARED_LIMIT, 40 << 10)))
    for target in TARGETS:
        assert found[("narrow_copy", target)] == ("no LDG.E.128",)
        assert any("spills" in fault for fault in found[("spilling_tile", target)])
        assert any("of shared memory, the limit is" in fault for fault in found[("large_shared", target)])


def test_serialized_wgmma_is_caught(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(SERIALIZED)
    found = faults(inspect(Case(source, lambda kernel: ("HGMMA",), ("sm_90a",))))
    assert found == {("touched_early", "sm_90a"): ("its wgmma are serialized",)}
