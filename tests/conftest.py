"""Which backends can be tested in this process, and on which device."""

import itertools
import os
from collections import defaultdict

import pytest
import torch

from fastprimer.backends import BACKENDS, declared, emulator_reason, load_emulator, operations, unavailable
from fastprimer.config import Config
from fastprimer.verify import device_of

torch.set_num_threads(2)

SMALL = Config(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
"""A decoder of two layers, whose weights are large enough for distinct probabilities."""

FILES_OF_ONE_WORKER = ("test_cpu_kernels.py", "test_train.py", "test_calculator.py")
"""What they prepare once takes long."""


def scope(test: str) -> str:
    """Tests of one scope run in one worker of pytest-xdist: those of such a file, and those with the same text after an @."""
    file = test.partition("::")[0]
    return file if file.endswith(FILES_OF_ONE_WORKER) else test.rpartition("@")[2]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = scope  # xdist's own groups (3.8) go unnoticed with pytest 9.2
    return scheduling


def pytest_collection_modifyitems(config, items):
    """The longest tests begin first, so that no worker is left with one at the end; what several share takes the first of them long.

    Of many planted bugs every FASTPRIMER_PLANTED-th is planted, if that is set.
    """
    share, numbers = int(os.environ.get("FASTPRIMER_PLANTED", 1)), defaultdict(itertools.count)
    chosen, others = [], []
    for item in items:
        wanted = item.get_closest_marker("planted") is None or next(numbers[item.function]) % share == 0
        (chosen if wanted else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = chosen

    def minutes(item) -> float:
        slow = item.get_closest_marker("slow")
        return slow.kwargs.get("minutes", 0.5) if slow else float("@" in item.name)

    items.sort(key=minutes, reverse=True)


# What a test draws depends neither on the tests before it nor on whether it is the one that makes what several share.


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    torch.manual_seed(1)


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


@pytest.fixture
def one_thread():
    """The other cores are other tests'."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokens():
    """Two sequences of words 1..96, for the small models of hf_checks."""
    return torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(1))
