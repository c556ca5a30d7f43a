"""Attention's CUDA kernels for Hopper, in the emulator: on every case they take, and only on those."""

import pytest
import torch

from conftest import device_or_skip
from fastprimer.cases import CASES
from fastprimer.testing import compare

ATTENTION = [case for case in CASES if case.op == "attention" and not case.bench]
OTHERS = {"unaligned", "expanded", "no-queries", "no-keys", "no-tokens"}
"""Cases that the kernels for every GPU serve: nothing to do, or what TMA does not load, strides of 0 and of no whole 16 bytes."""


def served_by_hopper(case, dtype, capability, monkeypatch):
    """Whether the emulator, as a GPU of that capability, ran a kernel for Hopper; all errors must be within budget."""
    if torch.cuda.is_available():
        pytest.skip("the GPU decides which kernels serve it")
    device = device_or_skip("attention", "cuda")
    monkeypatch.setenv("FASTPRIMER_EMULATOR_CAPABILITY", str(capability))
    torch.ops.fastprimer_emulated.take_products()
    rows = compare(case, dtype, "cuda", device=device)
    assert all(row.ok for row in rows), "\n".join(map(str, rows))
    return torch.ops.fastprimer_emulated.take_products() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_case(case, dtype, monkeypatch):
    assert served_by_hopper(case, dtype, 9, monkeypatch) == (case.name not in OTHERS)


@pytest.mark.parametrize("dtype, capability", [(torch.float32, 9), (torch.bfloat16, 8), (torch.bfloat16, 10)], ids=str)
def test_other_kernels_serve_the_rest(dtype, capability, monkeypatch):
    assert not served_by_hopper(ATTENTION[0], dtype, capability, monkeypatch)
