"""One case on one backend: proven, its peers checked, then all of them timed in the same rounds as the machine's roofs."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import fastprimer
from fastprimer.backends import use_backend
from fastprimer.benchmark import roofs
from fastprimer.benchmark.rows import MATRIX, Row
from fastprimer.benchmark.timing import (
    BACKWARD,
    FORWARD,
    PATIENCE_MS,
    Timing,
    host_microseconds,
    interleaved,
    peak_megabytes,
    prepared,
)
from fastprimer.cases import Case, Inputs, Work
from fastprimer.peers import peers
from fastprimer.testing import compare


@dataclass(frozen=True)
class Settings:
    device: str
    rounds: int
    seed: int = 0
    peers: list[str] | None = None
    """Names; None: all there are."""


def measure(case: Case, dtype: torch.dtype, backend: str, passes: tuple[str, ...], settings: Settings) -> Iterator[Row]:
    """A row for each pass; without times where the case is beyond its error budget."""
    wrong = _proof(case, dtype, backend, settings)
    torch.compiler.reset()
    arguments = case.arguments(Inputs(dtype, settings.device, settings.seed))
    if "return_lse" in arguments:  # the peers do not return it
        arguments["return_lse"] = False
    for measured in passes:
        row = Row(case.op, case.name, str(dtype).removeprefix("torch."), measured, backend, wrong)
        if not wrong:
            with use_backend(backend):
                _time(row, case, dtype, arguments, settings)
        yield row


def _proof(case: Case, dtype: torch.dtype, backend: str, settings: Settings) -> list[str]:
    """What is beyond its error budget. Without gradients an operation may take another way, which the proof machine does not go:
    where its bits differ, it is held against the same budget."""
    where = {"device": settings.device, "seed": settings.seed}
    rows = compare(case, dtype, backend, **where)
    public = getattr(fastprimer, case.op)
    arguments = case.arguments(Inputs(dtype, **where))
    if all(row.ok for row in rows) and any(isinstance(v, torch.Tensor) and v.requires_grad for v in arguments.values()):
        with use_backend(backend):
            same = all(torch.equal(a, b) for a, b in _both_ways(public, arguments))
        if not same:
            rows = compare(
                case, dtype, backend, **where, function=lambda **a: tuple(_Instead.apply(*pair) for pair in _both_ways(public, a))
            )
    return [str(row) for row in rows if not row.ok]


def _both_ways(function: Callable, arguments: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each output, computed with gradients and without."""
    detached = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    outputs = (function(**arguments), function(**detached))
    return list(zip(*(o if isinstance(o, tuple) else (o,) for o in outputs), strict=True))


class _Instead(torch.autograd.Function):
    """The second tensor's values with the first one's gradients."""

    @staticmethod
    def forward(ctx, proven, value):
        if not value.is_floating_point():
            ctx.mark_non_differentiable(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _time(row: Row, case: Case, dtype: torch.dtype, arguments: dict, settings: Settings) -> None:
    """Fills a row in."""
    calls = {"ours": prepared(getattr(fastprimer, case.op), arguments, row.measured, settings.seed)}
    expected = calls["ours"]()
    for name, make in peers(case.op, settings.device, row.measured, settings.peers).items():
        call, reason = _checked(make, arguments, row.measured, settings.seed, expected)
        if reason:
            row.left_out[name] = reason
        else:
            calls[name] = call
    del expected
    row.bytes, row.flops = _of_pass(case.work(arguments), row.measured)
    roof = roofs.roofs(settings.device, dtype, torch.get_num_threads(), row.flops > 0)
    times = interleaved(calls | roof.calls, settings.device, settings.rounds, settings.seed)
    row.ours = Timing.of(times["ours"])
    row.peers = {name: Timing.of(times[name]) for name in calls if name != "ours"}
    _judge(row, roof, times)
    if settings.device == "cuda":
        row.host_us = {name: host_microseconds(call) for name, call in calls.items()}
        row.peak_mb = {name: peak_megabytes(call) for name, call in calls.items()}


def _judge(row: Row, roof: roofs.Roofs, times: dict[str, list[float]]) -> None:
    """The limiting roof and the best peer."""
    row.copy_gb_per_s, row.roof_samples = roof.best(roof.copies, times)
    row.least_ms = row.bytes / row.copy_gb_per_s / 1e6
    if roof.products:
        row.matrix_gflop_per_s, samples = roof.best(roof.products, times)
        arithmetic_ms = row.flops / row.matrix_gflop_per_s / 1e6
        if arithmetic_ms > row.least_ms:
            row.limited_by, row.least_ms, row.roof_samples = MATRIX, arithmetic_ms, samples
    row.of_roof = row.least_ms / row.ours.median
    if row.peers:
        row.best_peer = min(row.peers, key=lambda name: row.peers[name].median)
        row.vs_best_peer = row.peers[row.best_peer].median / row.ours.median


def _of_pass(work: Work, measured: str) -> tuple[int, int]:
    """(bytes, floating-point operations)"""
    parts = {
        FORWARD: [(work.bytes_forward, work.flops_forward)],
        BACKWARD: [(work.bytes_backward, work.flops_backward)],
    }
    moved, computed = zip(*parts.get(measured, parts[FORWARD] + parts[BACKWARD]), strict=True)
    return sum(moved), sum(computed)


def _checked(make: Callable, arguments: dict, measured: str, seed: int, expected) -> tuple[Callable | None, str]:
    """(a peer's call, "") or (None, why it is not timed). A peer may round otherwise, but has to compute the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch.compile logs pages about what it raises
    try:
        call = prepared(make(), arguments, measured, seed)
        begin = time.perf_counter()
        problem = difference(call(), expected)
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


def difference(theirs, ours) -> str:
    """How a peer's results differ from ours by more than rounding can explain, or "".

    The bound on |theirs - ours| / |ours|, in the root-mean-square norm, is the square root of the dtype's unit roundoff: far above the
    error of any sum, far below that of another formula. Ours has been proven before.
    """
    theirs, ours = (r if isinstance(r, (tuple, list)) else (r,) for r in (theirs, ours))
    for i, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        if a is None or b is None or not b.is_floating_point():
            continue
        if a.shape != b.shape:
            return f"computes something else: result {i} has shape {tuple(a.shape)}, ours {tuple(b.shape)}"
        eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
        a, b = a.detach().float(), b.detach().float()
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        if not error <= eps**0.5:
            return f"computes something else: result {i} differs from ours by {error:.1e} of its norm"
    return ""
