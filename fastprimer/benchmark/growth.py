"""How cost grows: a series is one operation over one size, all else fixed, forward and backward; every point is a row like any other.

Attention must grow with S^2 where it is causal and with S in a window, memory with S in both; decoding with T, norms with C, losses with
V; experts with nothing but the weights that they read as E grows, for the products are the same; and with threads the time must fall.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from fastprimer.benchmark.contest import Settings
from fastprimer.benchmark.measure import measure
from fastprimer.benchmark.rows import Row
from fastprimer.benchmark.timing import BOTH, FORWARD
from fastprimer.cases import Case, attention_case, decoding_case, loss_case, moe_case, rms_norm_case, route_case
from fastprimer.peers import PEERS

THREADS = "threads"


@dataclass(frozen=True)
class Series:
    op: str
    name: str
    letter: str
    sizes: tuple[int, ...]
    case: Callable[[int], Case]
    measured: str = BOTH
    but: tuple[str, ...] = ()
    """Peers that would need gigabytes."""
    proven: int | None = None
    """The largest size at which float64 shows the error, where it would need gigabytes beyond; peers must agree at every size."""

    def __str__(self) -> str:
        return f"{self.op} {self.name}".strip()

    def measure(self, size: int, dtype: torch.dtype, backend: str, settings: Settings) -> Iterator[Row]:
        wanted = [name for name in (PEERS if settings.peers is None else settings.peers) if name not in self.but]
        prove = self.proven is None or size <= self.proven
        with _threads(size if self.letter == THREADS else None):
            for row in measure(self.case(size), dtype, backend, (self.measured,), replace(settings, peers=wanted), prove):
                row.case = f"{self.name} {self.letter} {size}".strip()
                row.series, row.letter, row.size = str(self), self.letter, size
                yield row


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _powers(low: int, high: int, step: int = 2) -> tuple[int, ...]:
    return tuple(low * step**i for i in range(1 + round(math.log(high / low, step))))


def _attention(S: int, **mask) -> Case:
    return attention_case("", (1, S, 8, 64), (1, S, 2, 64), causal=True, bench=True, **mask)


def series() -> list[Series]:
    return [*_over_sizes(), *_over_threads()]


def _over_sizes() -> list[Series]:
    lengths, vocabularies = _powers(512, 8192), _powers(2000, 128000, 4)
    large = {"but": ("plain",), "proven": 2048}
    return [
        Series("attention", "causal", "S", lengths, _attention, **large),
        Series("attention", "window", "S", lengths, lambda S: _attention(S, window=(255, None)), **large),
        Series("attention_with_kv_cache", "", "T", lengths, lambda T: decoding_case("", [T - 1] * 4, 1, 32, 8, 128, bench=True), FORWARD),
        Series("rms_norm", "", "C", _powers(512, 16384), lambda C: rms_norm_case("", 2048, C, bench=True)),
        Series("route", "", "E", _powers(8, 256), lambda E: route_case("", 8192, E, 2, bench=True)),
        Series("moe", "", "E", _powers(4, 64), lambda E: moe_case("", 1024, 512, 256, E, 2, bench=True)),
        Series("cross_entropy", "", "V", vocabularies, lambda V: loss_case("cross_entropy", "", 256, V, bench=True)),
        Series("linear_cross_entropy", "", "V", vocabularies, lambda V: loss_case("linear_cross_entropy", "", 256, V, 256, bench=True)),
    ]


def _over_threads() -> list[Series]:
    cases = [
        rms_norm_case("", 2048, 4096, bench=True),
        _attention(1024),
        moe_case("", 1024, 512, 512, 8, 2, bench=True),
        loss_case("linear_cross_entropy", "", 1024, 8192, 512, bench=True),
    ]
    numbers = tuple(n for n in _powers(1, 1024) if n <= (os.cpu_count() or 1))
    return [Series(case.op, "", THREADS, numbers, lambda _, case=case: case) for case in cases]
