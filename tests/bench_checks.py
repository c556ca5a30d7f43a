"""Rows and results of a benchmark that nobody measured, shared by its tests."""

import random

from fastprimer.benchmark.rows import Results, Row
from fastprimer.benchmark.timing import Timing


def samples(median: float, n: int = 21, spread: float = 0.02, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [median * (1 + draw.uniform(-spread, spread)) for _ in range(n)]


def row(ours: float, *, eager: float = 4.0, copy: float = 60.0, case: str = "bench-a", op: str = "rms_norm", seed: int = 0, **more) -> Row:
    made = {
        "bytes": 1 << 25,
        "copy_gb_per_s": 1e3 / copy,
        "least_ms": 1.0,
        "of_roof": 1 / ours,
        "best_peer": "eager",
        "vs_best_peer": eager / ours,
    }
    timings = {"ours": Timing.of(samples(ours, seed=seed)), "peers": {"eager": Timing.of(samples(eager, seed=seed + 1))}}
    return Row(op, case, "float32", "forward", "cpu", roof_samples=samples(copy, seed=seed + 2), **timings, **(made | more))


def results(*rows: Row, **machine) -> Results:
    about = {"device": "a processor", "torch": "2.13", "commit": "abc", "date": "2026-01-01T00:00:00", "memory": "kept"}
    return Results(about | machine, list(rows))


def wrong_row(case: str = "bench-a") -> Row:
    return Row("rms_norm", case, "float32", "forward", "cpu", wrong=["y: error is 9 of its budget"])
