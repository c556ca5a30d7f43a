"""Contestants of one row: each checked against ours, then all of them timed in the same rounds as the machine's roofs."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastprimer.benchmark import roofs
from fastprimer.benchmark.rows import MATRIX, MEMORY, OURS, Row
from fastprimer.benchmark.timing import PATIENCE_MS, Timing, after_others, host_microseconds, interleaved, peak_megabytes

SHORT, MANY = 10**9, 32
"""Fewer operations than these are a short call, and more of them for each byte an arithmetic one. On a CPU a short arithmetic call is
timed right after others of its own, as in training, where its inputs have just been computed: after a copy of memory, a third of it
would be cold caches, page tables, and threads that wake up. What is bound by memory is timed as it comes, with cold caches."""

MOST_ROOM = 1 << 30
"""Bytes that are mapped before anything is timed."""


@dataclass(frozen=True)
class Settings:
    device: str
    rounds: int
    seed: int = 0
    peers: list[str] | None = None
    """Names; None: all there are."""


def contest(row: Row, ours: Callable, makers: dict[str, Callable[[], Callable]], settings: Settings, warm: bool = False) -> None:
    """Fill a row in, whose bytes and flops are known. `makers`: what prepares each peer's call.

    warm: on a CPU, each call right after others of its own; so are short arithmetic ones anyway.
    """
    calls, expected = {OURS: ours}, ours()
    for name, make in makers.items():
        call, reason = checked(make, expected, getattr(torch, row.dtype))
        if reason:
            row.left_out[name] = reason
        else:
            calls[name] = call
    del expected
    roof = roofs.roofs(settings.device, getattr(torch, row.dtype), torch.get_num_threads(), row.flops > 0)
    warm = settings.device == "cpu" and (warm or MANY * row.bytes <= row.flops < SHORT)
    timed = {name: after_others(call) for name, call in calls.items()} if warm else calls
    times = interleaved(timed | roof.calls, settings.device, settings.rounds, settings.seed, room=min(2 * row.bytes, MOST_ROOM))
    row.ours = Timing.of(times[OURS])
    row.peers = {name: Timing.of(times[name]) for name in calls if name != OURS}
    judge(row, roof, times)
    peaks = {name: peak_megabytes(call, settings.device) for name, call in calls.items()}
    row.peak_mb = {name: peak for name, peak in peaks.items() if peak is not None}
    if settings.device == "cuda":
        row.host_us = {name: host_microseconds(call) for name, call in calls.items()}


def judge(row: Row, roof: roofs.Roofs, times: dict[str, list[float]]) -> None:
    """The roofs' rates, and what follows from them."""
    samples = {}
    row.copy_gb_per_s, samples[MEMORY] = roof.best(roof.copies, times)
    if roof.products:
        row.matrix_gflop_per_s, samples[MATRIX] = roof.best(roof.products, times)
    row.judge()
    row.roof_samples = samples[row.limited_by]


def checked(make: Callable[[], Callable], expected, dtype: torch.dtype) -> tuple[Callable | None, str]:
    """(the call that `make` prepares, "") or (None, why it is not timed). A peer may round otherwise, but has to compute the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch.compile logs pages about what it raises
    try:
        call = make()
        begin = time.perf_counter()
        with warnings.catch_warnings():  # SDPA warns of each implementation that it does not take
            warnings.simplefilter("ignore")
            problem = difference(call(), expected, dtype)
        if not problem and (time.perf_counter() - begin) * 1e3 > PATIENCE_MS:  # the first call may have compiled
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            problem = f"takes {seconds:.0f} s a call" if seconds * 1e3 > PATIENCE_MS else ""
        return (None, problem) if problem else (call, "")
    except Exception as error:  # whatever a peer raises must not end the run
        return None, f"failed: {_reason(error)}"
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """In a line; of what torch.compile wraps up, the innermost."""
    text = str(error)
    inner = re.search(r"got (\w+Error\(.*)", text)
    return (inner[1] if inner else f"{type(error).__name__}: {next(iter(text.splitlines()), '')}")[:200]


def difference(theirs, ours, dtype: torch.dtype) -> str:
    """How a peer's results differ from ours by more than rounding can explain, or "".

    The bound on |theirs - ours| / |ours|, in the root-mean-square norm, is the square root of the unit roundoff of `dtype`, in which they
    compute, or of the results' own: far above the error of any sum, far below that of another formula. Ours has been proven before.
    """
    theirs, ours = (r if isinstance(r, (tuple, list)) else (r,) for r in (theirs, ours))
    for i, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        if a is None or b is None or not b.is_floating_point():
            continue
        if a.shape != b.shape:
            return f"computes something else: result {i} has shape {tuple(a.shape)}, ours {tuple(b.shape)}"
        eps = max(torch.finfo(kind).eps for kind in (a.dtype, b.dtype, dtype))
        a, b = a.detach().float(), b.detach().float()
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        if not error <= eps**0.5:
            return f"computes something else: result {i} differs from ours by {error:.1e} of its norm"
    return ""
