"""Which backends can be tested in this process, and on which device."""

import pytest
import torch

from fastprimer.backends import BACKENDS, declared, emulator_reason, load_emulator, operations, unavailable
from fastprimer.verify import device_of

torch.set_num_threads(2)


def device_or_skip(op: str, backend: str) -> str:
    """Where this process can run a backend's kernels: on their own device, or without a GPU in a stand-in; else skips."""
    device = device_of(backend)
    if backend == "cuda" and device == "cpu" and not emulator_reason():
        load_emulator()
    reason = unavailable(op, backend, device)
    if reason:
        pytest.skip(reason)
    return device


@pytest.fixture(params=[(op, backend) for op in operations() for backend in BACKENDS if backend in declared(op)], ids="-".join)
def cell(request) -> tuple[str, str, str]:
    """(op, backend, device) of every kernel that is written; skips those that this process cannot run."""
    op, backend = request.param
    return op, backend, device_or_skip(op, backend)
