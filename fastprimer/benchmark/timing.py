"""Clocks, rounds, and the interval of a median.

All contestants are measured in every round, in random order, so that a noisy machine is noisy for all of them and nobody
always finds the memory that another has just freed. On a GPU the L2 cache is cleared before every measurement, and events
time the device.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastprimer.memory import extra_resident_bytes, few_collected, populate_kept_memory

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASSES = (FORWARD, BACKWARD, BOTH)
MODEL_PASSES = TRAINING, DECODING = "training", "decoding"
"""What is measured of whole models."""
CONFIDENCE = 0.95
PATIENCE_MS, FEWEST = 20_000, 3
"""A contestant that has taken this long altogether, in at least so many measurements, is measured no more."""
FEWEST_JUDGED = 3
"""With fewer measurements nothing tells how much they vary."""
WARM_MS = 10
"""Calls of its own for so long go before one that is timed warm: a steady state takes more than one of them."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, a 95% interval of it, and every measurement in the order in which they were made."""

    median: float
    low: float
    high: float
    samples: list[float]

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        low, high = interval(samples)
        return cls(statistics.median(samples), low, high, samples)


def interval(samples: list[float]) -> tuple[float, float]:
    """A 95% confidence interval of the median from order statistics: it assumes nothing about the distribution.

    The k-th smallest and the k-th largest of n, for the largest k with P(Bin(n, 1/2) < k) <= 2.5%. Below 6 measurements there
    is no such k: their whole range is returned, which covers less.
    """
    ordered, n = sorted(samples), len(samples)
    k, below = 0, 0.0
    while below + math.comb(n, k) / 2**n <= (1 - CONFIDENCE) / 2:
        below += math.comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


@dataclass(frozen=True)
class Staged:
    """A call that needs something done before it which is not timed: `stage()` returns what is."""

    stage: Callable[[], Callable[[], object]]

    def __call__(self) -> object:
        return self.stage()()


def after_others(call: Callable) -> Staged:
    """The call right after others of its own."""

    def stage() -> Callable:
        end = time.perf_counter() + WARM_MS / 1e3
        call()
        while time.perf_counter() < end:
            call()
        return _ready(call)

    return Staged(stage)


def prepared(function: Callable, arguments: dict, measured: str, seed: int = 0) -> Callable[[], object]:
    """What is timed: the call, its gradients for random gradients of its outputs (after a forward pass that is not timed), or both."""
    if measured == FORWARD:
        arguments = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        return lambda: function(**arguments)
    leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]

    def differentiable() -> list[torch.Tensor]:
        outputs = function(**arguments)
        return [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]

    upstream = _upstream(differentiable(), seed)
    if measured == BOTH:
        return lambda: torch.autograd.grad(differentiable(), leaves, upstream)

    def stage() -> Callable:
        outputs = differentiable()
        return lambda: torch.autograd.grad(outputs, leaves, upstream)

    return Staged(stage)


def _upstream(outputs: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Random gradients, drawn where the outputs are: on a GPU there may be billions of numbers."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32).to(o.dtype) for o in outputs]


def interleaved(calls: dict, device: str, rounds: int, seed: int, warm_up: int = 2, room: int = 0) -> dict[object, list[float]]:
    """Milliseconds of each call, one of each in every round in random order; Python's garbage is collected between rounds.

    room: bytes that the C library has for them at the least, where it keeps freed memory.
    """
    clock = _gpu_milliseconds if device == "cuda" else _cpu_milliseconds
    times: dict[object, list[float]] = {name: [] for name in calls}
    order = random.Random(seed)
    with few_collected():
        for i in range(rounds + warm_up):
            if device == "cpu":
                populate_kept_memory(room)
            with _no_garbage_collection():
                for name in order.sample(list(calls), len(calls)):
                    if len(times[name]) >= FEWEST and sum(times[name]) > PATIENCE_MS:
                        continue
                    elapsed = clock(_ready(calls[name]))
                    if i >= warm_up:
                        times[name].append(elapsed)
    return times


def _ready(call: Callable) -> Callable:
    return call.stage() if isinstance(call, Staged) else call


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As Python's timeit: a collection meets whoever happens to allocate next."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
            gc.collect()


def _cpu_milliseconds(call: Callable) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _gpu_milliseconds(call: Callable) -> float:
    # Leaves the L2 cache cold, and the device busy until the call has been issued: only its own time is measured.
    torch.empty(1 << 32, dtype=torch.uint8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def host_microseconds(call: Callable, times: int = 20) -> float:
    """Of the host, to issue one call on an idle GPU: the median."""
    spent = []
    for _ in range(times):
        ready = _ready(call)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        ready()
        spent.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(spent)


def peak_megabytes(call: Callable, device: str) -> float | None:
    """Of memory that one call needs at most beyond what is there before it, its results included; None where that cannot be told.

    On a GPU it is what torch allocates, on the CPU the resident set (fastprimer/memory.py).
    """
    if device == "cpu":
        extra = extra_resident_bytes(call, _ready)
        return None if extra is None else extra / 1e6
    ready = _ready(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ready()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
