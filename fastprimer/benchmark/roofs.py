"""What the machine can do at most, measured between the contestants in the same rounds.

The memory roof is the best copy bandwidth (bytes read plus bytes written) of an array larger than the last-level cache. The
matrix roof is the rate of torch's own square product, float32's for every dtype and a half type's own where that is faster:
a processor without instructions for half types can always compute in float32.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

COPY_BYTES = 1 << 28
"""Of the array that is copied: well beyond usual last-level caches."""
LARGEST_PRODUCT = {"cpu": 2048, "cuda": 8192}
SMALLEST_PRODUCT = 1024
"""Half types begin with 128 on a CPU, where some have no instructions for them and need seconds otherwise."""
LONG_ENOUGH = 0.01
"""Seconds of a product that is no longer dominated by its call; the size doubles until then."""


@dataclass(frozen=True)
class Roofs:
    """Calls to be timed with the contestants; `work` is what each moves (bytes) or computes (floating-point operations)."""

    copies: dict[str, Callable]
    products: dict[str, Callable]
    work: dict[str, int]

    @property
    def calls(self) -> dict[str, Callable]:
        return self.copies | self.products

    def best(self, names: dict[str, Callable], times: dict[str, list[float]]) -> tuple[float, list[float]]:
        """(GB/s or GFLOP/s, milliseconds per GB or per GFLOP of each measurement) of the fastest way."""
        rates = {name: self.work[name] / statistics.median(times[name]) / 1e6 for name in names}
        name = max(rates, key=rates.get)
        return rates[name], [t / self.work[name] * 1e9 for t in times[name]]


def roofs(device: str, dtype: torch.dtype, threads: int, with_products: bool) -> Roofs:
    ways = _copies(device, threads)
    work = dict.fromkeys(ways, 2 * COPY_BYTES)
    products = {}
    for kind in dict.fromkeys((torch.float32, dtype)) if with_products else ():
        name = f"mm {str(kind).removeprefix('torch.')}"
        products[name], work[name] = _product(device, kind, threads)
    return Roofs(ways, products, work)


@functools.cache
def _copies(device: str, threads: int) -> dict[str, Callable]:
    """On the CPU the C library stores past the caches, which spares the reading of the lines that are written; torch does not."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    calls: dict[str, Callable] = {"copy": lambda: target.copy_(source)}
    if device == "cpu":
        part = COPY_BYTES // threads
        pool = ThreadPoolExecutor(threads)

        def copy_part(i: int) -> None:
            ctypes.memmove(target.data_ptr() + i * part, source.data_ptr() + i * part, part)

        calls["memmove"] = lambda: list(pool.map(copy_part, range(threads)))
    return calls


@functools.cache
def _product(device: str, dtype: torch.dtype, threads: int) -> tuple[Callable, int]:
    size = SMALLEST_PRODUCT if dtype == torch.float32 or device == "cuda" else 128
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        call = functools.partial(torch.mm, a, b)
        call()
        if size >= LARGEST_PRODUCT[device] or _seconds(call, device) >= LONG_ENOUGH:
            return call, 2 * size**3
        size *= 2


def _seconds(call: Callable, device: str) -> float:
    """The least of a few: another program may have the processor for a while."""
    return min(_once(call, device) for _ in range(5))


def _once(call: Callable, device: str) -> float:
    begin = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
