"""What the tests of the CPU kernels share: instruction sets, matrix products, and a case on the CPU."""

import contextlib

import pytest
import torch

import fastprimer as fp
from conftest import device_or_skip
from fastprimer import testing
from fastprimer.backends import use_backend


def name(dtype):
    return str(dtype)[6:]


@contextlib.contextmanager
def instruction_set(limit):
    """The kernels of one instruction set: 0 portable, 1 AVX2, 2 AVX-512."""
    device_or_skip("rms_norm", "cpu")
    try:
        if torch.ops.fastprimer.limit_cpu_instruction_set(limit) != limit:
            pytest.skip("this processor does not have it")
        yield
    finally:
        torch.ops.fastprimer.limit_cpu_instruction_set(2)


def run(case, dtype):
    with use_backend("cpu"):
        return testing.run(case, dtype, getattr(fp, case.op))


@contextlib.contextmanager
def products_of_torch(allowed):
    """The matrix products that libtorch_cpu exports, or the project's own loops."""
    try:
        if torch.ops.fastprimer.allow_brgemm(allowed) != allowed:
            pytest.skip("this torch or this processor has none")
        yield
    finally:
        torch.ops.fastprimer.allow_brgemm(True)


@contextlib.contextmanager
def tiles_of_bfloat16():
    try:
        torch.ops.fastprimer.force_bfloat16_tiles(True)
        yield
    finally:
        torch.ops.fastprimer.force_bfloat16_tiles(False)


def assert_same_bits_for_any_number_of_threads(case):
    device_or_skip(case.op, "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(case, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][k], other[k]) for other in results[1:] for k in results[0])
