"""What there is to measure here, for a choice of operations, backends, passes and types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastprimer.backends import PREFERENCE, BackendError, declared, unavailable
from fastprimer.benchmark.contest import Settings
from fastprimer.benchmark.growth import THREADS, Series, series
from fastprimer.benchmark.measure import measure
from fastprimer.benchmark.models import MODEL, MODEL_CASES, measure_model, model_peers
from fastprimer.benchmark.rows import ALL_PASSES, DTYPES, Row
from fastprimer.benchmark.timing import BACKWARD, FORWARD, MODEL_PASSES, PASSES
from fastprimer.cases import PRODUCTS, benchmarks
from fastprimer.peers import EAGER, peers

OPS = (*EAGER, MODEL)
AUTOMATIC = "auto"
WITH_PRODUCTS = (*PRODUCTS, MODEL)
"""Whose peers need matrix products."""


@dataclass(frozen=True)
class Choice:
    """What the user asked for; None: all that is usual."""

    ops: list[str] | None = None
    backends: list[str] | None = None
    passes: list[str] | None = None
    dtypes: list[str] | None = None
    quick: bool = False
    growth: bool = False
    case: str = ""
    """A case's name, or what is in the names of all."""


@dataclass(frozen=True)
class Job:
    """Some rows that share their inputs."""

    what: str
    dtype: str
    backend: str
    rows: int
    peers: tuple[str, ...]
    """Names of those that take part in one of the rows at least, if they are chosen."""
    measure: Callable[[Settings], Iterator[Row]]


def check_peers(found: list[Job], wanted: list[str]) -> None:
    """Raises BackendError if none of the peers asked for takes part in any of these jobs."""
    there = dict.fromkeys(name for job in found for name in job.peers)
    if wanted and not there.keys() & set(wanted):
        raise BackendError(
            f"argument --peers: expected one at least of {', '.join(there) or 'none'}, which is what these rows have here; "
            f"got {', '.join(wanted)}"
        )


def jobs(device: str, choice: Choice) -> list[Job]:
    """Raises BackendError: a backend asked for is not there, or nothing is left to measure."""
    found = [job for op in dict.fromkeys(choice.ops or OPS) for job in _of_operation(op, device, choice)]
    if not found:
        asked = ", ".join(choice.ops or ["every operation"])
        options = f"--case, --backend{', --growth' if choice.growth else ''} and --pass"
        raise BackendError(f"nothing to measure: {asked} has no kernel, or no pass, of this choice of {options} here")
    return found


def _of_operation(op: str, device: str, choice: Choice) -> list[Job]:
    make = _growth if choice.growth else _models if op == MODEL else _cases
    backends, dtypes = _backends(op, device, choice), choice.dtypes or usual_dtypes(op, device)
    return [
        job for backend in dict.fromkeys(backends) for dtype in dict.fromkeys(dtypes) for job in make(op, device, backend, dtype, choice)
    ]


def usual_dtypes(op: str, device: str) -> tuple[str, ...]:
    """On a processor without instructions for half types torch needs minutes for what it does in a second in float32."""
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return DTYPES[:2] if fast or op not in WITH_PRODUCTS else DTYPES[:1]


def _backends(op: str, device: str, choice: Choice) -> list[str]:
    """Of a model, those that have every operation; on a GPU, where one is faster here and the other there, the automatic choice."""
    if op == MODEL and device == "cuda" and not choice.backends:
        return [AUTOMATIC]
    ops = list(EAGER) if op == MODEL else [op]
    offered = [b for b in choice.backends or PREFERENCE[device] if all(b in declared(name) for name in ops)]
    reasons = {b: next(filter(None, (unavailable(name, b, device) for name in ops)), "") for b in offered}
    if choice.backends and (missing := [f"{b}: {reason}" for b, reason in reasons.items() if reason]):
        raise BackendError(f"argument --backend: {op} cannot be measured here on {'; '.join(missing)}")
    return [b for b, reason in reasons.items() if not reason and (choice.backends or b != "reference")]


def _cases(op: str, device: str, backend: str, dtype: str, choice: Choice) -> list[Job]:
    passes = _passes(PASSES, choice, [p for p in PASSES if p != BACKWARD])
    if op == "attention_with_kv_cache":  # it has no gradients
        passes = [p for p in passes if p == FORWARD]
    return _jobs(measure, benchmarks(device, op), passes, backend, dtype, choice, _peers(op, device, passes))


def _peers(op: str, device: str, passes: Sequence[str]) -> tuple[str, ...]:
    """Names. The usual way goes by "eager" even where it has a name of its own; a model's peers are those of any other."""
    if op == MODEL:
        return tuple(name for p in passes for name in model_peers(MODEL_CASES[device][0], device, p))
    return tuple(name for p in passes for name in (*peers(op, device, p), "eager"))


def _models(op: str, device: str, backend: str, dtype: str, choice: Choice) -> list[Job]:
    passes = _passes(MODEL_PASSES, choice, list(MODEL_PASSES))
    return _jobs(measure_model, MODEL_CASES[device], passes, backend, dtype, choice, _peers(op, device, passes))


def _jobs(
    measure: Callable, cases: Sequence, passes: list[str], backend: str, dtype: str, choice: Choice, theirs: tuple[str, ...]
) -> list[Job]:
    def job(case) -> Job:
        kind = getattr(torch, dtype)
        return Job(str(case), dtype, backend, len(passes), theirs, lambda settings: measure(case, kind, backend, tuple(passes), settings))

    named = [case for case in cases if case.name == choice.case]
    chosen = named or [case for case in cases if choice.case in case.name]
    return [job(case) for case in (chosen[:1] if choice.quick else chosen) if passes]


def _growth(op: str, device: str, backend: str, dtype: str, choice: Choice) -> list[Job]:
    """Threads are a CPU's. A case is a size here."""
    found = [s for s in series() if s.op == op and s.measured in (choice.passes or ALL_PASSES)]

    def job(one: Series, size: int) -> Job:
        kind = getattr(torch, dtype)
        theirs = tuple(name for name in _peers(op, device, [one.measured]) if name not in one.but)
        return Job(f"{one} {one.letter} {size}", dtype, backend, 1, theirs, lambda settings: one.measure(size, kind, backend, settings))

    fitting = [one for one in found if device == "cpu" or one.letter != THREADS]
    points = [(one, size) for one in fitting for size in (one.sizes[:3] if choice.quick else one.sizes)]
    return [job(one, size) for one, size in points if choice.case in f"{one} {one.letter} {size}"]


def _passes(every: tuple[str, ...], choice: Choice, quick: list[str]) -> list[str]:
    if choice.passes:
        return [p for p in every if p in choice.passes]
    return quick if choice.quick else list(every)
